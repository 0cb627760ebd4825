from __future__ import annotations

import copy
import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torchmetrics import MeanMetric, Metric, MetricCollection, SumMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix, MulticlassF1Score

from lightning_dp import DifferentialPrivacy
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import Engine
from lightning_dp.engines.vmap import VmapEngine
from lightning_dp.lightning_internals import logged_again
from lightning_dp.step import log_calls
from lightning_dp.step.logs import StepCapture, split_output
from tests.conftest import Regressor, loader, trainer
from tests.nearly import assert_nearly

Logged = list[tuple[str, Any, dict[str, Any]]]
ENGINES: list[Engine] = [VmapEngine(), LoopEngine()]
EVERY_ENGINE = pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
CLASSES = 3


class Recorder(L.LightningModule):
    """Writes down what reaches ``log`` in place of handing it to a Trainer; ``step`` is the training_step."""

    def __init__(self, step: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        self.net = nn.Linear(4, CLASSES)
        self.step = step
        self.logged: Logged = []
        for name, child in children.items():
            self.add_module(name, child)

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        assert not args
        self.logged.append((name, value.detach() if isinstance(value, Tensor) else value, options))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inputs, targets = batch
        logits = self.net(inputs)
        return self.step(self, logits, targets, F.cross_entropy(logits, targets))


class _Stepper(nn.Module):
    def __init__(self, module: L.LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, batch: Any) -> Any:
        return self.module.training_step(batch, 0)


def recorder(step: Callable[..., Any], **children: nn.Module) -> Recorder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Recorder(step, **children)


def data(examples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(examples, 4, generator=generator), torch.randint(CLASSES, (examples,), generator=generator)


def privately(engine: Engine, module: Recorder, batch: Any, sizes: list[int] | None = None) -> dict[str, Any]:
    """One step as the strategy makes it: capture every micro-batch, then replay all of them together."""
    capture, stepper = StepCapture(module), _Stepper(module)

    def loss_function(parameters: Any, example: Any) -> tuple[Tensor, Any]:
        named = {f"module.{name}": parameter for name, parameter in parameters.items()}
        return capture.run(lambda: functional_call(stepper, named, (example,)))

    outputs, start = [], 0
    for size in sizes or [len(batch[0])]:
        piece = tuple(part[start : start + size] for part in batch)
        outputs.append(engine.clipped_sum(loss_function, dict(module.named_parameters()), piece, size, 1.0).outputs)
        start += size
    return capture.replay(outputs, start)


def plainly(module: Recorder, batch: Any) -> dict[str, Any]:
    return split_output(module.training_step(batch, 0))[1]


def values(module: Recorder) -> dict[str, float]:
    """What an epoch would report: logged metrics are computed."""
    return {name: float(value.compute() if isinstance(value, Metric) else value) for name, value, _ in module.logged}


def logs_scalars(self: Recorder, logits: Tensor, targets: Tensor, loss: Tensor) -> Any:
    confidence = logits.softmax(-1).amax(-1)
    self.log("loss", loss, prog_bar=True)
    self.log("correct", (logits.argmax(-1) == targets).sum(), reduce_fx="sum")
    self.log("most confident", confidence.max(), reduce_fx="max")
    self.log("least confident", confidence.min(), reduce_fx=torch.min)
    self.log("examples", len(targets), reduce_fx="sum")
    self.log("constant", 0.25)
    self.log_dict({"a/mean": logits.mean(), "a/half": 0.5 * loss}, on_epoch=True, on_step=False)
    return loss


def logs_metric_objects(self: Any, logits: Tensor, targets: Tensor, loss: Tensor) -> Any:
    self.accuracy(logits, targets)
    self.log("accuracy", self.accuracy)
    self.mean.update(loss, weight=len(targets))
    self.log("mean", self.mean, on_epoch=True)
    return loss


def logs_results_of_forward(self: Any, logits: Tensor, targets: Tensor, loss: Tensor) -> Any:
    self.log("accuracy", self.accuracy(logits, targets))
    self.log("mean", self.mean(loss), prog_bar=True)
    return {"loss": loss}


def logs_a_collection(self: Any, logits: Tensor, targets: Tensor, loss: Tensor) -> Any:
    self.metrics(logits, targets)
    self.log_dict(self.metrics)
    return loss


def logs_the_results_of_a_collection(self: Any, logits: Tensor, targets: Tensor, loss: Tensor) -> Any:
    result = self.metrics(logits, target=targets)
    self.log_dict(result)
    self.log("one of them", result["train/accuracy"])
    return loss


def updates_a_collection(self: Any, logits: Tensor, targets: Tensor, loss: Tensor) -> Any:
    self.metrics.update(logits, targets)
    self.log_dict(self.metrics, on_step=False, on_epoch=True)
    return loss


def logs_through_a_child(self: Any, logits: Tensor, targets: Tensor, loss: Tensor) -> Any:
    self.child.log("child/loss", loss)
    self.nested["accuracy"](logits, targets)
    self.log("nested", self.nested["accuracy"])
    return loss


def metrics() -> dict[str, nn.Module]:
    return {"accuracy": MulticlassAccuracy(CLASSES, average="micro"), "mean": MeanMetric()}


def collection() -> dict[str, nn.Module]:
    each = {"accuracy": MulticlassAccuracy(CLASSES, average="micro"), "f1": MulticlassF1Score(CLASSES)}
    return {"metrics": MetricCollection(each, prefix="train/")}


def child() -> dict[str, nn.Module]:
    return {"child": recorder(lambda *_: None), "nested": nn.ModuleDict({"accuracy": MulticlassAccuracy(CLASSES)})}


STEPS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, nn.Module]]]] = {
    "scalars": (logs_scalars, dict),
    "metric objects": (logs_metric_objects, metrics),
    "results of forward": (logs_results_of_forward, metrics),
    "a collection": (logs_a_collection, collection),
    "results of a collection": (logs_the_results_of_a_collection, collection),
    "a collection that is updated": (updates_a_collection, collection),
    "a child and a nested metric": (logs_through_a_child, child),
}


@EVERY_ENGINE
@pytest.mark.parametrize("name", STEPS)
@settings(max_examples=6)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3), seed=st.integers(0, 1000))
def test_what_is_logged_is_what_the_plain_step_logs_for_the_whole_batch(
    engine: Engine, name: str, sizes: list[int], seed: int
) -> None:
    step, children = STEPS[name]
    private, plain = recorder(step, **children()), recorder(step, **children())
    for turn in range(2):  # metrics add up over steps
        batch = data(sum(sizes), seed + turn)
        privately(engine, private, batch, sizes)
        plainly(plain, batch)
        privately_logged = values(private)
        for key, value in values(plain).items():
            assert privately_logged[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
        for one, other in zip(_recorders(private), _recorders(plain), strict=True):
            assert [entry[0] for entry in one.logged] == [entry[0] for entry in other.logged]
            options = [{**given_options, "batch_size": sum(sizes)} for _, _, given_options in other.logged]
            assert [entry[2] for entry in one.logged] == options
    for one, other in zip(_metrics(private), _metrics(plain), strict=True):
        torch.testing.assert_close(one.compute(), other.compute())


def _recorders(module: Recorder) -> list[Recorder]:
    return [part for part in module.modules() if isinstance(part, Recorder)]


def _metrics(module: Recorder) -> list[Metric]:
    return [part for part in module.modules() if isinstance(part, Metric)]


@EVERY_ENGINE
def test_metric_objects_are_logged_as_objects(engine: Engine) -> None:
    module = recorder(logs_metric_objects, **metrics())
    privately(engine, module, data(4))
    assert [value for _, value, _ in module.logged] == [module.accuracy, module.mean]
    assert module.accuracy._update_count == 1
    assert int(module.accuracy.tp + module.accuracy.fn) == 4


@EVERY_ENGINE
def test_a_metric_whose_result_is_not_a_number_is_counted(engine: Engine) -> None:
    def step(self: Any, logits: Tensor, targets: Tensor, loss: Tensor) -> Any:
        self.confusion(logits, targets)
        return loss

    private, plain = (recorder(step, confusion=MulticlassConfusionMatrix(CLASSES)) for _ in range(2))
    privately(engine, private, data(9), [4, 5])
    plainly(plain, data(9))
    assert torch.equal(private.confusion.compute(), plain.confusion.compute())


def test_python_numbers_given_to_a_metric_are_counted_for_every_example() -> None:
    """A step that calls ``.item()`` runs in the loop; its metrics must see every example's number."""

    def step(self: Any, logits: Tensor, targets: Tensor, loss: Tensor) -> Any:
        self.mean.update(loss.item())
        self.total.update(len(targets))
        self.log("loss", loss.item())
        return loss

    private, plain = (recorder(step, mean=MeanMetric(), total=SumMetric()) for _ in range(2))
    privately(LoopEngine(), private, data(7), [3, 4])
    plainly(plain, data(7))
    assert float(private.mean.compute()) == pytest.approx(float(plain.mean.compute()), rel=1e-5)
    assert float(private.total.compute()) == float(plain.total.compute()) == 7
    assert values(private)["loss"] == pytest.approx(values(plain)["loss"], rel=1e-5)


@EVERY_ENGINE
def test_options_that_are_not_numbers_reach_the_metric_as_they_are(engine: Engine) -> None:
    class Flagged(SumMetric):
        def update(self, value: Tensor, positive: bool, mode: str) -> None:
            assert positive is True
            assert mode == "count"
            super().update(value)

    def step(self: Any, logits: Tensor, targets: Tensor, loss: Tensor) -> Any:
        self.flagged.update(targets, True, mode="count")
        return loss

    module = recorder(step, flagged=Flagged())
    privately(engine, module, data(6))
    assert float(module.flagged.compute()) == float(data(6)[1].sum())


@EVERY_ENGINE
def test_a_value_derived_from_the_result_of_a_metric_is_computed_for_each_example(engine: Engine) -> None:
    def step(self: Any, logits: Tensor, targets: Tensor, loss: Tensor) -> Any:
        self.log("error", 1 - self.accuracy(logits, targets))
        return loss

    private, plain = recorder(step, **metrics()), recorder(step, **metrics())
    privately(engine, private, data(8))
    plainly(plain, data(8))
    assert values(private) == pytest.approx(values(plain), rel=1e-5)  # of a metric that is a mean over examples
    assert private.accuracy._update_count == 1


@EVERY_ENGINE
def test_what_is_returned_beside_the_loss_is_put_together(engine: Engine) -> None:
    def step(self: Any, logits: Tensor, targets: Tensor, loss: Tensor) -> Any:
        return {"loss": loss, "logits": logits.detach(), "nest": {"targets": targets}, "note": "as it is"}

    private, plain = recorder(step), recorder(step)
    extras, expected = privately(engine, private, data(5), [2, 3]), plainly(plain, data(5))
    assert list(extras) == ["logits", "nest", "note"]
    torch.testing.assert_close(extras["logits"], expected["logits"])
    assert torch.equal(extras["nest"]["targets"], expected["nest"]["targets"])
    assert extras["note"] == "as it is"


@EVERY_ENGINE
def test_nothing_captured_holds_on_to_the_graph(engine: Engine) -> None:
    def step(self: Any, logits: Tensor, targets: Tensor, loss: Tensor) -> Any:
        self.log("loss", loss)
        return {"loss": loss, "logits": logits}

    module = recorder(step)
    assert not privately(engine, module, data(3))["logits"].requires_grad
    assert not module.logged[0][1].requires_grad


def _state(module: nn.Module) -> dict[str, dict[str, int]]:
    return {name: {key: id(value) for key, value in vars(part).items()} for name, part in module.named_modules()}


class BugError(Exception):
    """A mistake in the user's own code."""


@EVERY_ENGINE
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("fails", [False, True])
def test_the_module_is_left_as_it_was_found(engine: Engine, name: str, fails: bool) -> None:
    step, children = STEPS[name]

    def failing(self: Any, *args: Any) -> Any:
        step(self, *args)
        raise BugError

    module = recorder(failing if fails else step, **children())
    before = {name: set(keys) for name, keys in _state(module).items()}
    methods = {
        part: (part.log if isinstance(part, Recorder) else part.update)
        for part in _recorders(module) + _metrics(module)
    }
    if fails:
        with pytest.raises(BugError):
            privately(engine, module, data(3))
        assert not module.logged
        assert all(metric._update_count == 0 for metric in _metrics(module))
    else:
        privately(engine, module, data(3))
    assert {name: set(keys) for name, keys in _state(module).items()} == before
    for part, method in methods.items():
        assert (part.log if isinstance(part, Recorder) else part.update) == method
    copy.deepcopy(module)


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (None, "training_step returned None: expected a loss for every batch.*return a loss"),
        ({"los": torch.tensor(1.0), "x": 1}, r"a dict with the keys \['los', 'x'\]: expected the key 'loss'"),
        ({}, r"a dict with the keys \[\]"),
    ],
)
@EVERY_ENGINE
def test_a_step_without_a_loss_is_refused(engine: Engine, output: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        privately(engine, recorder(lambda *_: output), data(2))


def test_a_rank_without_examples_replays_nothing_of_its_own() -> None:
    module = recorder(logs_scalars)
    assert StepCapture(module).replay([], 0) == {}
    assert module.logged == []


def test_a_rank_without_examples_makes_the_log_calls_of_the_others() -> None:
    """Log calls may be collective: a rank that left one out would keep the others waiting."""

    def step(self: Any, logits: Tensor, targets: Tensor, loss: Tensor) -> Any:
        self.log("loss", loss, sync_dist=True)
        self.accuracy(logits, targets)
        self.log("accuracy", self.accuracy)
        return loss

    sent: list[Any] = []
    busy, idle = (recorder(step, **metrics()) for _ in range(2))
    capture, batch = StepCapture(busy), data(1)
    loss, tensors = capture.run(lambda: busy.training_step(batch, 0))
    assert loss.requires_grad
    assert not any(tensor.requires_grad for tensor in tensors)
    capture.replay([[tensor.unsqueeze(0) for tensor in tensors]], 1, share=lambda calls: sent.append(calls) or calls)
    StepCapture(idle).replay([], 0, share=lambda calls: sent[0])
    assert [entry[0] for entry in idle.logged] == [entry[0] for entry in busy.logged] == ["loss", "accuracy"]
    assert_nearly([idle.logged[0][1], busy.logged[0][1]], [loss.detach()] * 2, rtol=1e-5, atol=1e-6)  # float32
    assert idle.logged[0][2] == busy.logged[0][2] == {"sync_dist": True, "batch_size": 1}
    assert idle.logged[1][1] is idle.accuracy
    assert idle.accuracy._update_count == 0


@EVERY_ENGINE
def test_a_metric_that_the_module_does_not_own_reaches_lightning_which_explains(engine: Engine) -> None:
    stranger = MeanMetric()

    def step(self: Any, logits: Tensor, targets: Tensor, loss: Tensor) -> Any:
        self.log("stranger", stranger)
        return loss

    module = recorder(step)
    privately(engine, module, data(2))
    assert module.logged[0][1] is stranger


class LogsInEveryWay(Regressor):
    """Logs by step, by epoch and in other ways, some of which change from one epoch to the next."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("by_step", loss * 2)
        self.log("both", loss * 3, on_step=True, on_epoch=True, prog_bar=True)
        self.log("most", loss, on_step=False, on_epoch=True, reduce_fx="max")
        self.log("number", 4.0, on_epoch=True)
        if self.current_epoch:
            self.log("late", loss)
        return loss


def test_what_is_logged_again_in_the_same_way_is_logged_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, again = [], Mock(wraps=logged_again)
    for name, shorter in (("whole", Mock(return_value=False)), ("shorter", again)):
        monkeypatch.setattr(log_calls, "logged_again", shorter)
        torch.manual_seed(0)
        logger = CSVLogger(tmp_path / name)
        dp = DifferentialPrivacy(noise_multiplier=1.0, clip_norm=1.0, seed=0)
        fitting = trainer(dp, max_steps=-1, max_epochs=2, log_every_n_steps=3, logger=logger)
        fitting.fit(LogsInEveryWay(), loader())
        rows = (Path(logger.log_dir) / "metrics.csv").read_text()
        waits = {"dp/data_wait"}
        kept = {name: float(value) for name, value in fitting.callback_metrics.items() if name not in waits}
        table = [{k: v for k, v in row.items() if k not in waits} for row in csv.DictReader(io.StringIO(rows))]
        found.append((kept, table))
    assert found[0] == found[1]
    assert again.call_count > 20


def test_a_log_with_other_options_is_refused_as_lightning_does() -> None:
    class Changes(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, prog_bar=self.global_step > 1)
            return loss

    dp = DifferentialPrivacy(noise_multiplier=1.0, clip_norm=1.0, seed=0)
    with pytest.raises(MisconfigurationException, match="twice in `training_step` with different arguments"):
        trainer(dp, max_steps=4).fit(Changes(), loader())
