"""Training with correlated noise: equal to matrices by hand, over interruptions too, charged as proved, refused elsewhere."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from dp_accounting import dp_event
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from scipy.linalg import toeplitz
from torch import Tensor
from torch.utils.data import Subset

import lightning_dp.loading.draws as draws_module
import lightning_dp.look.planning as planning_module
import lightning_dp.mechanism.correlated as correlated_module
from lightning_dp import DifferentialPrivacy, PreflightError
from lightning_dp.accounting import Ledger, Phase, epsilon_bound
from lightning_dp.accounting.phase import phase_of
from lightning_dp.look.correlated_noise import momentum_of
from lightning_dp.mechanism.correlated import STATE
from lightning_dp.mechanism.cyclic import cyclic_poisson_sample, groups_of
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.sampling import poisson_sample
from lightning_dp.plan.correlation import Correlation
from lightning_dp.plan.mechanism import Event, Mechanism
from tests.conftest import Regressor, loader, regression_data, regressor, trainer, weights
from tests.faults.lives import StopAt
from tests.guarantees.mutations import caught, patched

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*steps to take in blocks of"),
]
STEPS, BATCH, EXAMPLES, SIGMA, CLIP, MOMENTUM = 7, 6, 24, 0.7, 0.3, 0.5
BANDS = {"banded": 3, "lambda": 2, "bisr": 3}


class Heavy(Regressor):
    """With momentum."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.2, momentum=MOMENTUM)


def heavy() -> Heavy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Heavy()


def private(noise: str = "banded", **options: Any) -> DifferentialPrivacy:
    given: dict[str, Any] = {
        "noise_multiplier": SIGMA, "clip_norm": CLIP, "seed": 3, "sampling": "cyclic_poisson", "noise": noise,
        "noise_bands": 3,
    }  # fmt: skip
    return DifferentialPrivacy(**{**given, **options})


def data(**options: Any) -> Any:
    return loader(regression_data(EXAMPLES), batch_size=BATCH, **options)


def run(callback: DifferentialPrivacy, steps: int = STEPS, ckpt_path: Any = None, **options: Any) -> tuple[Tensor, Any]:
    module, fit = heavy(), trainer(callback, max_steps=steps, **options)
    fit.fit(module, data(), ckpt_path=ckpt_path)
    return weights(module), fit


def by_hand(noise: str, sampling: str = "cyclic_poisson") -> Tensor:
    """SGD with momentum on clipped sums, and C⁻¹Z by matrices. From the package are the draws, Z and the found matrix."""
    module, key = heavy(), RandomKey.from_seed(3)
    callback = private(noise, sampling=sampling)
    run(callback, steps=STEPS)
    assert callback.plan is not None
    found = callback.plan.mechanism.noise.correlation
    assert found is not None
    assert (found.style, found.bands, found.steps, found.momentum) == (noise, BANDS[noise], STEPS, MOMENTUM)
    column = np.zeros(STEPS)
    column[: found.bands] = found.matrix
    given = toeplitz(column, np.zeros(STEPS))
    inverse = given if noise != "banded" else np.linalg.inv(given)
    largest = np.linalg.norm(np.linalg.inv(inverse), axis=0).max()
    coordinates, parameters = len(weights(module)), list(module.parameters())
    z = np.array(
        [key.generator(Stream.NOISE, step).standard_normal(coordinates, dtype="float32") for step in range(STEPS)]
    )
    added = torch.from_numpy(SIGMA * CLIP * largest * inverse @ z.astype(float)).float()
    groups = groups_of(key, EXAMPLES, BANDS["banded"] if noise == "banded" else EXAMPLES // BATCH)
    bins = key.generator(Stream.SAMPLING, 0).integers(EXAMPLES // BATCH, size=EXAMPLES)
    velocity, records = torch.zeros(coordinates), regression_data(EXAMPLES)
    for step in range(STEPS):
        total = torch.zeros(coordinates)
        drawn = np.flatnonzero(bins == step % (EXAMPLES // BATCH))
        if sampling == "cyclic_poisson":
            drawn = cyclic_poisson_sample(key, groups, step, min(1.0, len(groups) * BATCH / EXAMPLES))
        for index in drawn.tolist():
            inputs, target = records[index]
            loss = torch.nn.functional.mse_loss(module.net(inputs[None]).squeeze(-1), target[None])
            gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
            total += gradient * min(1.0, CLIP / float(gradient.norm()))
        velocity = MOMENTUM * velocity + (total + added[step]) / BATCH
        torch.nn.utils.vector_to_parameters(weights(module) - 0.2 * velocity, parameters)
    return weights(module)


BOTH = [(noise, "cyclic_poisson") for noise in BANDS] + [("banded", "balls_in_bins"), ("lambda", "balls_in_bins")]
"""Each noise, and each sampling that goes with it."""


@pytest.mark.parametrize(("noise", "sampling"), BOTH)
def test_a_run_is_the_one_by_hand(noise: str, sampling: str) -> None:
    expected = by_hand(noise, sampling)
    for engine in ("ghost", "loop"):
        found = run(private(noise, engine=engine, sampling=sampling))[0]
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6), engine


def test_planted_noise_that_forgets_the_steps_before_is_caught() -> None:
    forgets = (correlated_module.Past, "_terms", lambda self, like, block: iter([torch.zeros_like(like)]))
    with caught(patched(forgets)):
        test_a_run_is_the_one_by_hand("lambda", "cyclic_poisson")


def test_the_optimizers_momentum_is_what_the_matrix_is_found_for_unless_another_is_given() -> None:
    callback = private(noise_momentum=0.0)
    run(callback, steps=3)
    assert callback.plan is not None
    assert "momentum 0.0: " in callback.plan.mechanism.numbers["noise"]


def test_the_momentum_is_the_one_an_optimizer_was_made_with() -> None:
    """OneCycleLR writes into param_groups; a resumed run would be planned for another workload."""
    weight = [torch.nn.Parameter(torch.zeros(2))]
    heavy_ball = torch.optim.SGD(weight, lr=0.1, momentum=0.7)
    torch.optim.lr_scheduler.OneCycleLR(heavy_ball, max_lr=0.1, total_steps=9)
    assert heavy_ball.param_groups[0]["momentum"] != 0.7
    given: list[tuple[list[Any], float]] = [
        ([heavy_ball], 0.7),
        ([torch.optim.Adam(weight, betas=(0.8, 0.9))], 0.8),
        ([torch.optim.Adagrad(weight)], 0.0),
        ([], 0.0),
    ]
    for optimizers, momentum in given:
        fit: Any = SimpleNamespace(optimizers=optimizers)
        assert momentum_of(fit) == momentum


@pytest.mark.parametrize(("noise", "sampling"), BOTH)
def test_with_a_known_seed_a_run_that_is_resumed_is_the_uninterrupted_one(
    noise: str, sampling: str, tmp_path: Path
) -> None:
    whole, saved = private(noise, sampling=sampling), tmp_path / "a.ckpt"
    module = heavy()
    trainer(whole, StopAt(4, lambda fit: fit.save_checkpoint(saved)), max_steps=STEPS).fit(module, data())
    resumed = private(noise, sampling=sampling)
    found, _ = run(resumed, ckpt_path=saved)
    assert torch.equal(found, weights(module))
    assert resumed.ledger is not None
    assert whole.ledger is not None
    assert resumed.ledger.epsilon() == whole.ledger.epsilon()
    assert len(resumed.ledger.state_dict()["phases"]) == 1


def test_planted_noise_that_begins_anew_at_a_resume_is_caught(tmp_path: Path) -> None:
    with caught(patched((Ledger, "begun_at", property(lambda self: self._past_steps)))):
        test_with_a_known_seed_a_run_that_is_resumed_is_the_uninterrupted_one("lambda", "cyclic_poisson", tmp_path)


@pytest.mark.parametrize(("noise", "sampling"), BOTH)
@pytest.mark.parametrize("other", [{"seed": None}, {"seed": 4}], ids=str)
def test_with_another_key_noise_begins_anew_and_is_charged_as_a_mechanism_of_its_own(
    noise: str, sampling: str, other: dict[str, Any], tmp_path: Path
) -> None:
    saved, resumed = tmp_path / "a.ckpt", private(noise, sampling=sampling, **other)
    first = private(noise, sampling=sampling)
    trainer(first, StopAt(4, lambda fit: fit.save_checkpoint(saved)), max_steps=6).fit(heavy(), data())
    run(resumed, steps=6, ckpt_path=saved)
    assert resumed.ledger is not None
    mechanism = resumed.ledger.plan.mechanism
    assert resumed.state_dict()["mechanism"][STATE]["begun"] == 4
    apart = [phase_of(mechanism, 4), phase_of(mechanism, 2)]
    assert resumed.ledger.epsilon().epsilon == pytest.approx(epsilon_bound(apart, 1e-5).epsilon)
    assert any("accounted for together began anew 1 time" in caveat for caveat in resumed.statement().caveats)
    assert not any("sampling probability changed" in caveat for caveat in resumed.statement().caveats)
    if sampling == "balls_in_bins":  # in place of one of two blocks
        assert [(phase.steps, phase.blocks) for phase in resumed.ledger.phases] == [(2, 1)]
    elif noise == "banded":  # ⌈4/3⌉ + ⌈2/3⌉ rounds, where together they would be ⌈6/3⌉
        assert resumed.ledger.phases == (Phase(SIGMA, 0.75, 3),)


def test_planted_stretches_that_go_on_with_another_key_are_caught(tmp_path: Path) -> None:
    with caught(patched((RandomKey, "digest", lambda self: "one for all"))):
        test_with_another_key_noise_begins_anew_and_is_charged_as_a_mechanism_of_its_own(
            "banded", "cyclic_poisson", {"seed": 4}, tmp_path
        )


REVERSED = Subset(regression_data(EXAMPLES), list(reversed(range(EXAMPLES))))


@pytest.mark.parametrize(("noise", "sampling"), [("banded", "cyclic_poisson"), ("lambda", "balls_in_bins")])
def test_a_run_of_a_known_seed_is_not_resumed_on_another_order_of_the_data(
    noise: str, sampling: str, tmp_path: Path
) -> None:
    """An example would be in another group or bin, and so in steps that were not left to it."""
    saved = tmp_path / "a.ckpt"
    first = private(noise, sampling=sampling)
    trainer(first, StopAt(4, lambda fit: fit.save_checkpoint(saved)), max_steps=6).fit(heavy(), data())
    refused = private(noise, sampling=sampling)
    with pytest.raises(
        PreflightError, match=f"sampling='{sampling}' resumed with the same seed on a dataset whose indices"
    ):
        trainer(refused, max_steps=6).fit(heavy(), loader(REVERSED, batch_size=BATCH), ckpt_path=saved)
    anew = private(noise, sampling=sampling, seed=4)
    trainer(anew, max_steps=6).fit(heavy(), loader(REVERSED, batch_size=BATCH), ckpt_path=saved)
    assert anew.ledger is not None
    assert len(anew.ledger.state_dict()["phases"]) == 2


def test_a_planted_order_that_nobody_looks_at_is_caught(tmp_path: Path) -> None:
    with caught(patched((planning_module, "order", lambda dataset: "some"))):
        test_a_run_of_a_known_seed_is_not_resumed_on_another_order_of_the_data("banded", "cyclic_poisson", tmp_path)


class CrashError(Exception):
    """Planted."""


def crash(_: Any) -> None:
    raise CrashError


@pytest.mark.parametrize("seed", [3, None])
@pytest.mark.filterwarnings("ignore:An interrupted fit took 2 steps")
def test_steps_lost_in_a_crash_are_charged_with_the_noise_they_had_and_what_goes_on_has_other(
    seed: int | None, tmp_path: Path
) -> None:
    saved, first, resumed = tmp_path / "a.ckpt", private(seed=seed), private(seed=seed)
    stops = (StopAt(4, lambda fit: fit.save_checkpoint(saved)), StopAt(6, crash))
    with pytest.raises(CrashError):
        trainer(first, *stops, max_steps=8, default_root_dir=tmp_path).fit(heavy(), data())
    run(resumed, steps=8, ckpt_path=saved, default_root_dir=tmp_path)
    assert resumed.ledger is not None
    assert resumed.ledger.steps == 6 + 4
    assert resumed.ledger.phases == (Phase(SIGMA, 0.75, 2 + 2),)  # ⌈6/3⌉ + ⌈4/3⌉
    assert resumed.state_dict()["mechanism"][STATE]["begun"] == 6
    assert len({entry["stretch"] for entry in resumed.ledger.state_dict()["phases"]}) == 2


def test_independent_and_correlated_noise_follow_each_other_as_mechanisms_of_their_own(tmp_path: Path) -> None:
    plain = DifferentialPrivacy(noise_multiplier=SIGMA, clip_norm=CLIP, seed=3)
    _, fit = run(plain, steps=3)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    second = private()
    _, fit = run(second, steps=7, ckpt_path=tmp_path / "a.ckpt")
    assert second.ledger is not None
    assert second.ledger.phases == (Phase(SIGMA, BATCH / EXAMPLES, 3), Phase(SIGMA, 3 * BATCH / EXAMPLES, 2))
    assert second.state_dict()["mechanism"][STATE]["begun"] == 3
    fit.save_checkpoint(tmp_path / "b.ckpt")
    third = DifferentialPrivacy(noise_multiplier=SIGMA, clip_norm=CLIP, seed=3)
    run(third, steps=9, ckpt_path=tmp_path / "b.ckpt")
    assert third.ledger is not None
    assert [phase.steps for phase in third.ledger.phases] == [3, 2, 2]


@pytest.mark.parametrize(("noise", "sampling"), BOTH)
def test_a_target_is_reached_and_not_passed(noise: str, sampling: str) -> None:
    callback = private(noise, epsilon=8.0, noise_multiplier=None, sampling=sampling)
    run(callback)
    assert callback.ledger is not None
    assert 7.9 < callback.ledger.epsilon().epsilon <= 8.0
    assert callback.ledger.steps == STEPS


def test_what_is_said_of_it() -> None:
    callback = private()
    run(callback)
    statement = callback.statement()
    assert statement.sampling == "cyclic Poisson"
    assert statement.noise == (
        "Gaussian noise in floating point, correlated over the steps (banded: its strategy matrix has 3 bands)"
    )
    assert (
        "noise is correlated over the steps: an example takes part in at most one of 3 steps, and its turns are accounted for "
        "as 3 steps of the Poisson-subsampled Gaussian mechanism with q = 0.75"
    ) in statement.caveats
    other = private("lambda")
    run(other)
    assert any(
        "are accounted for as one Gaussian mechanism with σ = " in caveat for caveat in other.statement().caveats
    )
    bins = private("lambda", sampling="balls_in_bins")
    run(bins)
    statement = bins.statement()
    assert statement.accountant == "MC"
    assert "Monte Carlo accountant (upper bound)" in str(statement)
    assert any("in exactly one of every 4 steps, the same in each such block: 2 blocks" in c for c in statement.caveats)
    assert any("0.001 δ over the choice of the seed, which is a part of the δ" in c for c in statement.caveats)
    assert not any("σ/√n" in caveat for caveat in statement.caveats)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            {"sampling": "poisson"},
            "noise='banded' with sampling='poisson': expected sampling='cyclic_poisson' or 'balls",
        ),
        (
            {"sampling": "random_allocation"},
            "noise='banded' with sampling='random_allocation': expected sampling='cyclic",
        ),
        (
            {"noise": "independent"},
            "sampling='cyclic_poisson' with noise='independent': expected noise that is correlated",
        ),
        ({"noise_bands": 5}, "noise_bands=5 with expected_batch_size=6 of 24: expected at most 4 bands"),
        (
            {"noise_bands": 8, "expected_batch_size": 2},
            "noise_bands=8 with 7 steps: expected at most as many bands as steps",
        ),
        ({"simulate": 2}, "noise='banded' with simulate=2: expected simulate=1"),
        ({"max_batch_size": 9}, "noise='banded' with max_batch_size=9: expected max_batch_size=None"),
        ({"secure": True, "seed": None}, "noise='banded' with secure=True: expected secure=False"),
        ({"privacy_unit": list(range(24))}, "noise='banded' with privacy_unit=…: expected privacy_unit=None"),
        ({"public_optimizers": [0]}, r"noise='banded' with public_optimizers=\[0\]: expected public_optimizers=\[\]"),
        ({"clipping": "quantile"}, "noise='banded' with clipping='quantile': expected a clip norm that stays"),
        ({"noise": "pink"}, "noise='pink': expected one of 'independent', 'banded', 'lambda', 'bisr'"),
        ({"noise_bands": 0}, "noise_bands=0: expected at least 1"),
        ({"noise_momentum": 1.0}, r"noise_momentum=1.0: expected a number in \[0, 1\)"),
        ({"sampling": "shuffled"}, "sampling='shuffled': expected one of 'poisson'"),
        ({"sampling": "b_min_sep"}, "No bound of b-min-sep sampling holds in both directions"),
    ],
)
def test_what_is_not_proved_is_refused(options: dict[str, Any], problem: str) -> None:
    with pytest.raises((ValueError, PreflightError), match=problem):
        run(private(**options))


class ByHand(Regressor):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


def test_manual_optimization_and_a_run_without_an_end_are_refused() -> None:
    with pytest.raises(PreflightError, match="noise='banded' with manual optimization: expected automatic"):
        trainer(private(), max_steps=STEPS).fit(ByHand(), data())
    with pytest.raises(PreflightError, match="noise='banded' without an end: expected Trainer"):
        trainer(private(), max_steps=-1, max_time="00:00:01:00").fit(regressor(), data())


@pytest.mark.parametrize("noise", BANDS)
def test_what_is_charged_agrees_with_dp_accounting(noise: str) -> None:
    """Composed from its own events: the sampled Gaussian in rounds, or one Gaussian of the sensitivity by matrices."""
    callback = private(noise, noise_multiplier=1.3)
    run(callback)
    assert callback.ledger is not None
    mechanism = callback.ledger.plan.mechanism
    correlation = mechanism.noise.correlation
    assert correlation is not None
    event: Any = dp_event.SelfComposedDpEvent(
        dp_event.PoissonSampledDpEvent(3 * BATCH / EXAMPLES, dp_event.GaussianDpEvent(1.3)), 3
    )
    if noise != "banded":
        column = np.zeros(STEPS)
        column[: correlation.bands] = correlation.matrix
        strategy = np.linalg.inv(toeplitz(column, np.zeros(STEPS)))
        strategy /= np.linalg.norm(strategy, axis=0).max()
        moved = np.linalg.norm(strategy[:, :: EXAMPLES // BATCH].sum(1))
        event = dp_event.GaussianDpEvent(1.3 / moved)
    other = PLDAccountant()
    other.compose(event)
    assert callback.ledger.epsilon().epsilon == pytest.approx(other.get_epsilon(1e-5), rel=2e-3, abs=0.012)


@pytest.mark.parametrize("noise", BANDS)
def test_more_steps_than_a_sensitivity_is_computed_of_have_no_bound(noise: str) -> None:
    text = str(Correlation.found(noise, steps=20, momentum=0.9, groups=4, bands=3))
    mechanism = Mechanism.of(
        noise_multiplier=2.0,
        clip_norm=1.0,
        dataset_size=24,
        expected_batch_size=6,
        sampling="cyclic_poisson",
        noise=text,
    )
    phases = [phase_of(mechanism, steps) for steps in (1, 3, 4, 20, 21, 1000, 10**12)]
    losses = [epsilon_bound([phase], 1e-5).epsilon if phase.steps < 10**4 else math.inf for phase in phases]
    assert losses == sorted(losses)
    assert phases[-1] == (Phase(2.0, 0.75, -(-(10**12) // 3)) if noise == "banded" else Phase(0.0, 1.0, 1))


PLANTED: dict[str, Any] = {
    "charged as if a group were everybody": (
        Mechanism,
        "event",
        lambda self: Event(self.noise.noise_multiplier, 1 / 12),
    ),
    "one turn for all of them": (Correlation, "sensitivity", lambda self, steps, groups: 1.0),
}


def test_planted_charges_are_caught() -> None:
    for name, noise in zip(PLANTED, ("banded", "lambda"), strict=True):
        with caught(patched(PLANTED[name])):
            test_what_is_charged_agrees_with_dp_accounting(noise)


def test_planted_draws_of_everybody_in_every_step_are_caught() -> None:
    def everybody(key: RandomKey, groups: Any, step: int, probability: float) -> Any:
        return poisson_sample(key.generator(Stream.SAMPLING, step), EXAMPLES, BATCH / EXAMPLES)

    with caught(patched((draws_module, "cyclic_poisson_sample", everybody))):
        test_a_run_is_the_one_by_hand("banded", "cyclic_poisson")
