"""Parameters that somebody else keeps: brought for one layer at a time, and the sums are those of whole parameters."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.ghost.bringing import brought_again
from lightning_dp.engines.ghost.coverage import used_by_rules_alone

EXAMPLES = 5


class Shelf:
    """Keeps parameters, counts how many are out at once, and leaves NaN in the module."""

    def __init__(self, module: nn.Module, names: set[str]) -> None:
        self.names = names
        self._values = {name: p.detach().clone() for name, p in module.named_parameters() if name in names}
        self._out: list[Any] = []
        self.most, self.passes = 0, 0
        self.brought: list[str] = []
        self.sums: dict[str, Tensor | None] = {}
        for name in names:
            module.get_parameter(name).data.fill_(torch.nan)

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        self.passes += 1
        yield

    def bring(self, name: str) -> Tensor:
        value = self._values[name].clone()
        self._out = [*(ref for ref in self._out if ref() is not None), weakref.ref(value)]
        self.most = max(self.most, len(self._out))
        self.brought.append(name)
        return value

    def add(self, name: str, total: Tensor | None) -> None:
        assert not any(ref() is not None for ref in self._out)  # a sum needs no parameter
        before = self.sums.get(name)
        self.sums[name] = total if before is None or total is None else before + total


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.conv = nn.Conv1d(6, 4, 3, padding=1)
        self.frozen = nn.Linear(4, 4)
        self.norm = nn.GroupNorm(2, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.inside, self.attention = nn.Parameter(torch.ones(4, 4)), nn.MultiheadAttention(4, 2, batch_first=True)
        self.last = nn.Linear(4, 1, bias=False)
        self.frozen.requires_grad_(False)

    def forward(self, words: Tensor) -> Tensor:
        hidden = self.norm(self.conv(self.words(words).transpose(1, 2))).transpose(1, 2)
        hidden = torch.relu(self.frozen(hidden)) + torch.tanh(self.second(torch.tanh(self.first(hidden))))
        hidden = hidden @ self.inside + self.attention(hidden, hidden, hidden, need_weights=False)[0]
        return self.last(hidden).mean()


KEPT = {"words.weight", "conv.weight", "frozen.weight", "first.weight", "last.weight"}


def made(dtype: torch.dtype = torch.float64) -> tuple[Net, list[Tensor]]:
    torch.manual_seed(0)
    return Net().to(dtype), [torch.randint(11, (EXAMPLES, 7))]


def summed(net: Net, batch: list[Tensor], keeper: Any = None, parting: bool = False, **options: Any) -> Any:
    engine = GhostEngine(net)
    engine.keeper = keeper

    def loss(parameters: Mapping[str, Tensor], one: Any) -> tuple[Tensor, Any]:
        value = functional_call(net, dict(parameters), (one[0],)).square()
        return (value * 3 if parting and one[0].sum() % 2 == 0 else value), one[0].sum()

    trainable = {name: p for name, p in net.named_parameters() if p.requires_grad}
    return engine, engine.clipped_sum(loss, trainable, batch, EXAMPLES, 0.05, **options)


@pytest.mark.parametrize("parting", [False, True])
def test_sums_of_kept_parameters_are_those_of_whole_ones(parting: bool) -> None:
    net, batch = made()
    engine, expected = summed(net, batch, parting=parting, counted=None if parting else 4)
    assert used_by_rules_alone(net, engine.handled) == KEPT
    shelf = Shelf(net, KEPT)
    _, found = summed(net, batch, shelf, parting=parting, counted=None if parting else 4)
    torch.testing.assert_close(found.norms, expected.norms)
    torch.testing.assert_close(found.losses, expected.losses)
    assert found.gradient.keys() == expected.gradient.keys() - KEPT
    for name, gradient in expected.gradient.items():
        torch.testing.assert_close(shelf.sums[name] if name in KEPT else found.gradient[name], gradient)
    assert "frozen.weight" not in shelf.sums
    assert (shelf.passes > 1) == parting


def test_one_kept_parameter_is_whole_at_a_time_and_the_first_layer_only_once() -> None:
    net, batch = made()
    shelf = Shelf(net, KEPT)
    summed(net, batch, shelf)
    assert shelf.most == 1
    forward = ["words.weight", "conv.weight", "frozen.weight", "first.weight", "first.weight", "last.weight"]
    assert sorted(shelf.brought[:6]) == sorted(forward)
    assert sorted(shelf.brought[6:]) == sorted(forward[1:])  # what comes before the first layer needs no gradient


def test_under_autocast_they_are_brought_too() -> None:
    net, batch = made(torch.float32)
    kept = KEPT - {"frozen.weight"}  # whose plain kernel rounds in another order
    with torch.autocast("cpu", torch.bfloat16):
        _, expected = summed(net, batch)
        shelf = Shelf(net, kept)
        _, found = summed(net, batch, shelf)
    torch.testing.assert_close(found.norms, expected.norms)
    for name in kept:
        torch.testing.assert_close(shelf.sums[name], expected.gradient[name])


def test_a_ban_on_hooks_is_lifted_where_values_are_brought_and_nowhere_else() -> None:
    """torch before 2.15 puts one up under vmap."""
    value = torch.randn(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
        with brought_again({value: value.clone}):
            y = nn.functional.linear(x, value)
        with pytest.raises(RuntimeError, match="no hooks here"):
            torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t).__enter__()
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, value.sum(0).expand(2, 3))
