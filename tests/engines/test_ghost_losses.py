"""Cross-entropy in every way that it can be called, against one plain backward pass per example."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.engines.against_loop import agree, both, build, same

IGNORED = 1


def loss_of(call: Any) -> Any:
    """The loss of what a module puts out, with targets that follow from the example."""

    def loss(output: Tensor) -> Tensor:
        classes = (output.detach().abs().sum(1) * 7).long() % output.shape[1]
        return call(output, classes)

    return loss


CALLS: dict[str, Any] = {
    "mean": F.cross_entropy,
    "module": nn.CrossEntropyLoss(),
    "sum": lambda x, y: F.cross_entropy(x, y, reduction="sum"),
    "none": lambda x, y: F.cross_entropy(x, y, reduction="none").square().sum(),
    "smooth": lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1),
    "some ignored": lambda x, y: F.cross_entropy(
        x, torch.where(x.argmax(1) == 0, IGNORED, y), ignore_index=IGNORED
    ).nan_to_num(),
    "by place": lambda x, y: F.cross_entropy(x, y, None, None, 0).nan_to_num(),
    "smooth and ignored": lambda x, y: F.cross_entropy(x, y, ignore_index=0, label_smoothing=0.2).nan_to_num(),
    "log of softmax": lambda x, y: F.nll_loss(x.log_softmax(1), y),
    "nll, sum": lambda x, y: F.nll_loss(x.log_softmax(1), y, reduction="sum", ignore_index=2),
    "weights": lambda x, y: F.cross_entropy(x, y, torch.linspace(0.5, 2, x.shape[1], dtype=x.dtype)),
    "probabilities": lambda x, y: F.cross_entropy(x, x.detach().softmax(1)),
    "old": lambda x, y: F.cross_entropy(x, y, size_average=False),
    "the same target": lambda x, y: F.cross_entropy(x, torch.zeros(y.shape, dtype=torch.long)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("shape", [(4, 5), (3, 6, 5), (3, 5, 4, 3)])
@pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")
def test_each_example_has_the_loss_that_it_has_alone(call: str, shape: tuple[int, ...]) -> None:
    """Rows with a class each, many rows of an example, images with a class for each place."""
    module, x = build(lambda: nn.Conv2d(5, 5, 1) if len(shape) == 4 else nn.Linear(5, 5), 0, *shape)
    loss = loss_of(CALLS[call])
    agree(module, x, loss=(lambda output: loss(output.flatten(0, 1))) if len(shape) == 3 else loss)


def test_of_a_single_row() -> None:
    """``F.cross_entropy`` of ``(C,)`` and a class."""
    module, x = build(lambda: nn.Linear(5, 5), 0, 4, 5)
    agree(module, x, loss=lambda output: F.cross_entropy(output[0], (output[0] * 9).long().sum() % 5))


def test_an_example_of_which_all_is_ignored_has_no_loss_and_adds_nothing() -> None:
    """Its mean is 0/0, as alone: its gradient is not finite, so it contributes nothing, and the others what they did."""
    module, x = build(lambda: nn.Linear(5, 5), 0, 4, 5)
    x[2] = 0

    def loss(output: Tensor) -> Tensor:
        none = (output - module.bias).abs().sum() == 0
        return F.cross_entropy(output, torch.where(none, -100, 3).reshape(1))

    ghost, loop, _ = both(module, x, loss=loss)
    assert ghost.losses.isnan().tolist() == loop.losses.isnan().tolist() == [False, False, True, False]
    for name, expected in loop.gradient.items():
        torch.testing.assert_close(ghost.gradient[name], expected)


def test_it_takes_the_calls_that_it_takes_without_privacy() -> None:
    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    calls: Counter[str] = Counter()
    module, x = build(lambda: nn.Linear(5, 5), 0, 4, 5)
    with Counting():
        ghost, loop, _ = both(module, x, loss=loss_of(F.cross_entropy))
    same(ghost, loop)
    assert calls["nll_loss_forward"] == calls["nll_loss_backward"] == 1 + len(x), "one for all, and the loop's"
    assert not calls["gather"] + calls["scatter"]
