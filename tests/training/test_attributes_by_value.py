"""Attributes are compared by content, and what counters alone decide is public: it stays, and later steps see it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DifferentialPrivacy, PreflightError
from tests.conftest import Regressor, loader, regression_data, trainer, weights

EXAMPLES = 8


class Attributed(Regressor):
    """``before`` sets attributes, ``during`` changes them in training_step and gives the loss's factor."""

    def __init__(self, before: Any, during: Any) -> None:
        super().__init__(lr=0.1)
        before(self)
        self.during = during

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]).squeeze(-1), batch[1])
        return loss * self.during(self, batch)


def updated_alike(self: Any, batch: Any) -> Any:
    self.options.update({"w": 0.0, "names": ("a", None), "more": [1.0, {"deep": 2.5}]})
    return 1.0


def set_alike(self: Any, batch: Any) -> Any:
    self.weight, self.table, self.array = 0.5, torch.arange(3.0), np.ones(2)
    return self.weight


def by_epoch(self: Any, batch: Any) -> Any:
    self.weight = 1.0 / (1 + self.current_epoch)
    return self.weight


def decaying(self: Any, batch: Any) -> Any:
    self.weight *= 0.5
    self.steps += 1
    return self.weight + self.steps


def in_a_dict(self: Any, batch: Any) -> Any:
    self.options["w"] = self.options["w"] + 1.0
    self.options["phase"] = "late" if self.options["w"] > 1 else "early"
    return 1.0 + self.options["w"]


def made_on_the_way(self: Any, batch: Any) -> Any:
    self.seen = 2.0 * getattr(self, "seen", 1.0)
    return self.seen


def a_tensor_that_decays(self: Any, batch: Any) -> Any:
    self.table = self.table * 0.5
    return 1.0 + self.table[1]


def nothing(self: Any) -> None:
    pass


def options(self: Any) -> None:
    self.options = {"w": 0.0, "names": ("a", None), "more": [1.0, {"deep": 2.5}]}


def values(self: Any) -> None:
    self.weight, self.steps, self.table, self.array = 1.0, 0, torch.arange(3.0), np.ones(2)


PUBLIC = {
    "updated alike": (options, updated_alike, ["options"]),
    "set alike": (values, set_alike, ["weight", "table"]),
    "by epoch": (values, by_epoch, ["weight"]),
    "decaying": (values, decaying, ["weight", "steps"]),
    "in a dict": (options, in_a_dict, ["options"]),
    "made on the way": (nothing, made_on_the_way, ["seen"]),
    "a tensor that decays": (values, a_tensor_that_decays, ["table"]),
}


@pytest.mark.parametrize("case", PUBLIC)
def test_what_follows_from_counters_is_kept_and_seen_by_later_steps(case: str) -> None:
    before, during, names = PUBLIC[case]
    found = []
    for engine in (None, "ghost", "loop"):
        torch.manual_seed(0)
        module = Attributed(before, during)
        private = DifferentialPrivacy(
            noise_multiplier=0.0, clip_norm=float("inf"), expected_batch_size=EXAMPLES, engine=engine or "auto"
        )
        fit = trainer(*([private] if engine else []), max_epochs=3, max_steps=-1)
        fit.fit(module, loader(regression_data(EXAMPLES), batch_size=EXAMPLES))
        found.append((weights(module), [getattr(module, name) for name in names]))
    for moved, kept in found[1:]:
        torch.testing.assert_close(moved, found[0][0], rtol=1e-4, atol=1e-6)
        for value, expected in zip(kept, found[0][1], strict=True):
            assert type(value) is type(expected)
            torch.testing.assert_close(value, expected) if isinstance(value, Tensor) else None
            assert isinstance(value, Tensor) or value == expected


def the_mean(self: Any, batch: Any) -> Any:
    self.weight = float(batch[1].mean())
    return 1.0


def a_sum(self: Any, batch: Any) -> Any:
    self.options["w"] += float(batch[1].sum())
    return 1.0


def a_count(self: Any, batch: Any) -> Any:
    self.steps += int((batch[1] > -10).sum()) if batch[1].abs().sum() > 0 else 0
    return 1.0


@pytest.mark.parametrize(
    ("before", "during", "text"),
    [
        (values, the_mean, r"changes self\.weight"),
        (options, a_sum, r"changes self\.options"),
        (values, a_count, r"sets self\.steps to different integers"),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 8])  # of a single example drawn all values are alike
def test_what_depends_on_the_example_is_refused(before: Any, during: Any, text: str, batch_size: int) -> None:
    module = Attributed(before, during)
    start = weights(module)
    private = DifferentialPrivacy(noise_multiplier=1.0, engine="loop", seed=3)
    with pytest.raises(PreflightError, match=text):
        trainer(private, max_steps=20).fit(module, loader(regression_data(16), batch_size=batch_size))
    assert private.ledger is not None
    if batch_size == 8:
        torch.testing.assert_close(weights(module), start, rtol=0.0, atol=0.0)
        assert private.ledger.steps == 0


def test_a_value_that_examples_share_by_chance_is_hidden_from_later_steps() -> None:
    """All targets are equal, so that the attribute is; a step that saw it would tell other targets from these."""
    found = []
    for shift in (0.0, 3.0):

        class Remembering(Regressor):
            def training_step(self, batch: Any, batch_idx: int, shift: float = shift) -> Tensor:
                factor = getattr(self, "last", 1.0)
                self.last = float(batch[1].mean()) + (shift if batch_idx == 0 and batch[1].abs().sum() > 0 else 0.0)
                return super().training_step(batch, batch_idx) * factor

            def configure_optimizers(self) -> Any:  # the first step moves nothing
                optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
                schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.1 * (n > 0))
                return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        torch.manual_seed(0)
        module, data = Remembering(), regression_data()
        data.tensors[1].fill_(0.5)
        trainer(DifferentialPrivacy(noise_multiplier=1.0, seed=0, engine="loop"), max_steps=2).fit(module, loader(data))
        assert module.last == pytest.approx(0.5)
        found.append(weights(module))
    torch.testing.assert_close(found[0], found[1], rtol=0.0, atol=0.0)


def test_a_counter_counts_steps_without_examples_too() -> None:
    class Counting(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.steps, self.weight = 0, 1.0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.steps += 1
            self.weight = self.weight * 0.5
            return super().training_step(batch, batch_idx)

    module = Counting()
    private = DifferentialPrivacy(noise_multiplier=1.0, seed=1, expected_batch_size=1)
    trainer(private, max_steps=12).fit(module, loader(batch_size=1))  # a third of the draws is empty
    assert module.steps == 12
    assert module.weight == pytest.approx(0.5**12)


def test_without_a_batch_of_zeros_a_float_that_moves_is_refused() -> None:
    class Sensitive(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.weight = 1.0

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if not batch[0].abs().sum() > 0:
                raise ValueError("zeros")
            self.weight *= 0.5
            return super().training_step(batch, batch_idx)

    with pytest.raises(PreflightError, match=r"changes self\.weight"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0)).fit(Sensitive(), loader())
