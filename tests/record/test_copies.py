"""Copies and pickles made in mid-fit: as without privacy for the module, and harmless for the original."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics import MeanSquaredError

from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy
from lightning_dp.batches.transforms import Flip
from lightning_dp.mechanism.instead import Instead
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.record.journal import FILE_NAME
from tests.conftest import Notes, Regressor, loader, regressor, trainer
from tests.guarantees.mutations import patched

pytestmark = pytest.mark.filterwarnings("ignore:An interrupted fit took")


class WithHooks(Regressor):
    """Its hook counts on which module it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.moved, self.error = Notes(), MeanSquaredError()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        predicted = self.net(batch[0]).squeeze(-1)
        self.error.update(predicted, batch[1])
        loss = nn.functional.mse_loss(predicted, batch[1])
        self.log("train/loss", loss)
        return loss

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.moved.append(None)
        return batch


class OfImages(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step((batch[0].flatten(1), batch[1]), batch_idx)


def by_torch(module: Any) -> Any:
    content = io.BytesIO()
    torch.save(module, content)
    content.seek(0)
    return torch.load(content, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "torch.save": by_torch,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}


class At(L.Callback):
    """Does something in the middle of training."""

    def __init__(self, act: Callable[[L.Trainer, Any], None], step: int = 2) -> None:
        self.act, self.step = act, step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.act(trainer, pl_module)


def private(**options: Any) -> DifferentialPrivacy:
    return DifferentialPrivacy(**{"noise_multiplier": 1.0, "delta": 1e-3, "engine": "vmap", **options})


@pytest.mark.parametrize("how", list(COPIES))
def test_a_module_copied_in_mid_fit_is_one_of_its_own(how: str) -> None:
    made: list[Any] = []

    def act(trainer: L.Trainer, module: Any) -> None:
        twin = COPIES[how](module)
        made.append(twin)
        before = len(module.moved)
        twin._on_before_batch_transfer("a batch")
        assert (len(twin.moved) - before, len(module.moved)) == (1, before)
        twice = COPIES[how](twin)  # and so is a copy of the copy
        twice._on_before_batch_transfer("a batch")
        assert (len(twice.moved) - before, len(twin.moved) - before) == (2, 1)

    module = WithHooks()
    trainer(private(), At(act), max_steps=3).fit(module, loader())
    (twin,) = made
    assert len(module.moved) > 0
    assert not any(isinstance(value, Instead) for value in vars(module).values())
    other = private()
    trainer(other, max_steps=2).fit(twin, loader())  # a module like any other
    assert other.ledger is not None
    assert other.ledger.steps == 2


def test_what_training_step_copies_is_one_of_its_own() -> None:
    """Inside a pass, log and the metrics' methods are replaced too: copies do not write into the recording."""
    seen = Notes()

    class Copies(WithHooks):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append((copy.deepcopy(self.error), pickle.loads(pickle.dumps(self.error))))
            return super().training_step(batch, batch_idx)

    trainer(private(engine="loop"), max_steps=1).fit(Copies(), loader())  # torch copies no tensor under vmap
    for twin in seen[-1]:
        assert not any(isinstance(value, Instead) for value in vars(twin).values())
        twin.update(torch.tensor([1.0]), torch.tensor([3.0]))
        assert float(twin.compute()) == pytest.approx(4.0)


def test_views_of_a_plain_run_do_not_travel() -> None:
    def act(trainer: L.Trainer, module: Any) -> None:
        twin = by_torch(module)
        assert twin.training_step.__func__ is type(module).training_step
        assert copy.deepcopy(module).training_step.__self__ is not module

    data = TensorDataset(torch.zeros(8, 1, 4, 4), torch.zeros(8))
    trainer(AugmentationMultiplicity(2, Flip()), At(act), max_steps=3).fit(OfImages(features=16), loader(data, 4))


def test_a_copy_of_the_callback_leaves_the_journal_to_the_original(tmp_path: Path) -> None:
    copies: list[DifferentialPrivacy] = []
    keys: list[bytes] = []

    def act(trainer: L.Trainer, module: Any) -> None:
        content = pickle.dumps(callback)
        assert keys
        assert not any(key in content or key.hex().encode() in content for key in keys)
        for one in (copy.deepcopy(callback), pickle.loads(content)):
            assert one.ledger is not None
            assert (one.ledger.witness, one._account._journal, one._account._to_parent) == (None, None, None)
            one.ledger.charge()  # a step of the copy's own, which nobody writes down
            one.on_exception(trainer, module, RuntimeError())  # closes what it has, which is nothing
            copies.append(one)
        journals = copy.deepcopy(callback._account._journal)
        assert journals is not None
        journals.record(40)
        journals.close()

    derive = RandomKey.derive

    def remember(self: RandomKey, *args: Any, **options: Any) -> bytes:
        keys.append(self.reveal())
        return derive(self, *args, **options)

    callback = private()
    with patched((RandomKey, "derive", remember)):
        trainer(callback, At(act), max_steps=4, default_root_dir=tmp_path).fit(regressor(), loader())
    assert callback.ledger is not None
    assert callback.ledger.steps == 4
    assert json.loads((tmp_path / FILE_NAME).read_text().splitlines()[0])["steps"] == 4
    assert json.loads((tmp_path / "privacy.json").read_text())["steps"] == 4
    assert not (tmp_path / "privacy-2.json").exists()
    for one in copies:
        trainer(one, max_steps=1, default_root_dir=tmp_path).fit(regressor(), loader())
        assert one.ledger is not None
        assert one.ledger.steps == 2 + 1 + 1
    assert json.loads((tmp_path / "privacy.json").read_text())["steps"] == 4
