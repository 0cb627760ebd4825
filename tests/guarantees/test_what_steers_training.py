"""Rates, counts and ends of training follow from nobody's data: set in training_step they are refused, in hooks compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from lightning_dp import DifferentialPrivacy
from lightning_dp.errors import PreflightError
from tests.conftest import Notes, Regressor, loader, trainer

HERE = r"test_what_steers_training\.py"


class _Steers(Regressor):
    """Does something to the course of training in its second step, which no look before training comes to."""

    def __init__(self, steer: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        self.steer = steer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step >= 1:
            self.steer(self, loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 100)]


def _rate(module: Any, loss: Tensor) -> None:
    module.optimizers().param_groups[0]["lr"] = loss


def _rate_of_the_trainer(module: Any, loss: Tensor) -> None:
    module.trainer.optimizers[0].param_groups[0]["lr"] = float(loss)


def _scheduler(module: Any, loss: Tensor) -> None:
    module.lr_schedulers().step()


def _plateau(module: Any, loss: Tensor) -> None:
    own = torch.optim.lr_scheduler.ReduceLROnPlateau(module.trainer.optimizers[0], patience=0)
    for metric in (0.0, float(loss) + 1, float(loss) + 2):
        own.step(metric)


def _momentum(module: Any, loss: Tensor) -> None:
    for kept in module.trainer.optimizers[0].state.values():
        kept["momentum_buffer"].data.mul_(2.0)


def _other_momentum(module: Any, loss: Tensor) -> None:
    for kept in module.trainer.optimizers[0].state.values():
        kept["momentum_buffer"] = torch.zeros_like(kept["momentum_buffer"])


def _step(module: Any, loss: Tensor) -> None:
    module.optimizers().step()


def _stop(module: Any, loss: Tensor) -> None:
    module.trainer.should_stop = True


def _end(module: Any, loss: Tensor) -> None:
    module.trainer.fit_loop.epoch_loop.max_steps = 2


def _count(module: Any, loss: Tensor) -> None:
    module.trainer.fit_loop.epoch_progress.current.completed += 1


def _shelf(module: Any, loss: Tensor) -> None:
    module.trainer.center = loss


def _keeps(module: Any, value: float) -> Callable[..., None]:
    return lambda *_, **__: setattr(module, "kept", value)


def _hook_of_a_callback(module: Any, loss: Tensor) -> None:
    module.trainer.callbacks[-1].on_train_epoch_end = _keeps(module, float(loss))


def _method_of_the_optimizer(module: Any, loss: Tensor) -> None:
    module.trainer.optimizers[0].zero_grad = _keeps(module, float(loss))


def _method_of_the_strategy(module: Any, loss: Tensor) -> None:
    module.trainer.strategy.batch_to_device = _keeps(module, float(loss))


def _hook_of_the_optimizer(module: Any, loss: Tensor) -> None:
    module.trainer.optimizers[0].register_step_post_hook(_keeps(module, float(loss)))


def _another_callback(module: Any, loss: Tensor) -> None:
    module.trainer.callbacks.append(L.Callback())


@pytest.mark.parametrize("engine", ["auto", "loop"])
@pytest.mark.parametrize(
    ("steer", "what"),
    [
        (_hook_of_a_callback, "sets a method of"),
        (_method_of_the_optimizer, "sets a method of optimizer 0"),
        (_method_of_the_strategy, "sets a method of the strategy"),
        (_hook_of_the_optimizer, r"sets optimizer 0, _optimizer_step_post_hooks\["),
        (_another_callback, "sets the Trainer's callbacks"),
        (_rate, r"sets optimizer 0, param_groups\[0\]\['lr'\]"),
        (_rate_of_the_trainer, r"sets optimizer 0, param_groups\[0\]\['lr'\]"),
        (_scheduler, "sets scheduler 0, last_epoch"),
        (_plateau, "sets optimizer 0, param_groups"),
        (_momentum, "writes into the tensor optimizer 0, state 0"),
        (_other_momentum, "sets optimizer 0, state"),
        (_step, r"optimizer\.step\(\) in training_step"),
        (_stop, "sets the Trainer's should_stop"),
        (_end, "sets the epoch loop's max_steps"),
        (_count, "sets the fit loop's epoch_progress.current's completed"),
        (_shelf, "sets the Trainer's center"),
    ],
)
def test_a_step_that_steers_training_is_refused_before_its_release(steer: Any, what: str, engine: Any) -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0, engine=engine)
    fit = trainer(private, max_steps=3)
    line = "" if steer is _momentum else rf" \(.*{HERE}:\d+ in {steer.__name__}\)"
    with pytest.raises(PreflightError, match=what + ".*" + line):
        fit.fit(_Steers(steer), loader())
    assert private.ledger is not None
    assert private.ledger.steps == 1
    assert fit.optimizers[0].param_groups[0]["lr"] == 0.5
    assert not fit.should_stop


class _TakesAPlace(Regressor):
    """Puts a function that knows an example where Lightning, or anybody, calls a method of the module."""

    def __init__(self, name: str, value: Any = None) -> None:
        super().__init__()
        self.name, self.value, self.carried = name, value, 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if self.global_step >= 1:
            setattr(self, self.name, self.value or _keeps(self, 1.0))
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
@pytest.mark.parametrize(
    "name", ["on_train_batch_end", "on_before_zero_grad", "configure_gradient_clipping", "forward"]
)
def test_a_step_that_puts_a_function_in_the_place_of_a_method_is_refused(name: str, engine: Any) -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0, engine=engine)
    module = _TakesAPlace(name)
    with pytest.raises(PreflightError, match=f"in the place of the method self.{name}"):
        trainer(private, max_steps=3).fit(module, loader())
    assert private.ledger is not None
    assert private.ledger.steps == 1
    assert name not in module.__dict__


class _Callback(L.Callback):
    def __init__(self, does: Callable[[Any, Any], object]) -> None:
        self.does = does

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.does(trainer, outputs["loss"])


def _when_low(fit: Any, loss: Tensor) -> None:
    if fit.global_step >= 2 and loss < 50:  # of a loss of zero it would say the same
        fit.should_stop = True


def _by_metric(fit: Any, loss: Tensor) -> None:
    fit.should_stop = bool(fit.callback_metrics["train/loss"] < 50)


def _on_a_shelf(fit: Any, loss: Tensor) -> None:
    fit.center = float(loss)


def _in_place_of_a_method(fit: Any, loss: Tensor) -> None:
    fit.optimizers[0].zero_grad = _keeps(fit, float(loss))


def _end_by_loss(fit: Any, loss: Tensor) -> None:
    fit.fit_loop.max_epochs = 1 if loss > 0 else 2


@pytest.mark.parametrize(
    ("does", "what"),
    [
        (_when_low, "should_stop"),
        (_by_metric, "should_stop"),
        (_on_a_shelf, "center"),
        (_end_by_loss, "max_epochs"),
        (_in_place_of_a_method, "a method of optimizer 0"),
    ],
)
def test_a_hook_that_steers_training_by_private_values_is_refused(does: Any, what: str) -> None:
    with pytest.raises(PreflightError, match=rf"_Callback\.on_train_batch_end changes .*{what} by what .*{HERE}"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0), _Callback(does)).fit(Regressor(), loader())


def test_a_hook_may_end_training_by_public_numbers_or_by_what_is_declared() -> None:
    def after_two(fit: Any, loss: Tensor) -> None:
        fit.should_stop = fit.global_step >= 2

    private = DifferentialPrivacy(noise_multiplier=1.0)
    trainer(private, _Callback(after_two)).fit(Regressor(), loader())
    assert private.ledger is not None
    assert private.ledger.steps == 2
    declared = DifferentialPrivacy(noise_multiplier=1.0, public_state=["the Trainer's should_stop"])
    trainer(declared, _Callback(_when_low)).fit(Regressor(), loader())
    assert declared.ledger is not None
    assert declared.ledger.steps == 2


def test_a_hook_may_save_a_checkpoint(tmp_path: Path) -> None:
    """Saving reads the loader's state and what is at work while it saves; nothing of it steers."""

    def save(fit: Any, loss: Tensor) -> None:
        fit.save_checkpoint(tmp_path / "in_a_hook.ckpt")

    trainer(DifferentialPrivacy(noise_multiplier=1.0), _Callback(save), max_steps=2).fit(Regressor(), loader())
    assert (tmp_path / "in_a_hook.ckpt").exists()


class _Keeps(L.Callback):
    """Has private numbers, as a callback may."""

    def __init__(self) -> None:
        self.losses, self.weight = [1.0], 0.5

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


class _Asks(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        kept: Any = self.trainer.callbacks[1]
        return super().training_step(batch, batch_idx) / kept.losses[-1]


class _AsksForAConstant(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        kept: Any = next(one for one in self.trainer.callbacks if isinstance(one, _Keeps))
        return super().training_step(batch, batch_idx) * kept.weight


def test_what_callbacks_keep_does_not_come_back() -> None:
    with pytest.raises(PreflightError, match=rf"reads what a callback keeps \(_Keeps\.losses\) \(.*{HERE}"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0), _Keeps()).fit(_Asks(), loader())
    kept = _Keeps()
    trainer(DifferentialPrivacy(noise_multiplier=1.0), kept, max_steps=2).fit(_AsksForAConstant(), loader())
    assert len(kept.losses) == 3


class _SkipsWhenSeen(Regressor):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        kept: Any = self.trainer.callbacks[1]
        return -1 if len(kept.losses) > 1 and kept.losses[-1] < 1e6 else None


class _SkipsByNumber(Regressor):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if batch_idx == 2 else None


def test_what_is_left_of_an_epoch_is_skipped_by_public_numbers_only() -> None:
    with pytest.raises(PreflightError, match=rf"on_train_batch_start changes which batches .*{HERE}"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0), _Keeps()).fit(_SkipsWhenSeen(), loader())
    private = DifferentialPrivacy(noise_multiplier=1.0)
    trainer(private, max_steps=4).fit(_SkipsByNumber(), loader())
    assert private.ledger is not None
    assert private.ledger.steps == 4


class _Polyak(Regressor):
    """Sets its rate by the loss that the closure returns."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        rates.append(float(optimizer_closure()))
        optimizer.step()


class _ByWhatIsLeft(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.last = super().training_step(batch, batch_idx)
        return self.last

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        rates.append(float(self.last))


rates = Notes()


def test_a_modules_own_optimizer_step_gets_no_private_number() -> None:
    rates.clear()
    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=2).fit(_Polyak(), loader())
    assert rates == [0.0, 0.0]
    with pytest.raises(PreflightError, match=rf"optimizer_step reads self\.last, .*{HERE}"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=2).fit(_ByWhatIsLeft(), loader())


class _Manual(Regressor):
    """Steps with a closure, whose loss the optimizer keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            loss = torch.nn.functional.mse_loss(self.net(batch[0]).squeeze(-1), batch[1])
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)

    def configure_optimizers(self) -> Any:
        return _Reading(self.parameters(), lr=0.0)


class _Reading(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        rates.append(float(closure().detach()))
        return super().step()


def test_under_manual_optimization_the_closure_gives_what_no_example_moves() -> None:
    found = []
    for data in (torch.utils.data.TensorDataset(torch.randn(64, 4), torch.full((64,), value)) for value in (0.0, 9.0)):
        rates.clear()
        torch.manual_seed(0)
        trainer(DifferentialPrivacy(noise_multiplier=1.0, seed=0), max_steps=2).fit(_Manual(), loader(data))
        found.append(list(rates))
    assert found[0] == found[1]
    assert len(found[0]) == 2
