"""A trainable parameter that no example moves is named, once; one that starts behind a zero is not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DifferentialPrivacy
from tests.conftest import Regressor, loader, trainer


class Adapters(Regressor):
    """As in LoRA: the second factor starts at zero, so the first has no gradient at first."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        nn.init.zeros_(self.up.weight)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch[0] + self.up(self.down(batch[0])), batch[1]), batch_idx)


class CutOff(Adapters):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return Regressor.training_step(self, (inputs + self.up(self.down(inputs)).detach(), targets), batch_idx)


@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
def test_what_no_example_moves_is_named_once(engine: Any) -> None:
    with pytest.warns(
        UserWarning, match=r"got no gradient from any example in 3 steps: down.weight, up.weight\."
    ) as warned:
        trainer(DifferentialPrivacy(noise_multiplier=1.0, engine=engine), max_steps=6).fit(CutOff(), loader())
    assert len([one for one in warned if "got no gradient" in str(one.message)]) == 1


@pytest.mark.parametrize("steps", [1, 5])
def test_what_moves_later_and_short_runs_are_not(steps: int) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=steps).fit(Adapters(), loader())
    assert not [one for one in told if "got no gradient" in str(one.message)]


def test_a_step_without_examples_counts_for_nothing() -> None:
    from lightning_dp.step.never_moved import NeverMoved

    look, zeros = NeverMoved(), {"w": torch.zeros(2)}
    for _ in range(5):
        look.look(zeros, 0)
    look.look(zeros, 1)
    look.look({"w": torch.ones(2)}, 1)
    look.look(zeros, 1)  # has moved before: no warning, which would be an error here
