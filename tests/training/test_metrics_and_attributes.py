"""What training_step logs, counts and keeps: once for the whole step, and never in the way of a later example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_dp import DifferentialPrivacy, PreflightError
from tests.conftest import Regressor, loader, regression_data, trainer, weights
from tests.nearly import assert_nearly


class Talkative(Regressor):
    """Everything a training_step says, in every way; the whole data set in every step, so that plain Lightning can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.metrics = torchmetrics.MetricCollection(
            {"mse": torchmetrics.MeanSquaredError(), "mae": torchmetrics.MeanAbsoluteError()}, prefix="train/"
        )
        self.outputs: list[Any] = []
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        predicted = self.net(batch[0]).squeeze(-1)
        loss = nn.functional.mse_loss(predicted, batch[1])
        self.log_dict(self.metrics(predicted, batch[1]), on_step=True, on_epoch=True)
        self.log("loss", loss, on_step=True, on_epoch=True, sync_dist=True, batch_size=len(batch[0]), prog_bar=True)
        self.log("sum", loss.detach(), on_step=False, on_epoch=True, reduce_fx="mean")
        self.log("float", 3.5)
        self.log("integer", 7)
        self.log("epoch", float(self.current_epoch))
        self.log("step", float(self.trainer.global_step))
        self.outputs.append({"loss": loss.detach(), "predicted": predicted.detach(), "targets": batch[1], "tag": "a"})
        self.steps += 1
        self.latest = loss.detach()
        return {"loss": loss, "predicted": predicted}

    def on_train_epoch_end(self) -> None:
        self.epoch_loss = torch.stack([one["loss"] for one in self.outputs]).mean()
        self.shapes = [tuple(one["predicted"].shape) for one in self.outputs]
        self.errors = torch.cat([(one["predicted"] - one["targets"]).abs() for one in self.outputs]).mean()
        self.tags = [one["tag"] for one in self.outputs]
        self.outputs.clear()


def talk(engine: str | None, folder: Path) -> tuple[Talkative, dict[str, float]]:
    torch.manual_seed(0)
    module, data = Talkative(), regression_data(32)
    callbacks = (
        [] if engine is None else [DifferentialPrivacy(noise_multiplier=0.0, clip_norm=float("inf"), engine=engine)]
    )
    fit = trainer(*callbacks, max_epochs=3, max_steps=-1, logger=CSVLogger(folder), log_every_n_steps=1)
    fit.fit(module, loader(data, batch_size=32))
    return module, {n: float(v) for n, v in fit.callback_metrics.items() if not n.startswith("dp/")}


@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
def test_what_is_said_and_kept_is_what_plain_lightning_says_and_keeps(engine: str, tmp_path: Path) -> None:
    (ours, logged), (plain, expected) = talk(engine, tmp_path), talk(None, tmp_path)
    assert logged.keys() == expected.keys()
    assert logged == pytest.approx(expected, rel=1e-4)
    for name in ("steps", "shapes", "tags"):
        assert getattr(ours, name) == getattr(plain, name)
    for name in ("epoch_loss", "errors", "latest"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain, name), rtol=1e-4, atol=1e-6)


def a_later_step_cannot_see_an_earlier_one() -> None:
    """With what a step left still lying there, another data set in step 1 alone would change the gradients of step 2."""
    found = []
    for first in (0.0, 5.0):

        class Remembering(Regressor):
            memory: Any = None
            shift = first

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                weight = 1.0 if self.memory is None else self.memory
                loss = super().training_step(batch, batch_idx) * weight
                self.memory = batch[0].detach().mean() + (self.shift if batch_idx == 0 else 0.0)
                return loss

            def configure_optimizers(self) -> Any:  # so that the first step itself moves nothing
                optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
                return [optimizer], [
                    {
                        "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.1 * (n > 0)),
                        "interval": "step",
                    }
                ]

        torch.manual_seed(0)
        module = Remembering()
        trainer(DifferentialPrivacy(noise_multiplier=1.0, seed=0, engine="loop"), max_steps=2).fit(module, loader())
        found.append(weights(module))
    assert_nearly(found[0], found[1], rtol=1e-5, atol=1e-6)  # float32, in another order of sums at most


def test_a_later_step_cannot_see_what_an_earlier_one_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_dp.step import attributes

    a_later_step_cannot_see_an_earlier_one()
    monkeypatch.setattr(attributes, "_hide", lambda one: {})  # the bug: it lies where it was left
    with pytest.raises((AssertionError, PreflightError)):  # other weights, or refused for what it reads
        a_later_step_cannot_see_an_earlier_one()


class _AddingUp(Regressor):
    total = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.total += float(loss.detach())
        return loss


class _Moving(_AddingUp):
    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = Regressor.training_step(self, batch, batch_idx)
        self.total = 0.9 * self.total + 0.1 * loss.detach()
        return loss


class _Queue(_AddingUp):
    def __init__(self) -> None:
        super().__init__()
        self.total = {"queue": []}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = Regressor.training_step(self, batch, batch_idx)
        self.total["queue"].append(loss.detach())
        return loss


@pytest.mark.parametrize("make", [_AddingUp, _Moving, _Queue])
def test_what_adds_up_over_examples_is_refused(make: Any) -> None:
    module = make()
    before = weights(module)
    with pytest.raises(PreflightError, match=r"training_step changes self\.total: expected.*torchmetrics"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0)).fit(module, loader())
    assert torch.equal(before, weights(module))
    assert module.total in (0.0, torch.zeros(()), {"queue": []})


def test_a_log_method_kept_elsewhere_does_not_get_past() -> None:
    class Part(nn.Module):
        def __init__(self, log: Any) -> None:
            super().__init__()
            self.say = log

        def forward(self, inputs: Tensor) -> Tensor:
            self.say("inside", inputs.mean())
            return inputs

    class Module(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.part = Part(self.log)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((self.part(batch[0]), batch[1]), batch_idx)

    with pytest.raises(Exception, match="not managed by the `Trainer` control flow"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0)).fit(Module(), loader())


class _OfTheClass(Regressor):
    """Adds to an attribute that stands in the class body, and so is set anew on the module."""

    total: Any = 100.0

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Any] = []
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.total += loss.detach()
        self.losses.append(loss.detach())
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(float(self.total) - 100.0)


def test_an_attribute_of_the_class_does_not_add_up_over_steps() -> None:
    module = _OfTheClass()
    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=3).fit(module, loader())
    assert _OfTheClass.total == 100.0
    assert module.seen == pytest.approx([float(mean) for mean in module.losses], rel=1e-4)
