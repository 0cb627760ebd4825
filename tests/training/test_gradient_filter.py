"""``gradient_filter="disk"``: two gradients of an example, one clip, the same noise, and a filter behind it."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import lightning_dp.mechanism.filtering as filtering_module
import lightning_dp.step.objective as objective_module
import lightning_dp.step.sample_release as sample_release_module
from lightning_dp import (
    AugmentationMultiplicity,
    DifferentialPrivacy,
    ExponentialMovingAverage,
    PreflightError,
    verify,
)
from lightning_dp.accounting import Phase, epsilon_bound
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.sampling import poisson_sample
from lightning_dp.plan.filtering import GradientFilter
from tests.conftest import loader, regression_data, regressor, trainer, weights
from tests.guarantees.mutations import caught, patched
from tests.harness import Shift
from tests.optim.test_noise_std import SavedAt, adaptive
from tests.training.manual_modules import ManualRegressor

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

SIGMA, CLIP, BATCH, SEED, LR, STEPS, EXAMPLES = 0.7, 0.3, 8, 3, 0.5, 5, 32


DEFAULT = GradientFilter()


def private(**options: Any) -> DifferentialPrivacy:
    given = {"noise_multiplier": SIGMA, "clip_norm": CLIP, "seed": SEED, "gradient_filter": "disk", "engine": "vmap"}
    return DifferentialPrivacy(**{**given, **options})


def by_package(**options: Any) -> Tensor:
    module = regressor(lr=LR)
    data = loader(regression_data(EXAMPLES), batch_size=BATCH)
    trainer(private(**options), max_steps=STEPS).fit(module, data)
    return weights(module)


def by_hand(rule: GradientFilter) -> Tensor:
    """The algorithm as it is printed, one example at a time; of the package only the random numbers."""
    module, key, data = regressor(lr=LR), RandomKey.from_seed(SEED), regression_data(EXAMPLES)
    parameters = list(module.parameters())

    def gradient(at: Tensor, index: int) -> Tensor:
        torch.nn.utils.vector_to_parameters(at, parameters)
        inputs, target = data[index]
        loss = (module.net(inputs[None]).squeeze(-1) - target).square().mean()
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])

    now, before, kept = weights(module).clone(), None, None
    for step in range(STEPS):
        total = torch.zeros_like(now)
        for index in poisson_sample(key.generator(Stream.SAMPLING, step), EXAMPLES, BATCH / EXAMPLES).tolist():
            own = gradient(now, index)
            if before is not None:
                c = (1 - rule.gain) / (rule.gain * rule.lookahead)
                own = c * gradient(now + rule.lookahead * (now - before), index) + (1 - c) * own
            total += own * min(1.0, CLIP / float(own.norm()))
        noise = torch.from_numpy(key.generator(Stream.NOISE, step).standard_normal(len(total), dtype="float32"))
        noisy = (total + SIGMA * CLIP * noise) / BATCH
        kept = noisy if kept is None else (1 - rule.gain) * kept + rule.gain * noisy
        before, now = now, now - LR * kept
    return now


def same(rule: GradientFilter = DEFAULT, **options: Any) -> None:
    found = by_package(filter_gain=rule.gain, filter_lookahead=rule.lookahead, **options)
    torch.testing.assert_close(found, by_hand(rule), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rule", "engine"),
    [
        (GradientFilter(), "vmap"),
        (GradientFilter(), "loop"),
        (GradientFilter(0.4, 3.0), "auto"),
        (GradientFilter(0.5, 1.0), "vmap"),  # c = 1: one gradient
    ],
)
def test_it_is_the_algorithm_by_hand(rule: GradientFilter, engine: str) -> None:
    same(rule, engine=engine)


@contextmanager
def without_the_gradient_ahead() -> Iterator[None]:
    """Bug: the filter alone, whose lag nothing makes up for."""
    with patched((objective_module, "loss_at_two_points", lambda form, logs, rest, *_: _plain(form, logs, rest))):
        yield


def _plain(form: Any, logs: Any, rest: Any) -> Any:
    return objective_module.example_loss(form, logs, rest)


@contextmanager
def noise_for_gradients_clipped_apart() -> Iterator[None]:
    """Bug of the authors' code: σ is divided by √(c² + (1-c)²), which no accountant is told."""
    release, c = sample_release_module.release, GradientFilter().weight

    def less(sums: Any, mechanism: Any, *rest: Any) -> Any:
        sigma = mechanism.noise.noise_multiplier / math.sqrt(c**2 + (1 - c) ** 2)
        return release(sums, mechanism.but(noise_multiplier=sigma), *rest)

    with patched((sample_release_module, "release", less)):
        yield


@contextmanager
def begun_with_nothing() -> Iterator[None]:
    """Bug: m starts at 0, so the first steps are too short."""
    right = filtering_module.FilterState.passed

    def passed(self: Any, released: Any, noise_std: float, weights: Any, rule: GradientFilter) -> Any:
        first = not self.gradient
        found, std = right(self, released, noise_std, weights, rule)
        if first:
            found = self.gradient = {name: rule.gain * one for name, one in found.items()}
        return found, std

    with patched((filtering_module.FilterState, "passed", passed)):
        yield


@pytest.mark.parametrize("wrong", [without_the_gradient_ahead, noise_for_gradients_clipped_apart, begun_with_nothing])
def test_another_algorithm_is_noticed(wrong: Any) -> None:
    with caught(wrong()):
        same()


def test_a_gain_of_one_filters_nothing_and_costs_are_those_of_no_filter() -> None:
    torch.testing.assert_close(by_package(filter_gain=1.0), by_package(gradient_filter=None), rtol=1e-5, atol=1e-6)

    def spent(**options: Any) -> Any:
        own = private(**options)
        trainer(own, max_steps=2).fit(regressor(), loader())
        assert own.ledger is not None
        return own.ledger.epsilon(), own.ledger.phases

    assert spent() == spent(gradient_filter=None)


def test_its_numbers_are_in_plan_ledger_journal_and_statement() -> None:
    own = private(filter_gain=0.6)
    trainer(own, max_steps=2).fit(regressor(), loader())
    numbers = {"gradient_filter": "disk", "filter_gain": 0.6, "filter_lookahead": 0.5}
    assert own.ledger is not None
    assert own.plan is not None
    journal = json.loads(Path("privacy.journal").read_text(encoding="utf-8"))["phase"]
    assert all(numbers.items() <= found.items() for found in (own.plan.numbers, own.ledger.numbers, journal))
    assert json.loads(Path("privacy.json").read_text(encoding="utf-8"))["gradient_filter"] == numbers
    assert "filtered before the optimizer (gradient_filter=disk, filter_gain=0.6, filter_lookahead=0.5)" in str(
        own.statement()
    )


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            {},
            {"filter_gain": 0.4},
            r"filtered by DiSK with κ = 0.7 and γ = 0.5: .* DiSK with κ = 0.4 and γ = 0.5 begins",
        ),
        (
            {},
            {"gradient_filter": None},
            r"filtered by DiSK with κ = 0.7 and γ = 0.5: .* nothing is filtered from here on",
        ),
        ({"gradient_filter": None}, {}, r"has no gradient filter: DiSK with κ = 0.7 and γ = 0.5 begins with this fit"),
    ],
)
def test_another_filter_begins_anew_and_is_said(before: Any, after: Any, said: str, tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    trainer(private(**before), SavedAt(3, path), max_steps=3).fit(regressor(), loader())
    own, module = private(**after), regressor()
    with pytest.warns(UserWarning, match=said):
        trainer(own, max_steps=5).fit(module, loader(), ckpt_path=path)
    assert own.ledger is not None
    assert own.ledger.epsilon() == epsilon_bound([Phase(SIGMA, 16 / 64, 5)], 1e-5)
    assert any("between release and optimizer changed during training" in one for one in own.statement().caveats)
    saved = torch.load(path, weights_only=True)
    saved.pop(filtering_module.KEY, None)  # nothing of the other filter is gone on from
    torch.save(saved, tmp_path / "without.ckpt")
    other = regressor()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(private(**after), max_steps=5).fit(other, loader(), ckpt_path=tmp_path / "without.ckpt")
    assert torch.equal(weights(module), weights(other))


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"

    def run(*callbacks: L.Callback, resumed: Path | None = None) -> Tensor:
        module = adaptive()
        fit = trainer(private(), ExponentialMovingAverage(0.5), *callbacks, max_steps=6)
        fit.fit(module, loader(), ckpt_path=resumed)
        return weights(module)

    whole = run(SavedAt(3, path))
    assert torch.equal(run(resumed=path), whole)
    saved = torch.load(path, weights_only=True)
    del saved[filtering_module.KEY]  # as of a run without a filter: it begins anew
    torch.save(saved, tmp_path / "without.ckpt")
    with pytest.warns(UserWarning, match="has no gradient filter: DiSK with κ = 0.7 and γ = 0.5 begins with this fit"):
        assert not torch.equal(run(resumed=tmp_path / "without.ckpt"), whole)
    torch.save({**saved, filtering_module.KEY: {"gradient": {}}}, tmp_path / "wrong.ckpt")
    with pytest.raises(ValueError, match="expected the state of a gradient filter"):
        run(resumed=tmp_path / "wrong.ckpt")


def test_the_noise_that_an_optimizer_is_told_is_that_behind_the_filter() -> None:
    """Measured on noise alone: (1-κ)² of what was there, and κ² of what is new."""
    from tests.optim.test_noise_std import Mute

    fit = trainer(private(), max_steps=4)
    fit.fit(Mute(), loader())
    (optimizer,) = fit.optimizers
    told: list[float] = optimizer.told
    assert told[0] == pytest.approx(SIGMA * CLIP / 16)
    assert told[3] < 0.8 * told[0]
    assert optimizer.agrees()


def test_neighbours_differ_by_one_clipped_contribution() -> None:
    found = verify(trainer(private(), max_steps=3), regressor(), loader(regression_data(16), batch_size=4))
    assert found.ok, str(found)


RUNS: list[dict[str, Any]] = [
    {"secure": True, "seed": None, "engine": "loop"},
    {"clipping": "quantile"},
    {"simulate": 2},
    {"privacy_unit": [index // 3 for index in range(64)], "expected_batch_size": 8},
    {"engine": "auto", "views": 2},
]


def test_it_runs_on_integers_users_and_views_with_adapted_clip_norms_and_in_a_simulation() -> None:
    for given in RUNS:
        options = {name: value for name, value in given.items() if name != "views"}
        module = regressor(lr=0.1)
        before = weights(module).clone()
        views = [AugmentationMultiplicity(k=2, transform=Shift(), images=0)] if "views" in given else []
        trainer(private(**options), *views, max_steps=3).fit(module, loader())
        assert 0 < float((weights(module) - before).norm()) < 1


def test_what_it_does_not_go_with_is_refused() -> None:
    for wrong, said in (
        ({"engine": "ghost"}, r"gradient_filter='disk' with engine='ghost': expected 'auto', 'vmap' or 'loop'"),
        ({"noise": "banded", "sampling": "cyclic_poisson"}, r"gradient_filter='disk' with noise='banded'"),
        ({"gradient_filter": "kalman"}, r"gradient_filter='kalman': expected 'disk', or None"),
        ({"gradient_filter": True}, r"gradient_filter=True: expected 'disk', or None"),
        ({"filter_gain": 0.0}, r"filter_gain=0.0: expected a number in \(0, 1\]"),
        ({"filter_gain": math.nan}, r"filter_gain=nan"),
        ({"filter_lookahead": 0.0}, r"filter_lookahead=0.0: expected a finite number of at least 0.001"),
        ({"filter_lookahead": math.inf}, r"filter_lookahead=inf"),
    ):
        with pytest.raises(ValueError, match=said):
            private(**wrong)
    with pytest.raises(PreflightError, match="gradient_filter='disk' with manual optimization: expected automatic"):
        trainer(private(), max_steps=2).fit(ManualRegressor(), loader())
