"""What a mechanism carries goes from step to step and through a checkpoint; today's mechanisms carry nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_dp.mechanism.release as release_module
from lightning_dp import DifferentialPrivacy, PreflightError
from lightning_dp.mechanism.gaussian import GaussianNoise
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.mechanism.release import release
from lightning_dp.mechanism.state import NOTHING, MechanismState
from lightning_dp.record.checkpoint import Spent, _digest, read_with_digest, with_digest
from tests.conftest import loader, regressor, trainer
from tests.guarantees.mutations import patched
from tests.mechanism.laws import plan

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


@dataclass(frozen=True)
class Remembers(GaussianNoise):
    """Gaussian noise that carries the numbers of the steps that it was added in."""

    def add(self, *args: Any, step: int, state: MechanismState, **options: Any) -> MechanismState:
        super().add(*args, step=step, state=state, **options)
        return MechanismState({"steps": [*state.values.get("steps", []), step]})


@pytest.fixture
def remembering() -> Iterator[None]:
    with patched((release_module, "noise_of", lambda mechanism, begun: Remembers(mechanism.noise_std))):
        yield


def carried(private: DifferentialPrivacy) -> Any:
    return private.state_dict()["mechanism"]


@pytest.mark.usefixtures("remembering")
def test_a_release_hands_on_what_the_noise_carries() -> None:
    state = MechanismState({"steps": [7]})
    released = release({"w": torch.zeros(3)}, plan().mechanism, RandomKey.from_seed(0), 8, state=state)
    assert released.state == MechanismState({"steps": [7, 8]})


@pytest.mark.usefixtures("remembering")
def test_it_goes_from_step_to_step_through_checkpoints_and_from_fit_to_fit(tmp_path: Path) -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0, seed=3)
    first = trainer(private, max_steps=3)
    first.fit(regressor(), loader())
    assert carried(private) == {"steps": [0, 1, 2]}
    first.save_checkpoint(tmp_path / "a.ckpt")
    resumed = DifferentialPrivacy(noise_multiplier=1.0, seed=3)
    trainer(resumed, max_steps=5).fit(regressor(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert carried(resumed) == {"steps": [0, 1, 2, 3, 4]}
    trainer(private, max_steps=2).fit(regressor(), loader())
    assert carried(private) == {"steps": [0, 1, 2, 3, 4]}


def test_todays_mechanisms_carry_nothing_and_older_checkpoints_hold_nothing() -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0)
    trainer(private, max_steps=2).fit(regressor(), loader())
    assert carried(private) == {}
    state = with_digest(Spent({"version": 2, "phases": []}))
    assert state["mechanism"] == {}
    older = {name: value for name, value in state.items() if name not in ("mechanism", "digest")}
    assert read_with_digest({**older, "digest": _digest(older)}).carried == NOTHING


def test_what_a_checkpoint_holds_of_it_cannot_be_changed_by_hand() -> None:
    state = with_digest(Spent({"version": 2, "phases": []}, carried=MechanismState({"steps": [1]})))
    assert read_with_digest(state).carried == MechanismState({"steps": [1]})
    for wrong in ({**state, "mechanism": {"steps": [2]}}, {n: v for n, v in state.items() if n != "mechanism"}):
        with pytest.raises(PreflightError, match="was changed after it was written"):
            read_with_digest(wrong)
    with pytest.raises(ValueError, match=r"the mechanism's state is a list: expected a dict"):
        MechanismState.read([])
