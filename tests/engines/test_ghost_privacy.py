"""What book-keeping must never do: couple examples, drop a gradient, spread a NaN, or find a norm too short."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from lightning_dp import DifferentialPrivacy, EngineError
from lightning_dp.batches.microbatch import BatchAxisError
from lightning_dp.engines.agreement import DisagreementError, check_agreement
from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.ghost.contribution import Written, gram, gram_norms
from lightning_dp.engines.ghost.rules.layer_norm import LayerNorm
from lightning_dp.engines.ghost.rules.linear import Linear
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import ClippedSum, Engine
from lightning_dp.engines.select import select_engine
from tests.conftest import loader, regressor, trainer

PAIR = tuple[Tensor, Tensor]


def mlp(dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)


def images() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ELU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 3)
        ).double()  # fmt: skip


def data(examples: int, *shape: int, seed: int = 1) -> PAIR:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, *shape, dtype=torch.float64, generator=generator)
    return inputs, torch.randint(3, (examples,), generator=generator)


def run(engine: Engine, module: nn.Module, batch: PAIR, clip_norm: float, loss: Any = F.cross_entropy) -> ClippedSum:
    def loss_function(parameters: Mapping[str, Tensor], pair: PAIR) -> tuple[Tensor, Any]:
        return loss(functional_call(module, dict(parameters), (pair[0],)), pair[1]), []

    return engine.clipped_sum(loss_function, dict(module.named_parameters()), batch, len(batch[0]), clip_norm)


def flat(result: ClippedSum) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in result.gradient.values()])


def contrastive(output: Tensor, target: Tensor) -> Tensor:
    similarity = F.normalize(output, dim=-1) @ F.normalize(output, dim=-1).t()
    return F.cross_entropy(similarity + output.sum(), torch.arange(len(output)))


COUPLED = {
    "contrastive": contrastive,
    "a sum over the batch": lambda output, target: F.cross_entropy(output, target, reduction="sum"),
    "centred by the batch": lambda output, target: F.cross_entropy(output - 0.5 * output.mean(0), target),
    "weighted by a statistic of the batch": lambda output, target: (
        F.cross_entropy(output, target) * output.std(0, correction=0).sum().exp()
    ),
    "a mean over the labels that count": lambda output, target: (
        F.cross_entropy(output, target.where(target > 0, -100), ignore_index=-100, reduction="sum")
        / (target > 0).sum().clamp(min=1)
    ),
    "coupled only when the batch is large": lambda output, target: (
        F.cross_entropy(output, target) * (1 if len(output) <= 2 else output.sum())
    ),
}


@pytest.mark.parametrize("name", COUPLED)
def test_a_loss_that_couples_a_batch_sees_a_batch_of_one(name: str) -> None:
    """One forward pass for all, and still no example's loss can reach another's data."""
    module, batch = mlp(), data(6, 4)
    ghost = run(GhostEngine(module), module, batch, 0.3, COUPLED[name])
    loop = run(LoopEngine(), module, batch, 0.3, COUPLED[name])
    torch.testing.assert_close(flat(ghost), flat(loop), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(ghost.losses, loop.losses)


@pytest.mark.parametrize("name", COUPLED)
@settings(max_examples=5)
@given(seed=st.integers(0, 1000), gone=st.integers(0, 5))
def test_taking_one_example_away_moves_the_sum_by_at_most_the_clip_norm(name: str, seed: int, gone: int) -> None:
    module, batch = mlp(), data(6, 4, seed=seed)
    others = [index for index in range(6) if index != gone]
    everybody = run(GhostEngine(module), module, batch, 0.3, COUPLED[name])
    fewer = run(GhostEngine(module), module, (batch[0][others], batch[1][others]), 0.3, COUPLED[name])
    assert float((flat(everybody) - flat(fewer)).norm()) <= 0.3 * (1 + 1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("make", "shape"), [(mlp, (4,)), (mlp, (5, 4)), (images, (2, 4, 4))])
def test_a_broken_example_adds_nothing_and_spreads_to_nobody(make: Any, shape: tuple[int, ...], value: float) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return output.square().mean()

    module, batch = make(), data(5, *shape)
    batch[0][3, 0] = value
    others = [0, 1, 2, 4]
    result = run(GhostEngine(module), module, batch, 0.5, loss)
    without = run(LoopEngine(), module, (batch[0][others], batch[1][others]), 0.5, loss)
    alone = run(LoopEngine(), module, (batch[0][3:4], batch[1][3:4]), 0.5, loss)
    torch.testing.assert_close(flat(result), flat(without) + flat(alone), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.losses[others], without.losses)
    assert bool(torch.isfinite(result.norms[3])) == bool(torch.isfinite(alone.norms[0]))


@given(
    seed=st.integers(0, 10_000),
    positions=st.integers(2, 40),
    cancelled=st.floats(0, 8),
    widths=st.tuples(st.integers(1, 64), st.integers(1, 64)),
)
def test_a_norm_from_gram_matrices_is_never_short_however_much_cancels(
    seed: int, positions: int, cancelled: float, widths: tuple[int, int]
) -> None:
    """a nearly constant over positions, g nearly of sum zero: Σ g aᵀ is tiny beside its terms."""
    generator = torch.Generator().manual_seed(seed)
    size = 10.0**-cancelled
    a = torch.randn(1, 1, widths[0], generator=generator) + size * torch.randn(
        1, positions, widths[0], generator=generator
    )
    g = torch.randn(1, positions, widths[1], generator=generator)
    g = g - (1 - size) * g.mean(1, keepdim=True)
    exact = torch.einsum("bti,btj->bij", a.double(), g.double()).norm()
    found = gram_norms(torch.stack([gram(a), gram(g)]).unsqueeze(1), [(a.shape[2], g.shape[2])]).values
    assert float(found) >= float(exact) * (1 - 1e-6)


def test_without_rounding_up_a_norm_would_be_short() -> None:
    """The test above has teeth: the same products without the allowance miss by more than they may."""
    short = 0
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(1, 1, 32, generator=generator).expand(1, 20, 32) + 1e-4 * torch.randn(
            1, 20, 32, generator=generator
        )
        g = torch.randn(1, 20, 32, generator=generator)
        g = g - g.mean(1, keepdim=True)
        exact = torch.einsum("bti,btj->bij", a.double(), g.double()).norm()
        plain = (gram(a) * gram(g)).sum().clamp(min=0).sqrt()
        short += bool(plain < exact * (1 - 1e-6))
    assert short > 0


class Ignored(nn.Module):
    """Uses its parameter as no rule knows, so that its rows are found through copies per example."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.factor = False, nn.Parameter(torch.tensor(2.0))
        self.weight = nn.Parameter(torch.ones(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        output = F.linear(x, self.weight * self.factor)
        return output * self.factor if self.late else output


def test_a_parameter_that_starts_to_be_used_in_another_way_is_noticed_in_the_middle_of_training() -> None:
    module, batch = Ignored().double(), data(4, 4)
    engine = GhostEngine(module)
    for late in (False, True, False):
        module.late = late
        torch.testing.assert_close(
            flat(run(engine, module, batch, 0.5)), flat(run(LoopEngine(), module, batch, 0.5)), rtol=1e-9, atol=1e-9
        )


def test_modules_are_left_as_they_were_also_after_an_error() -> None:
    module, batch = nn.Sequential(mlp(), Ignored().double()), data(4, 4)
    before = {layer: dict(layer.__dict__) for layer in module.modules()}
    parameters = dict(module.named_parameters())
    for loss in (F.cross_entropy, lambda output, target: output.no_such_thing()):
        try:
            run(GhostEngine(module[0]), module[0], batch, 1.0, loss)
            run(GhostEngine(module), nn.Sequential(nn.Linear(4, 4).double(), module[1]), batch, 1.0, loss)
        except AttributeError:
            pass
        assert all(layer.__dict__.keys() == before[layer].keys() for layer in module.modules())
        assert all(p is parameters[name] and p.grad is None for name, p in module.named_parameters())


def test_transforms_of_ones_own_around_a_layer_are_refused() -> None:
    module, batch = mlp(), data(4, 4)

    def sensitive(output: Tensor, target: Tensor) -> Tensor:
        rows = torch.stack([output.squeeze(0)] * 4)
        inner = vmap(lambda row: module[3](F.pad(row, (0, 5))).sum())(rows)
        return inner.sum()

    with pytest.raises(RuntimeError, match=r"torch\.func transforms of its own"):
        run(GhostEngine(module), module, batch, 1.0, sensitive)

    def differentiated(output: Tensor, target: Tensor) -> Tensor:
        return grad(lambda row: module[3](F.pad(row, (0, 5))).square().sum())(output).square().sum()

    with pytest.raises(RuntimeError, match=r"torch\.func transforms of its own"):
        run(GhostEngine(module), module, batch, 1.0, differentiated)


def test_nothing_but_rows_per_example_is_accepted() -> None:
    module, batch = mlp(), data(4, 4)
    with pytest.raises(BatchAxisError):
        run(GhostEngine(module), module, (batch[0], batch[1][:3]), 1.0)


class TestAgreement:
    """The proof before training."""

    def check(self, module: nn.Module, batch: PAIR) -> str:
        def loss_function(parameters: Mapping[str, Tensor], pair: PAIR) -> tuple[Tensor, Any]:
            return F.cross_entropy(functional_call(module, dict(parameters), (pair[0],)), pair[1]), []

        return check_agreement(
            GhostEngine(module), loss_function, dict(module.named_parameters()), batch, len(batch[0]), module
        )

    def test_is_made_in_float64_and_leaves_the_module_alone(self) -> None:
        module = nn.Sequential(mlp(torch.float32), nn.Dropout(0.5)).train()
        inputs, targets = data(3, 4)
        assert self.check(module, (inputs.float(), targets)) == "float64"
        assert all(layer.training for layer in module.modules())
        assert {p.dtype for p in module.parameters()} == {torch.float32}

    def test_is_made_in_float32_where_the_module_insists(self) -> None:
        class Insists(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.body = mlp(torch.float32)

            def forward(self, x: Tensor) -> Tensor:
                return self.body(x.float())

        assert self.check(Insists(), data(3, 4)) == "float32"

    @pytest.mark.parametrize("rule", [Linear, LayerNorm])
    @pytest.mark.parametrize("factor", [1.001, 0.0])
    def test_a_wrong_rule_is_found(self, rule: Any, factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
        right = rule.of_weight
        monkeypatch.setattr(rule, "of_weight", lambda *given: Written(factor * right(*given).rows()))
        with pytest.raises(DisagreementError, match="differ from those of plain backward passes, most in"):
            self.check(mlp(), data(3, 4))

    def test_a_rule_that_breaks_is_not_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Linear, "of_weight", lambda *given: Written(torch.full((3, 8, 4), math.nan)))
        with pytest.raises((DisagreementError, RuntimeError)):
            self.check(mlp(), data(3, 4))


class TestSelection:
    def test_auto_takes_it_and_says_how_each_parameter_is_handled(self, caplog: pytest.LogCaptureFixture) -> None:
        trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=1).fit(regressor(), loader())
        told = "\n".join(record.message for record in caplog.records)
        assert re.search(r"engine +ghost", told)
        assert "4 parameters: Linear" in told

    def test_auto_falls_back_when_its_gradients_are_wrong_and_says_why(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right = Linear.of_weight
        monkeypatch.setattr(Linear, "of_weight", lambda *given: Written(2 * right(*given).rows()))
        trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=1).fit(regressor(), loader())
        told = "\n".join(record.message for record in caplog.records)
        assert re.search(r"engine +vmap: ghost cannot", told)
        assert "differ from those of plain backward passes" in told
        with pytest.raises(EngineError, match="differ from those"):
            trainer(DifferentialPrivacy(noise_multiplier=1.0, engine="ghost"), max_steps=1).fit(regressor(), loader())

    def test_by_name_it_is_taken(self) -> None:
        assert select_engine("ghost", lambda engine: None, nn.Linear(1, 1)).engine.name == "ghost"


def test_layers_are_found_anew_when_a_callback_unfreezes_them() -> None:
    class Unfreezing(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            pl_module.net[0].requires_grad_(batch_idx >= 2)

    def net(engine: Any) -> Tensor:
        module = regressor()
        module.net[0].requires_grad_(False)
        private = DifferentialPrivacy(noise_multiplier=1.0, seed=0, engine=engine)
        trainer(private, Unfreezing(), max_steps=4).fit(module, loader())
        return torch.cat([p.detach().flatten() for p in module.parameters()])

    torch.testing.assert_close(net("ghost"), net("loop"), rtol=1e-5, atol=1e-6)


def test_random_layers_draw_independently_for_each_example() -> None:
    module = nn.Sequential(nn.Linear(1, 200), nn.Dropout(0.5), nn.Linear(200, 1))
    module.train()
    seen: list[Tensor] = []

    def loss_function(parameters: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Any]:
        hidden = module[1](torch.ones(1, 200))
        return functional_call(module, dict(parameters), (x,)).sum(), {"kept": hidden > 0}

    result = GhostEngine(module).clipped_sum(loss_function, dict(module.named_parameters()), torch.ones(40, 1), 40, 1.0)
    seen.append(result.outputs["kept"].flatten(1).double())
    correlation = torch.corrcoef(seen[0]) - torch.eye(40)
    assert float(correlation.abs().max()) < 6 / math.sqrt(200)
    assert 0.45 < float(seen[0].mean()) < 0.55
