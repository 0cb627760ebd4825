"""``reload_dataloaders_every_n_epochs``: what is looked at before the first step is looked at for every loader."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader

from lightning_dp import DifferentialPrivacy, PreflightError
from tests.conftest import Regressor, loader, regression_data, regressor, trainer

AN_EPOCH = 4


class Reloading(Regressor):
    """Its loader may be another at each epoch."""

    def __init__(self, make: Callable[[int], DataLoader[Any]]) -> None:
        super().__init__()
        self.make, self.workers, self.others = make, [], set(multiprocessing.active_children())

    def train_dataloader(self) -> DataLoader[Any]:
        return self.make(self.current_epoch)

    def on_train_batch_end(self, *_: Any) -> None:
        self.workers.append(len(self.started()))

    def started(self) -> set[Any]:
        """The processes that this module's loaders have started: one that another test has left is not among them."""
        return set(multiprocessing.active_children()) - self.others


def fit_with(module: L.LightningModule, *callbacks: L.Callback, **options: Any) -> DifferentialPrivacy:
    private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-4)
    settings = {"max_steps": -1, "max_epochs": 3, "reload_dataloaders_every_n_epochs": 1, **options}
    trainer(private, *callbacks, **settings).fit(module)
    return private


def plain_rows(rows: list[Any]) -> Any:
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def standardised(rows: list[Any]) -> Any:
    inputs, targets = plain_rows(rows)
    return inputs - inputs.mean(0), targets


@pytest.mark.parametrize("workers", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
def test_the_workers_of_a_loader_end_with_it(workers: dict[str, Any]) -> None:
    module = Reloading(lambda epoch: loader(**workers))
    assert fit_with(module).ledger.steps == 3 * AN_EPOCH
    assert len(module.workers) == 3 * AN_EPOCH
    assert max(module.workers) <= 2
    assert not module.started()


def test_a_collate_fn_that_mixes_from_the_second_loader_on_is_refused_there() -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-4)
    fit = trainer(private, max_steps=-1, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(PreflightError, match="collate_fn mixes examples"):
        fit.fit(Reloading(lambda epoch: loader(collate_fn=standardised if epoch else plain_rows)))
    assert private.ledger is not None
    assert private.ledger.steps == AN_EPOCH


@pytest.mark.parametrize("longer", [{"batch_size": 15}, {"drop_last": True, "batch_size": 33}])
def test_an_epoch_does_not_change_its_length_during_a_run(longer: dict[str, Any]) -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-4, expected_batch_size=16)
    fit = trainer(private, max_steps=-1, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(PreflightError, match=r"training data changed during the run: .*max_steps"):
        fit.fit(Reloading(lambda epoch: loader(**(longer if epoch else {}))))
    assert private.ledger is not None
    assert private.ledger.steps == AN_EPOCH


class Sets(L.Callback):
    """Changes the Trainer in the second epoch, as a schedule of somebody's own might."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        self.change = change

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            self.change(trainer)


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "accumulation": (lambda fit: setattr(fit, "accumulate_grad_batches", 2), "accumulate_grad_batches=2: expected 1"),
    "clipping": (
        lambda fit: setattr(fit, "gradient_clip_val", 0.5),
        r"gradient_clip_val=0\.5, an argument of the Trainer: expected None or 0",
    ),
    "a scheduler": (
        lambda fit: fit.callbacks.append(GradientAccumulationScheduler({0: 1})),
        "GradientAccumulationScheduler",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_the_trainer_must_not_do_it_must_not_do_later_either(name: str) -> None:
    change, text = CHANGES[name]
    private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-4)
    with pytest.raises(PreflightError, match=text):
        trainer(private, Sets(change), max_steps=-1, max_epochs=3).fit(regressor(), loader(regression_data()))
    assert private.ledger is not None
    assert private.ledger.steps == AN_EPOCH
