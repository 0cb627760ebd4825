"""The noise of a run is independent across parameters and steps; slightly wrong noise is noticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import lightning_dp.step.sample_release as sample_release_module
from lightning_dp import DifferentialPrivacy
from lightning_dp.mechanism.release import Released
from lightning_dp.mechanism.state import NOTHING
from tests.conftest import loader, trainer
from tests.guarantees.mutations import Mutation, patched
from tests.mechanism.laws import CAUGHT, FALSE_ALARM, independence_p_values, standard_normal_p_values

SIGMA, CLIP, BATCH, SIZE = 1.5, 0.5, 16, 8000


class Four(L.LightningModule):
    """Four parameters of one size, whose gradients are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(torch.zeros(SIZE)) for _ in range(4)])
        self.released: list[npt.NDArray[np.float64]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return sum(part.sum() for part in self.parts) * 0.0 + 0.0 * batch[0].sum()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for part in self.parts:
            assert part.grad is not None
            self.released.append(part.grad.double().numpy() * BATCH / (SIGMA * CLIP))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def noise_of_a_run(steps: int = 5) -> list[npt.NDArray[np.float64]]:
    """A row for each parameter of each step, in units of σC."""
    module = Four()
    private = DifferentialPrivacy(noise_multiplier=SIGMA, clip_norm=CLIP, expected_batch_size=BATCH)
    trainer(private, max_steps=steps).fit(module, loader())
    assert len(module.released) == 4 * steps
    return module.released


@contextmanager
def released_by(wrong: Callable[..., dict[str, Tensor]]) -> Iterator[None]:
    original = sample_release_module.release

    def released(*args: Any) -> Any:
        return Released(wrong(lambda *again: original(*again).gradient, *args), NOTHING, 0.0)

    with patched((sample_release_module, "release", released)):
        yield


def every_parameter_has_the_same_stream() -> Any:
    """The stream starts anew for each parameter, which is released by itself."""

    def wrong(right: Any, gradient: Any, *args: Any) -> dict[str, Tensor]:
        return {name: right({name: part}, *args)[name] for name, part in gradient.items()}

    return released_by(wrong)


def a_tenth_of_the_last_steps_noise_stays() -> Any:
    """The law of each step's noise is right, and it is correlated with the step before."""

    def wrong(right: Any, gradient: Any, mechanism: Any, key: Any, step: int, *rest: Any) -> dict[str, Tensor]:
        new = right(gradient, mechanism, key, step, *rest)
        last = right(gradient, mechanism, key, max(0, step - 1), *rest)
        return {name: np.sqrt(0.99) * new[name] + 0.1 * last[name] for name in new} if step else new

    return released_by(wrong)


def one_parameters_noise_is_anothers_turned_round() -> Any:
    """Of the right law, and in step with another parameter's."""

    def wrong(right: Any, *args: Any) -> dict[str, Tensor]:
        released = right(*args)
        names = list(released)
        return {**released, names[3]: -released[names[1]]}

    return released_by(wrong)


def test_noise_is_independent_across_parameters_and_steps() -> None:
    rows = noise_of_a_run()
    assert min(independence_p_values(rows).values()) > FALSE_ALARM
    assert min(standard_normal_p_values(np.concatenate(rows)).values()) > FALSE_ALARM


@pytest.mark.parametrize(
    "wrong",
    [
        every_parameter_has_the_same_stream,
        a_tenth_of_the_last_steps_noise_stays,
        one_parameters_noise_is_anothers_turned_round,
    ],
)
def test_noise_that_is_not_is_noticed(wrong: Mutation) -> None:
    with wrong():
        rows = noise_of_a_run()
    assert min(independence_p_values(rows).values()) < CAUGHT
