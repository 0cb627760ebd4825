"""torchmetrics objects whose results the loss is made of: really computed for each example, and nothing is left on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp import DifferentialPrivacy, PreflightError
from tests.conftest import Regressor, loader, regression_data, trainer, weights

EXAMPLES = 12


class InPlace(torchmetrics.Metric):
    """A metric of a user's own, that adds up in place and takes its mean over rows."""

    def __init__(self, power: int = 2) -> None:
        super().__init__()
        self.power = power
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, targets: Tensor) -> None:
        self.total += (predicted - targets).abs().pow(self.power).sum()
        self.rows += len(targets)

    def compute(self) -> Tensor:
        return self.total / self.rows


class Kept(InPlace):
    """Keeps every row until the end, in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("kept", [], dist_reduce_fx="cat")

    def update(self, predicted: Tensor, targets: Tensor) -> None:
        self.kept.append((predicted - targets).abs())

    def compute(self) -> Tensor:
        return torchmetrics.utilities.dim_zero_cat(self.kept).mean()


class OverTime(torchmetrics.Metric):
    """As a forecasting library builds its losses: sums and lengths in states, a choice of reduction, sanity in Python."""

    full_state_update = False
    is_differentiable = True

    def __init__(self, reduction: str = "mean", quantile: float = 0.3) -> None:
        super().__init__()
        self.reduction, self.quantile = reduction, quantile
        self.add_state("losses", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("lengths", torch.tensor(0), dist_reduce_fx="sum")

    def loss(self, predicted: Tensor, targets: Tensor) -> Tensor:
        off = targets - predicted
        return torch.maximum(self.quantile * off, (self.quantile - 1) * off)

    def update(self, predicted: Tensor, target: Any) -> None:
        targets, weight = target
        lengths = torch.full((len(targets),), 1, dtype=torch.long)
        losses = (self.loss(predicted, targets) * weight).sum()
        if not torch.isfinite(losses):
            losses = torch.tensor(1e9)
        self.losses = self.losses + losses
        self.lengths = self.lengths + lengths.sum()

    def compute(self) -> Tensor:
        return self.losses / self.lengths if self.reduction == "mean" else self.losses


class Several(OverTime):
    """A weighted sum of other metrics, which it keeps in a list and calls itself."""

    def __init__(self, parts: list[Any], factors: list[float]) -> None:
        super().__init__()
        self.parts, self.factors = parts, factors

    def forward(self, predicted: Tensor, target: Any, **options: Any) -> Tensor:
        results = [part(predicted, target) * factor for part, factor in zip(self.parts, self.factors, strict=True)]
        return torch.stack(results).sum(0)

    def update(self, predicted: Tensor, target: Any) -> None:
        for part in self.parts:
            part.update(predicted, target)

    def compute(self) -> Tensor:
        return sum(part.compute() * factor for part, factor in zip(self.parts, self.factors, strict=True))


class Learned(InPlace):
    """A metric with a weight and a layer to be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.layer = nn.Linear(1, 1)

    def update(self, predicted: Tensor, targets: Tensor) -> None:
        super().update(self.layer(self.scale * predicted.unsqueeze(-1)).squeeze(-1), targets)


class Criterion(nn.Module):
    """A loss that holds a metric, which is no child of the LightningModule itself."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"error": InPlace(), "size": torchmetrics.MeanAbsoluteError()})

    def forward(self, predicted: Tensor, targets: Tensor) -> Tensor:
        return self.parts["error"](predicted, targets) + 0.1 * self.parts["size"](predicted, targets)


def directly(module: Any, predicted: Tensor, targets: Tensor) -> Any:
    return module.loss(predicted, targets)


def of_a_collection(module: Any, predicted: Tensor, targets: Tensor) -> Any:
    results = module.loss(predicted, targets)
    module.log_dict(results)
    return {"loss": sum(results.values()), "results": results}


def weighted(module: Any, predicted: Tensor, targets: Tensor) -> Any:
    return module.loss(predicted, (targets, torch.full_like(targets, 0.5)))


def in_part(module: Any, predicted: Tensor, targets: Tensor) -> Any:
    error = module.loss(predicted, targets)
    module.last = error
    return F.l1_loss(predicted, targets) + 0.5 * error


def from_a_list(module: Any, predicted: Tensor, targets: Tensor) -> Any:
    return sum(one(predicted, targets) for one in module.several)


CASES: dict[str, tuple[Any, Any]] = {
    "a metric of torchmetrics": (directly, torchmetrics.MeanSquaredError),
    "adds up in place": (directly, InPlace),
    "keeps a list": (directly, Kept),
    "a sum of metrics": (directly, lambda: torchmetrics.MeanSquaredError() + 0.1 * InPlace(1)),
    "a collection": (
        of_a_collection,
        lambda: torchmetrics.MetricCollection([torchmetrics.MeanSquaredError(), torchmetrics.MeanAbsoluteError()], prefix="a/"),
    ),
    "over time": (weighted, OverTime),
    "several over time": (weighted, lambda: Several([OverTime(), OverTime(quantile=0.8)], [1.0, 0.2])),
    "with parameters": (directly, Learned),
    "inside a criterion": (directly, Criterion),
    "in part": (in_part, torchmetrics.MeanSquaredError),
    "in a list": (from_a_list, lambda: [torchmetrics.MeanSquaredError(), InPlace(1)]),
}  # fmt: skip


class WithMetric(Regressor):
    def __init__(self, case: str) -> None:
        super().__init__(lr=0.1)
        self.how, make = CASES[case]
        made = make()
        if isinstance(made, list):
            self.several = made
        else:
            self.loss = made

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = self.how(self, self.net(batch[0]).squeeze(-1), batch[1])
        self.log("loss", output["loss"] if isinstance(output, dict) else output, on_epoch=True)
        return output


def trained(case: str, engine: str | None) -> tuple[WithMetric, dict[str, float]]:
    torch.manual_seed(0)
    module = WithMetric(case)
    private = DifferentialPrivacy(
        noise_multiplier=0.0, clip_norm=float("inf"), expected_batch_size=EXAMPLES, engine=engine or "auto"
    )
    fit = trainer(*([] if engine is None else [private]), max_steps=3)
    fit.fit(module, loader(regression_data(EXAMPLES), batch_size=EXAMPLES))
    return module, {name: float(value) for name, value in fit.callback_metrics.items() if "dp/" not in name}


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_logs_are_those_of_plain_training(case: str) -> None:
    plain, expected = trained(case, None)
    for engine in ("ghost", "vmap", "loop"):
        module, logged = trained(case, engine)
        torch.testing.assert_close(
            weights(module), weights(plain), rtol=1e-4, atol=1e-6
        )  # float32, other orders of sums
        assert float((weights(module) - weights(fresh(case))).norm()) > 1e-2
        assert logged == pytest.approx(expected, rel=1e-4)
        if case == "in part":
            torch.testing.assert_close(module.last, plain.last.detach(), rtol=1e-4, atol=1e-6)


def fresh(case: str) -> WithMetric:
    torch.manual_seed(0)
    return WithMetric(case)


class Hits(torchmetrics.Metric):
    """Counts by comparison: not differentiable, and all examples run at once."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, targets: Tensor) -> None:
        self.hits += ((predicted > 0.5) == targets).sum()
        self.rows += len(targets)

    def compute(self) -> Tensor:
        return self.hits / self.rows


class Weighting(Regressor):
    def __init__(self, hit: Any) -> None:
        super().__init__()
        self.hit = hit

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        predicted = self.net(batch[0]).squeeze(-1)
        hit = self.hit(predicted.sigmoid(), (batch[1] > 0).long())
        return F.mse_loss(predicted, batch[1]) * (2.0 - hit)


@pytest.mark.parametrize(
    ("make", "engine"),
    [(torchmetrics.classification.BinaryAccuracy, "auto"), (Hits, "ghost"), (Hits, "vmap"), (Hits, "loop")],
)
def test_a_metric_that_is_not_differentiable_may_weight_the_loss_of_its_example(make: Any, engine: str) -> None:
    torch.manual_seed(0)
    module, data = Weighting(make()), regression_data(EXAMPLES)
    inputs, targets = data.tensors
    predicted = module.net(inputs).squeeze(-1)
    hits = ((predicted > 0) == (targets > 0)).float()
    assert 0 < hits.sum() < EXAMPLES
    loss = (F.mse_loss(predicted, targets, reduction="none") * (2.0 - hits)).mean()
    expected = weights(module) - module.lr * torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]
    )
    private = DifferentialPrivacy(
        noise_multiplier=0.0,
        clip_norm=float("inf"),
        expected_batch_size=EXAMPLES,
        engine=engine,
        physical_batch_size=1,  # of a batch it would couple the examples, and is refused
    )
    trainer(private, max_steps=1).fit(module, loader(data, batch_size=EXAMPLES))
    torch.testing.assert_close(weights(module), expected, rtol=1e-4, atol=1e-6)


def test_the_metric_of_a_batch_as_a_weight_couples_its_examples() -> None:
    with pytest.raises(PreflightError, match="training_step couples examples"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0)).fit(Weighting(Hits()), loader())


def test_a_metric_that_is_only_logged_is_never_computed_for_one_example() -> None:
    class NeedsTwo(InPlace):
        def compute(self) -> Tensor:
            if self.rows < 2:
                raise ValueError("not of one")
            return super().compute()

    class Logs(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.score = NeedsTwo()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            score = self.score(self.net(batch[0]).squeeze(-1), batch[1])
            self.log("score", score)
            return {"loss": super().training_step(batch, batch_idx), "score": score}

    private = DifferentialPrivacy(
        noise_multiplier=0.0, clip_norm=float("inf"), expected_batch_size=EXAMPLES, engine="vmap"
    )
    fit = trainer(private, max_steps=1)
    fit.fit(Logs(), loader(regression_data(EXAMPLES), batch_size=EXAMPLES))
    assert float(fit.callback_metrics["score"]) == pytest.approx(float(fit.callback_metrics["train/loss"]), rel=1e-4)


class Remembering(InPlace):
    """Keeps the mean of what it has seen in a state, and beside its states in an attribute, a list and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.running = 1.0
        self.seen: list[float] = []
        self.register_buffer("largest", torch.zeros(()))
        self.add_state("mean", torch.tensor(1.0), dist_reduce_fx="mean")

    def update(self, predicted: Tensor, targets: Tensor) -> None:
        factor = self.running + sum(self.seen) + float(self.largest) + float(self.mean)
        super().update(predicted, targets)
        self.total = self.total * factor
        self.running = self.running + float(targets.mean())
        self.seen.append(float(targets.mean()))
        self.largest = torch.maximum(self.largest, targets.max().detach())
        self.mean = self.mean + targets.mean()


def moved_after_two_steps(shift: float, read: Any) -> Tensor:
    """Weights after two steps, the first of which moves nothing; every target is ``shift`` larger in that one."""

    class Module(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.loss = Remembering()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            targets = batch[1] + (shift if batch_idx == 0 else 0.0)
            weight = read(self.loss)
            return self.loss(self.net(batch[0]).squeeze(-1), targets) * weight

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.01 * (n > 0))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    torch.manual_seed(0)
    module = Module()
    private = DifferentialPrivacy(noise_multiplier=1.0, seed=0, engine="loop", clip_norm=100.0)
    trainer(private, max_steps=2).fit(module, loader())
    assert module.loss._update_count == 2, "the metric itself has seen both steps"
    return weights(module)


READ = {
    "its result": lambda metric: 1.0,
    "a state": lambda metric: 1.0 + metric.mean,
    "an attribute": lambda metric: metric.running + len(metric.seen) + metric.largest,
    "how often": lambda metric: 1.0 + metric.update_count,
}


@pytest.mark.parametrize("read", READ)
def test_no_later_step_sees_what_a_metric_has_seen(read: str) -> None:
    found = [moved_after_two_steps(shift, READ[read]) for shift in (0.0, 3.0)]
    torch.testing.assert_close(found[0], found[1], rtol=0.0, atol=0.0)  # the same program on the same numbers


def test_that_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_dp.step import metrics

    monkeypatch.setattr(metrics, "_is_trained", lambda one: False)  # the bug: what is there is taken as it is
    found = [moved_after_two_steps(shift, READ["its result"]) for shift in (0.0, 3.0)]
    assert float((found[0] - found[1]).norm()) > 1e-3


@pytest.mark.parametrize("first_step", [0, 1])
def test_a_value_of_earlier_examples_is_refused_where_it_is_used(first_step: int) -> None:
    class Scaling(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.average = torchmetrics.MeanMetric(nan_strategy="ignore")
            self.average._update_count = 1  # no warning of torchmetrics at the first step

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            average = self.average.compute()
            self.log("so far", average)  # may be logged
            scale = 1.0 + average if self.global_step >= first_step else 1.0
            self.average.update(loss.detach())
            return loss / scale

    with pytest.raises(PreflightError, match=r"reads MeanMetric\.compute\(\) before it has updated the metric"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0, engine="loop"), max_steps=3).fit(Scaling(), loader())


def test_what_validation_has_measured_may_be_used() -> None:
    class Public(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.measured = torchmetrics.MeanMetric()
            self.measured.update(2.0)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) * self.measured.compute()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.measured.update(torch.full((3,), 2.0))

    def moved(make: Any, lr: float) -> Tensor:
        torch.manual_seed(0)
        module = make(lr=lr) if make is Regressor else make()
        module.lr = lr
        private = DifferentialPrivacy(
            noise_multiplier=0.0, clip_norm=float("inf"), expected_batch_size=64, engine="ghost"
        )
        trainer(private, max_steps=1, num_sanity_val_steps=1).fit(module, loader(batch_size=64), loader())
        return weights(module)

    torch.testing.assert_close(moved(Public, 0.1), moved(Regressor, 0.2), rtol=1e-5, atol=1e-6)


def test_update_compute_and_reset_within_a_step_are_replayed_in_order() -> None:
    class Says(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.error = torchmetrics.MeanSquaredError()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            predicted = self.net(batch[0]).squeeze(-1)
            self.error.update(predicted, batch[1])
            self.log("error", self.error.compute())
            self.error.reset()
            return F.mse_loss(predicted, batch[1]) * (1 + self.error(predicted, batch[1]).detach() * 0)

    found = []
    for callbacks in ([], [DifferentialPrivacy(noise_multiplier=0.0, clip_norm=float("inf"), expected_batch_size=64)]):
        torch.manual_seed(0)
        fit = trainer(*callbacks, max_steps=2)
        fit.fit(Says(), loader(batch_size=64))
        found.append((float(fit.callback_metrics["error"]), fit.lightning_module.error._update_count))
    assert found[0][1] == found[1][1] == 1
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)


def test_kept_from_the_loggers_an_attribute_still_has_its_value() -> None:
    class Keeps(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.error = torchmetrics.MeanSquaredError()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.last = self.error(self.net(batch[0]).squeeze(-1), batch[1])
            return super().training_step(batch, batch_idx)

    torch.manual_seed(0)
    module, data = Keeps(), regression_data(EXAMPLES)
    expected = F.mse_loss(module.net(data.tensors[0]).squeeze(-1), data.tensors[1]).detach()
    private = DifferentialPrivacy(
        noise_multiplier=0.0, clip_norm=float("inf"), expected_batch_size=EXAMPLES, log_train_metrics=False
    )
    trainer(private, max_steps=1).fit(module, loader(data, batch_size=EXAMPLES))
    torch.testing.assert_close(module.last, expected, rtol=1e-4, atol=1e-6)
    assert module.error._update_count == 0
