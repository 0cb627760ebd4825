"""An epoch has as many steps as Lightning would take batches without privacy, and whoever counts on that counts right."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.data_connector import _parse_num_batches
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader, DistributedSampler

from lightning_dp import DifferentialPrivacy, PreflightError
from lightning_dp.loading.loader import PoissonLoader
from lightning_dp.look.epochs import Progress, limited
from lightning_dp.mechanism.randomness import RandomKey
from tests.conftest import Regressor, loader, regression_data, regressor, trainer
from tests.mechanism.laws import plan

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Data(L.LightningDataModule):
    def __init__(self, examples: int, batch_size: int, drop_last: bool) -> None:
        super().__init__()
        self.examples, self.options = examples, {"batch_size": batch_size, "drop_last": drop_last}

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(regression_data(self.examples), **self.options)


class Scheduled(Regressor):
    """A schedule built as people build it: on the length of the loader, before anything is trained."""

    def configure_optimizers(self) -> Any:
        mine = torch.optim.SGD(self.parameters(), lr=0.1)
        datamodule = self.trainer.datamodule
        self.planned = max(1, len(datamodule.train_dataloader()) * (self.trainer.max_epochs or 1))
        self.estimated = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(mine, 0.1, total_steps=self.planned)
        return {"optimizer": mine, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def quiet_trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    return trainer(*callbacks, **{"max_steps": -1, "max_epochs": 2, **options})


@settings(max_examples=6)
@given(
    examples=st.integers(3, 40),
    batch_size=st.integers(1, 40),
    drop_last=st.booleans(),
    limit=st.integers(1, 5) | st.floats(0.5, 1.0),
)
def test_a_run_takes_the_steps_that_it_would_take_without_privacy(
    examples: int, batch_size: int, drop_last: bool, limit: int | float
) -> None:
    assume(batch_size <= examples and limited(len(loader(regression_data(examples), batch_size)), limit) > 0)
    steps, callback = [], DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3)
    for callbacks in ([], [callback]):
        module, data = Scheduled(), Data(examples, batch_size, drop_last)
        fit = quiet_trainer(*callbacks, limit_train_batches=limit)
        fit.fit(module, datamodule=data)
        assert fit.global_step == module.estimated
        if isinstance(limit, float) and limit == 1.0:
            assert fit.global_step == module.planned
        steps.append((fit.global_step, fit.num_training_batches, len(fit.train_dataloader), fit.current_epoch))
    assert steps[0] == steps[1]
    assert callback.plan is not None
    assert callback.ledger is not None
    assert callback.plan.steps == callback.ledger.steps == steps[0][0]


@pytest.mark.parametrize(("examples", "batch_size", "drop_last", "steps"), [
    (100, 8, False, 13), (54, 8, True, 6), (60, 8, True, 7), (20, 16, False, 2), (31, 16, True, 1),
])  # fmt: skip
def test_a_schedule_built_on_the_length_of_the_loader_ends_with_the_run(
    examples: int, batch_size: int, drop_last: bool, steps: int
) -> None:
    module = Scheduled()
    fit = quiet_trainer(DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3), max_epochs=4)
    fit.fit(module, datamodule=Data(examples, batch_size, drop_last))
    assert fit.global_step == module.planned == module.estimated == 4 * steps


@given(
    examples=st.integers(1, 100),
    batch_size=st.integers(1, 20),
    drop_last=st.booleans(),
    ranks=st.integers(1, 5),
    limit=st.integers(1, 9) | st.floats(0.01, 1.0),
    shuffle=st.booleans(),
)
def test_on_several_ranks_an_epoch_is_that_of_lightnings_distributed_sampler(
    examples: int, batch_size: int, drop_last: bool, ranks: int, limit: int | float, shuffle: bool
) -> None:
    """Each rank's loader is given to the strategy with its part of the data, which is ceil(N / ranks)."""
    lengths = set()
    for rank in range(ranks):
        data = regression_data(examples)
        sampler = DistributedSampler(data, num_replicas=ranks, rank=rank, shuffle=shuffle)
        given_loader = loader(data, batch_size, drop_last=drop_last, sampler=sampler)
        expected = min(batch_size * ranks, examples)
        private = PoissonLoader(
            given_loader, plan(dataset_size=examples, expected_batch_size=expected), RandomKey.from_seed(1),
            rank=rank, world_size=ranks, physical_batch_size=4, next_step=lambda: 0,
        )  # fmt: skip
        lengths.add(len(private))
    of_each = math.ceil(examples / ranks)
    (length,) = lengths
    assert length == (of_each // batch_size if drop_last else math.ceil(of_each / batch_size))
    if limited(length, limit) > 0:
        assert limited(length, limit) == _parse_num_batches(RunningStage.TRAINING, length, limit)


def test_an_epoch_does_not_depend_on_what_a_step_is() -> None:
    """Only the loader and the Trainer count steps; a warning says where an epoch is not what it is taken for."""
    for arguments, warned in (
        ({"expected_batch_size": 10}, False),
        ({"dataset_size": 70}, False),
        ({"expected_batch_size": 64}, True),
        ({"expected_batch_size": 1}, True),
        ({"privacy_unit": [index // 4 for index in range(64)]}, True),
        ({"simulate": 8}, False),
        ({"max_batch_size": 60}, False),
        ({"batch_axis": 0}, False),
    ):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            fit = quiet_trainer(DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, **arguments))
            fit.fit(regressor(), loader())
        assert fit.global_step == 2 * len(loader()) == 8
        said = [str(warning.message) for warning in told if "an epoch is" in str(warning.message)]
        assert len(said) == warned, arguments
    remedy = "an epoch is len(train_dataloader) = 4 steps, in which each user is drawn 4 times on average"
    fit = quiet_trainer(DifferentialPrivacy(noise_multiplier=1.0, privacy_unit=[i // 4 for i in range(64)]))
    with pytest.warns(UserWarning, match="max_epochs=2 with expected_batch_size=16.*batch_size=64") as all_told:
        fit.fit(regressor(), loader())
    assert any(remedy in str(one.message) for one in all_told)


def test_nothing_is_said_where_steps_end_the_run() -> None:
    for options in ({"max_steps": 3, "max_epochs": -1}, {"max_steps": 3, "max_epochs": 9}):
        trainer(DifferentialPrivacy(noise_multiplier=1.0, expected_batch_size=64), **options).fit(regressor(), loader())


def test_a_loader_without_a_batch_is_refused() -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0, expected_batch_size=16)
    with pytest.raises(
        PreflightError, match=r"drop_last=True with batch_size=65 .*64 examples: expected .*drop_last=False"
    ):
        trainer(private).fit(regressor(), loader(batch_size=65, drop_last=True))


WHEN = {
    "in the middle of an epoch": {"every_n_train_steps": 5},
    "at the end of an epoch, by steps": {"every_n_train_steps": 4},
    "at the end of an epoch": {"every_n_epochs": 1},
    "after validation": {"monitor": "val/loss"},
}


@pytest.mark.parametrize("when", WHEN)
def test_a_resumed_run_ends_where_it_would_have_ended(when: str, tmp_path: Path) -> None:
    """The schedule that was saved goes on to its last step, and the ledger plans the steps that are left."""
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **WHEN[when])
    data = Data(31, 8, False)
    fit = quiet_trainer(
        DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3), saving, enable_checkpointing=True, max_epochs=3
    )
    data.val_dataloader = lambda: loader()
    fit.fit(Scheduled(), datamodule=data)
    assert fit.global_step == 12
    for path in sorted(tmp_path.glob("*.ckpt")):
        private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3)
        resumed = quiet_trainer(private, max_epochs=3)
        resumed.fit(Scheduled(), datamodule=data, ckpt_path=path)
        assert private.plan is not None
        assert private.ledger is not None
        assert resumed.global_step == private.plan.steps == private.ledger.steps == 12, path


def test_a_second_fit_takes_the_epochs_that_are_left() -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3)
    fit = quiet_trainer(private, max_epochs=1)
    fit.fit(regressor(), loader())
    fit.fit_loop.max_epochs = 3
    fit.fit(regressor(), loader())
    assert private.plan is not None
    assert private.ledger is not None
    assert private.plan.steps == private.ledger.steps == fit.global_step == 12


@pytest.mark.parametrize("before", [3, 5])
@pytest.mark.parametrize("saved", [{"every_n_train_steps": 2}, {"every_n_train_steps": 5}])
def test_a_resume_with_longer_or_shorter_epochs_is_planned_as_lightning_takes_it(
    before: int, saved: dict[str, int], tmp_path: Path
) -> None:
    """As after an update from versions in which an epoch was round(1/q) steps: 4 batches now, 3 to 5 before."""
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{step}", **saved)
    private = {"noise_multiplier": 1.0, "delta": 1e-3, "expected_batch_size": 16, "dataset_size": 64}
    fit = quiet_trainer(DifferentialPrivacy(**private), saving, enable_checkpointing=True)
    fit.fit(regressor(), loader(regression_data(16 * before)))
    for path in sorted(tmp_path.glob("*.ckpt")):
        (tmp_path / "privacy.journal").unlink(missing_ok=True)
        callback = DifferentialPrivacy(**private)
        resumed = quiet_trainer(callback, max_epochs=4)
        resumed.fit(regressor(), loader(), ckpt_path=path)
        assert callback.plan is not None
        assert callback.ledger is not None
        assert callback.plan.steps == callback.ledger.steps, path


def test_a_checkpoint_without_loops_has_done_nothing_of_an_epoch() -> None:
    assert Progress.in_checkpoint({"global_step": 14, "epoch": 2}) == Progress(14, 2, 0)


@pytest.mark.filterwarnings("ignore:`max_epochs` was not set. Setting it to 1000 epochs")
@pytest.mark.parametrize("given", [{"epsilon": 8.0}, {"noise_multiplier": 1.0}], ids=["epsilon", "noise_multiplier"])
def test_a_trainer_that_was_told_no_end_says_what_was_planned(given: dict[str, float]) -> None:
    class Ended(Exception):  # noqa: N818 (it is no error)
        pass

    class Ends(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            raise Ended

    private = DifferentialPrivacy(**given)
    fit = trainer(private, Ends(), max_steps=-1, max_epochs=None)
    with pytest.warns(UserWarning, match=r"max_epochs=1000, which Lightning sets") as told, pytest.raises(Ended):
        fit.fit(regressor(), loader())
    assert private.plan is not None
    assert private.plan.steps == 4000
    (said,) = [str(one.message) for one in told if "max_epochs=1000" in str(one.message)]
    assert "T = 4000 steps" in said
    assert f"σ = {private.plan.noise_multiplier:.4g}" in said
    assert "max_steps=4000" in said
    Path("privacy.json").unlink(missing_ok=True)
    with pytest.raises(Ended):  # the way out: without a warning
        trainer(DifferentialPrivacy(**given), Ends(), max_steps=4000, max_epochs=None).fit(regressor(), loader())
