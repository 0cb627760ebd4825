"""With ``seed=``, continuations that sum other gradients have other noise; what is repeated stays the same release."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

import lightning_dp.mechanism.gaussian as gaussian_module
import lightning_dp.record.checkpoint as checkpoint_module
from lightning_dp.record.course import facts_of
from lightning_dp.step.open_step import OpenStep
from tests.conftest import Regressor, regressor
from tests.faults.lives import life, record_releases, releases
from tests.guarantees.mutations import caught, patched

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
]


class Halved(Regressor):
    """Another loss under the same hyperparameters."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step(batch, batch_idx) / 2


class ByHand(Regressor):
    """Steps on every second batch, so that a sample between two steps is drawn and not used."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        loss = torch.nn.functional.mse_loss(self.net(inputs).squeeze(-1), targets)
        if batch_idx % 2:
            self.manual_backward(loss)
            self.optimizers().step()


class Scheduled(Regressor):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5), "interval": "step"}]


@pytest.fixture(scope="module")
def third(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    life(folder, steps=3, seed=5, module=regressor(lr=0.1))
    return folder / "ckpt" / "step=3.ckpt"


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    folder.mkdir()
    with patched((gaussian_module, "add_gaussian_noise", gaussian_module.add_gaussian_noise)):
        record_releases(folder)
        yield


def continuation(folder: Path, third: Path, module: Any, **options: Any) -> list[dict[str, Any]]:
    """What is released from the third checkpoint on, in a folder that knows nothing of other continuations."""
    with recorded(folder):
        shutil.copy(third, folder / "step=3.ckpt")
        private = life(folder, folder / "step=3.ckpt", steps=7, module=module, seed=5, **options)
        told = [caveat for caveat in private.statement().caveats if "the same noise if it differs" in caveat]
        assert len(told) == 1
    return releases(folder)


OTHERS = {
    "learning rate": lambda: regressor(lr=0.2),
    "loss": lambda: Halved(lr=0.1),
    "schedule": lambda: Scheduled(lr=0.1),
    "optimization by hand": lambda: ByHand(lr=0.1),
}


def continuations_share_no_noise(folder: Path, third: Path, kind: str) -> None:
    folder.mkdir()
    one = continuation(folder / "one", third, regressor(lr=0.1))
    other = continuation(folder / "other", third, OTHERS[kind]())
    assert not {line["noise"] for line in one} & {line["noise"] for line in other}


@pytest.mark.parametrize("kind", list(OTHERS))
def test_continuations_that_differ_share_no_noise(tmp_path: Path, third: Path, kind: str) -> None:
    continuations_share_no_noise(tmp_path / "right", third, kind)


def test_one_key_for_all_continuations_would_be_caught(tmp_path: Path, third: Path) -> None:
    with caught(patched((checkpoint_module, "course_of", lambda *_, **__: ""))):
        continuations_share_no_noise(tmp_path / "wrong", third, "learning rate")


def test_a_continuation_that_is_repeated_is_the_same_release(tmp_path: Path, third: Path) -> None:
    for kind, make in {"as it was": lambda: regressor(lr=0.1), "other": OTHERS["learning rate"]}.items():
        assert continuation(tmp_path / f"1 {kind}", third, make()) == continuation(
            tmp_path / f"2 {kind}", third, make()
        )


def facts(module: Any) -> str:
    trainer: Any = SimpleNamespace(lightning_module=module, precision="32-true", optimizers=[], lr_scheduler_configs=[])
    return facts_of(trainer)


def sharded(module: Any) -> Any:
    """With the classes that ``fully_shard`` gives; tests/ranks/test_sharded.py goes on with really sharded ones."""
    for part in [module, *(one for one in module.modules() if isinstance(one, nn.Linear))]:
        kind = type(part)
        part.__class__ = type(f"FSDP{kind.__name__}", (FSDPModule, kind), {})
    return module


def test_where_the_parameters_are_is_no_other_mechanism() -> None:
    assert facts(sharded(regressor())) == facts(regressor())
    assert facts(sharded(Halved())) == facts(Halved()) != facts(regressor())
    thicker = regressor()
    thicker.net.append(nn.Dropout(0.5))
    assert facts(sharded(thicker)) != facts(sharded(regressor()))


def by_hand_and_then_automatically(folder: Path) -> list[str]:
    """One key for both, as if nothing of the change could be seen: only the numbers of the samples keep them apart."""
    one_key = patched((checkpoint_module, "course_of", lambda *_, **__: ""))
    with one_key, recorded(folder):
        life(folder, steps=4, module=ByHand(lr=0.1), seed=5)
        (last,) = (folder / "ckpt").glob("step=4*.ckpt")
        life(folder, last, steps=10, module=regressor(lr=0.1), seed=5)
    return [line["noise"] for line in releases(folder)]


@pytest.mark.filterwarnings("ignore:An interrupted fit took")
def test_automatic_steps_after_steps_by_hand_have_numbers_of_their_own(tmp_path: Path) -> None:
    noise = by_hand_and_then_automatically(tmp_path / "right")
    assert len(noise) >= 8
    assert len(set(noise)) == len(noise)

    release = OpenStep.release

    def by_charges(self: OpenStep, *rest: Any, **options: Any) -> Any:
        planned = self.run.planned
        if planned.module.automatic_optimization:
            self = replace(self, sample=replace(self.sample, step=planned.ledger.steps))
        return release(self, *rest, **options)

    with patched((OpenStep, "release", by_charges)):
        noise = by_hand_and_then_automatically(tmp_path / "wrong")
    assert len(set(noise)) < len(noise)
