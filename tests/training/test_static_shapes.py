"""Micro-batches padded to one shape, and modules under torch.compile: the result is the same, and nothing recompiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torchmetrics import MeanSquaredError

from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy
from lightning_dp.batches.microbatch import padded
from lightning_dp.batches.seeded import content_of
from lightning_dp.batches.transforms import ViewTransform
from lightning_dp.engines.uncompiled import compiled_parts, uncompiled
from lightning_dp.mechanism.clip import clip_and_sum
from lightning_dp.step.engine_comparison import EngineComparison
from lightning_dp.step.open_step import OpenStep
from tests.conftest import Regressor, loader, regression_data, regressor, trainer, weights

ENGINES = ["ghost", "vmap", "loop"]


class Measured(Regressor):
    """Logs a sum and a maximum, counts a metric and returns an output: all of which would show a row too many."""

    def __init__(self) -> None:
        super().__init__()
        self.error = MeanSquaredError()
        self.returned: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        out = self.net(batch[0]).squeeze(-1)
        loss = nn.functional.mse_loss(out, batch[1])
        self.error.update(out, batch[1])
        self.log("error", self.error, on_step=False, on_epoch=True)
        self.log("sum", loss, reduce_fx="sum")
        self.log("max", loss, reduce_fx="max")
        return {"loss": loss, "out": out}

    def on_train_batch_end(self, outputs: Any, *_: Any) -> None:
        self.returned.append(outputs["out"] if "out" in outputs else torch.zeros(0))


class Shift(ViewTransform):
    draws = 4

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        return images + uniforms


def run(engine: str, static: bool, views: int, **options: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    module, shapes = Measured(), []
    private = DifferentialPrivacy(
        noise_multiplier=0.5,
        clip_norm=0.3,
        seed=4,
        engine=engine,
        static_shapes=static,
        physical_batch_size=5,
        **options,
    )
    callbacks = [AugmentationMultiplicity(k=views, transform=Shift(), images=0)] if views else []
    fit = trainer(private, *callbacks, max_steps=6)
    original = OpenStep.clipped_sum

    def watched(self: Any, selection: Any, *rest: Any) -> Any:  # what the engine is given, batch by batch
        selected = selection.engine
        if not hasattr(selected, "watched"):
            inner, selected.watched = selected.clipped_sum, True

            def clipped_sum(loss: Any, parameters: Any, batch: Any, *more: Any, **named: Any) -> Any:
                shapes.append(tuple(content_of(batch)[0].shape))
                return inner(loss, parameters, batch, *more, **named)

            selected.clipped_sum = clipped_sum
        return original(self, selection, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OpenStep, "clipped_sum", watched)
        fit.fit(module, loader(batch_size=8))
    metrics = {
        name: float(value) for name, value in fit.callback_metrics.items() if name != "dp/data_wait"
    }  # a clock's
    return {"weights": weights(module), "metrics": metrics, "returned": module.returned, "shapes": set(shapes)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("style", "views"), [("flat", 0), ("per_layer", 3), ("automatic", 3)])
def test_padding_changes_shapes_and_nothing_else(
    engine: str, style: Any, views: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngineComparison, "is_due", False)  # which runs one example alone, in a shape of its own
    plain, static = (run(engine, on, views, clipping=style) for on in (False, True))
    torch.testing.assert_close(static["weights"], plain["weights"], rtol=1e-5, atol=1e-6)
    assert static["metrics"] == pytest.approx(plain["metrics"], rel=1e-4)
    for one, other in zip(static["returned"], plain["returned"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert static["shapes"] == {(5, views, 4) if views else (5, 4)}
    assert len(plain["shapes"]) > 1


def test_padding_with_the_measured_size_and_empty_draws() -> None:
    module = regressor()
    private = DifferentialPrivacy(
        noise_multiplier=0.5, expected_batch_size=1, physical_batch_size="auto", static_shapes=True
    )
    trainer(private, max_steps=12).fit(module, loader())
    assert private.statement().steps == 12
    assert weights(module).isfinite().all()


SIZES = [3, 6, 2, 5]


def graphs_for(batches: list[tuple[Tensor, int]]) -> int:
    """How many graphs torch.compile makes of a per-example pass over these batches; each gives the right sum."""
    net = regressor().net
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(given: Any, row: Tensor) -> Tensor:
        return functional_call(net, given, (row.unsqueeze(0),)).square().sum()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = vmap(grad_and_value(loss), in_dims=(None, 0))
    compiled = torch.compile(plain, backend="eager")
    for batch, counted in batches:
        found, _ = clip_and_sum(compiled(parameters, batch)[0], 0.5, counted)
        expected, _ = clip_and_sum(plain(parameters, batch[:counted])[0], 0.5)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient)
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.fixture
def _compiler() -> Any:
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_compiler")
def test_padded_micro_batches_are_compiled_once() -> None:
    rows = regression_data(6).tensors[0]

    assert graphs_for([(rows[:size], size) for size in SIZES]) > 1
    assert graphs_for([(padded(rows[:size], size, 6), size) for size in SIZES]) == 1


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("part", ["net", "module", "in place"])
def test_a_module_under_torch_compile_trains_the_same(engine: str, part: str, caplog: Any) -> None:
    """With ``loop`` compiled once for draws of any size; under torch.func not at all, and said so. (No kernels: eager.)"""
    import torch._dynamo  # slow: only here

    plain = regressor()
    options: dict[str, Any] = {"noise_multiplier": 0.5, "seed": 4, "engine": engine, "physical_batch_size": 5}
    trainer(DifferentialPrivacy(**options), max_steps=5).fit(plain, loader())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module: Any = regressor()
    given = module
    if part == "net":
        module.net = torch.compile(module.net, backend="eager")
    elif part == "in place":
        module.net.compile(backend="eager")
    else:
        given = torch.compile(module, backend="eager")
    caplog.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        trainer(DifferentialPrivacy(**options), max_steps=5).fit(given, loader())
    torch.testing.assert_close(weights(module), weights(plain), rtol=1e-5, atol=1e-6)
    graphs = int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    told = [line for line in caplog.messages if "is not used in training steps" in line]
    assert (graphs, len(told)) == ((1, 0) if engine == "loop" else (0, 1))
    if told:
        assert f"torch.compile of {'module' if part == 'module' else 'net'} is not used" in told[0]


@pytest.mark.usefixtures("_compiler")
def test_outside_the_engine_compiled_code_is_compiled_again() -> None:
    import torch._dynamo  # slow: only here

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda x: x.sin().cos(), backend="eager")
    with uncompiled():
        compiled(torch.ones(3))
        assert not torch._dynamo.utils.counters["stats"]
    compiled(torch.ones(3))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert compiled_parts(regressor()) == []
