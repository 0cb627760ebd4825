"""State that a step can read follows from nobody's data: put back, refused with the line, or found on a stand-in as well."""

from __future__ import annotations

import copy
import random
from collections import Counter, deque
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DifferentialPrivacy
from lightning_dp.errors import PreflightError
from lightning_dp.mechanism.same import same
from tests.conftest import Regressor, loader, trainer

SEEN: list[float] = []
TABLE = torch.zeros(3)


class Watching(Regressor):
    """Adds to its loss what it can read of earlier examples, which must always be nothing."""

    shared: Counter[str] = Counter()
    found: list[float] = []  # of the class on purpose: a test empties it

    def __init__(self) -> None:
        super().__init__()
        self.helper = SimpleNamespace(count=0, deep={"queue": deque([0.0], maxlen=4)})
        self.draws = random.Random(0)
        self.numbers = np.random.default_rng(0)
        self.seen: Counter[str] = Counter()
        self.order: list[Any] = [[], {"a": [1]}]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        read = [
            len(SEEN),
            self.helper.count,
            len(self.helper.deep["queue"]) - 1,
            self.seen["x"],
            Watching.shared["x"],
            len(self.order[1]["a"]) - 1,
        ]
        record.append(sum(read))
        drawn.append((self.draws.random(), float(self.numbers.random())))
        SEEN.append(1.0)
        self.helper.count += 1
        self.helper.deep["queue"].append(1.0)
        self.seen["x"] += 1
        Watching.shared["x"] += 1
        self.order[1]["a"].append(2)
        return super().training_step(batch, batch_idx)


record: list[int] = []
drawn: list[tuple[float, float]] = []


@pytest.mark.filterwarnings("ignore:training_step changes")
@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
def test_what_one_pass_leaves_no_other_finds(engine: Any) -> None:
    record.clear()
    drawn.clear()
    private = DifferentialPrivacy(noise_multiplier=1.0, engine=engine)
    trainer(private, max_steps=3).fit(Watching(), loader())
    # ``record`` and ``drawn`` are globals that training_step names, so they are put back as well: nothing is left in them
    assert not record
    assert not drawn
    assert not SEEN
    assert not Watching.shared


def test_it_is_said_once_what_is_put_back() -> None:
    with pytest.warns(UserWarning, match=r"training_step changes .*put back after each example"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=2).fit(Watching(), loader())


class _Writes(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.table: dict[str, Any] = {"deep": [torch.zeros(2)], "array": np.zeros(2)}
        self.plain = SimpleNamespace(mean=torch.zeros(()))
        self.embedding = nn.Embedding(4, 2, max_norm=0.01)
        self.register_buffer("center", torch.zeros(()))

    def write(self, batch: Any) -> None:
        raise NotImplementedError  # of each case

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step >= 1:  # not where anybody looks before training
            self.write(batch)
        return super().training_step(batch, batch_idx)


class _Deep(_Writes):
    def write(self, batch: Any) -> None:
        self.table["deep"][0].data.add_(1.0)


class _Array(_Writes):
    def write(self, batch: Any) -> None:
        self.table["array"] += 1.0


class _OfAnObject(_Writes):
    def write(self, batch: Any) -> None:
        self.plain.mean.data.fill_(2.0)


class _Global(_Writes):
    def write(self, batch: Any) -> None:
        TABLE.data.add_(1.0)


class _Buffer(_Writes):
    def write(self, batch: Any) -> None:
        self.center.data.add_(1.0)


class _MaxNorm(_Writes):
    def write(self, batch: Any) -> None:
        self.embedding(torch.tensor([1]))


@pytest.mark.parametrize("case", [_Deep, _Array, _OfAnObject, _Global, _Buffer, _MaxNorm])
def test_a_write_in_a_later_step_is_refused_before_its_release(case: type[_Writes]) -> None:
    private, module = DifferentialPrivacy(noise_multiplier=1.0, engine="loop"), case()
    before = copy.deepcopy((module.table, module.plain.mean, module.center, TABLE))
    with pytest.raises(PreflightError, match=r"training_step (writes into|changes the buffers)"):
        trainer(private, max_steps=3).fit(module, loader())
    # nothing of the refused step is left, for whoever saves the module
    assert same(before, (module.table, module.plain.mean, module.center, TABLE))
    assert float(module.embedding.weight[1].detach().norm()) > 0.02
    assert private.ledger is not None
    assert private.ledger.steps == 1


class Teacher(Regressor):
    """A teacher that follows the released weights, moved where our own errors send people."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + (self.net(batch[0]) - self.teacher(batch[0])).square().mean()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.calls += 1
        self.log("again", outputs["loss"])
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                old.mul_(0.5).add_(new, alpha=0.5)


def test_a_teacher_that_follows_released_weights_moves_once_a_step() -> None:
    module = Teacher()
    start = copy.deepcopy(module.net)
    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=1).fit(module, loader())
    assert module.calls == 1
    for old, now, teacher in zip(start.parameters(), module.net.parameters(), module.teacher.parameters(), strict=True):
        torch.testing.assert_close(teacher, (old + now) / 2)


class _Center(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.center = torch.zeros(())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx) + 0 * self.center, "z": self.net(batch[0]).detach()}

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        self.center = 0.5 * self.center + 0.5 * outputs["z"].mean()


class _Weighted(Regressor):
    weight = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("mine", loss, on_epoch=True, on_step=False)
        return loss * self.weight

    def on_train_epoch_end(self) -> None:
        self.weight = 1 / float(self.trainer.callback_metrics["mine"])


class _Rate(Regressor):
    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        self.trainer.optimizers[0].param_groups[0]["lr"] = float(outputs["loss"])


class _FillsWhatCameLater(Regressor):
    """A list that no hook has made, and that was not there when hooks were first looked at."""

    kept: list[float] | None = None

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        if self.trainer.global_step == 2:
            self.kept = []
        super().optimizer_step(*args, **options)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (1 + sum(self.kept or []))

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        if self.trainer.global_step > 4:
            assert self.kept is not None
            self.kept.append(float(outputs["loss"]))


class _Pushes(L.Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.weight = sum(self.losses)


@pytest.mark.parametrize(
    ("case", "callbacks", "what"),
    [
        (_Center, [], "center"),
        (_Weighted, [], "weight"),
        (_Rate, [], "lr|param_groups"),
        (_FillsWhatCameLater, [], "kept"),
        (_Weighted, [_Pushes], "weight"),
    ],
)
def test_a_hook_that_carries_private_values_into_state_is_refused(case: Any, callbacks: list[Any], what: str) -> None:
    module, private = case(), DifferentialPrivacy(noise_multiplier=1.0)
    if callbacks:
        module.on_train_epoch_end = L.LightningModule.on_train_epoch_end.__get__(module)
    with pytest.raises(PreflightError, match=rf"changes .*({what}).* private examples.*test_state_does_not_cross\.py"):
        trainer(private, *[one() for one in callbacks], max_steps=8).fit(module, loader())


def test_what_is_declared_public_may_change_and_the_statement_says_so() -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0, public_state=["center"])
    module = _Center()
    trainer(private, max_steps=2).fit(module, loader())
    assert module.center != 0
    assert any("declares center public" in caveat for caveat in private.statement().caveats)
    with pytest.raises(ValueError, match="public_state='center': expected a list"):
        DifferentialPrivacy(noise_multiplier=1.0, public_state="center")


class _FailsHalfWay(_Center):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        self.mean.add_(outputs["z"].mean())
        self.center = outputs["loss"]
        self.trainer.should_stop = True
        raise RuntimeError("half-way")


def test_a_hook_that_fails_half_way_leaves_nothing() -> None:
    module, fit = _FailsHalfWay(), trainer(DifferentialPrivacy(noise_multiplier=1.0))
    with pytest.raises(RuntimeError, match="half-way"):
        fit.fit(module, loader())
    assert module.mean == 0
    assert module.center == 0
    assert not fit.should_stop


class _ReadsMetrics(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx:
            float(self.trainer.callback_metrics["mine"])
        loss = super().training_step(batch, batch_idx)
        self.log("mine", loss)
        return loss


class _ReadsData(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        data: Any = self.trainer.train_dataloader
        return super().training_step(batch, batch_idx) + 0 * data.dataset[0][0].sum()


@pytest.mark.parametrize("case", [_ReadsMetrics, _ReadsData])
def test_logged_numbers_and_the_data_set_do_not_come_back(case: Any) -> None:
    with pytest.raises(PreflightError, match=r"reads .*test_state_does_not_cross\.py"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=3).fit(case(), loader())


class _Reading(torch.optim.SGD):
    """Keeps what its closure returns, as an optimizer that chooses its rate by the loss would."""

    def step(self, closure: Any = None) -> Any:
        read.append(float(closure()))
        return super().step()


read: list[float] = []


def test_an_optimizer_gets_no_private_number_from_its_closure() -> None:
    class Polyak(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("mine", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return _Reading(self.parameters(), lr=0.1)

    read.clear()
    fit = trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=2)
    fit.fit(Polyak(), loader())
    assert read == [0.0, 0.0]
    assert fit.callback_metrics["mine"] > 0


def test_a_run_does_not_end_when_an_example_is_seen() -> None:
    class Stops(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step == 1:
                raise StopIteration
            return super().training_step(batch, batch_idx)

    private = DifferentialPrivacy(noise_multiplier=1.0, engine="loop")
    with pytest.raises(PreflightError, match=r"StopIteration .*test_state_does_not_cross\.py"):
        trainer(private, max_steps=3).fit(Stops(), loader())
    assert private.ledger is not None
    assert private.ledger.steps == 1


@pytest.mark.parametrize("given", [{"clip_norm": 1e-24}, {"clip_norm": 1e25}, {"automatic_gamma": 1e-30}])
def test_numbers_that_float32_norms_do_not_hold_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(given))}=.*expected .*float32"):
        DifferentialPrivacy(noise_multiplier=1.0, **given)
