"""``sampling="random_allocation"`` and ``"balls_in_bins"``: each example in exactly one step of a block, also when resumed."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy import stats
from torch.utils.data import Subset

import lightning_dp.accounting.phase as phase_module
import lightning_dp.loading.draws as draws_module
from lightning_dp import DifferentialPrivacy, PreflightError
from lightning_dp.accounting import epsilon_bound
from lightning_dp.accounting.phase import phase_of
from lightning_dp.audit import audit
from lightning_dp.loading.draws import Draws
from lightning_dp.mechanism.keystream import Keystream
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.sampling import allocation, distinct_steps, exact_allocation
from lightning_dp.plan.privacy_plan import PrivacyPlan
from tests import harness
from tests.conftest import Regressor, loader, regression_data, regressor, sample_of, trainer, weights
from tests.guarantees.mutations import patched

SCHEMES = ("random_allocation", "balls_in_bins")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*steps to take in blocks of"),
]


class Members(L.Callback):
    """Who is in the sample of each step."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, _: int) -> None:
        self.steps.append(sample_of(trainer).indices.tolist())


def private(sampling: str, **options: Any) -> DifferentialPrivacy:
    numbers = {"noise_multiplier": 1.0, "delta": 1e-3, "engine": "vmap", **options}
    return DifferentialPrivacy(sampling=sampling, **numbers)


def fitted(dp: DifferentialPrivacy, *callbacks: L.Callback, steps: int = 8, size: int = 16, **options: Any) -> Any:
    module = regressor(lr=0.1)
    path = options.pop("ckpt_path", None)
    trainer(dp, *callbacks, max_steps=steps, **options).fit(module, loader(batch_size=size), ckpt_path=path)
    return module


@pytest.mark.parametrize(
    ("sampling", "secure"), [("random_allocation", False), ("random_allocation", True), ("balls_in_bins", False)]
)
def test_every_example_is_in_exactly_one_step_of_a_block(sampling: str, secure: bool) -> None:
    dp, members = private(sampling, secure=secure, engine="loop" if secure else "vmap"), Members()
    fitted(dp, members, steps=12)
    blocks = [members.steps[start : start + 4] for start in (0, 4, 8)]
    for block in blocks:
        assert sorted(itertools.chain(*block)) == list(range(64))
    assert len({len(step) for step in members.steps}) > 1  # no fixed size, which would tell of the others
    assert (blocks[0] == blocks[1] == blocks[2]) == (sampling == "balls_in_bins")
    assert (blocks[0] == blocks[1]) == (sampling == "balls_in_bins")
    assert dp.plan is not None
    bound = epsilon_bound([phase_of(dp.plan.mechanism, 12)], 1e-3).epsilon
    assert bound <= dp.statement().epsilon <= bound * 1.01  # a share of δ pays for discrete noise
    said = json.loads(Path("privacy.json").read_text(encoding="utf-8"))
    assert (said["sampling"], said["accountant"]) == (sampling.replace("_", "-"), "PLD")
    assert any(caveat.startswith("each example is in exactly one of every 4 steps") for caveat in said["caveats"])
    assert f"{sampling.replace('_', '-')} sampling with q = 0.25, σ = 1.0" in str(dp.statement())


@pytest.mark.parametrize("secure", [False, True])
def test_every_example_is_in_exactly_as_many_steps_of_a_block_as_asked(secure: bool) -> None:
    dp, members = private("random_allocation", participations=3, secure=secure, engine="loop"), Members()
    fitted(dp, members, steps=24)
    for block in (members.steps[:12], members.steps[12:]):
        assert sorted(itertools.chain(*block)) == sorted([*range(64)] * 3)
        assert all(len(set(step)) == len(step) for step in block)
        assert any(sorted(itertools.chain(*block[at : at + 4])) != [*range(64)] for at in (0, 4, 8))
    assert members.steps[:12] != members.steps[12:]
    assert dp.ledger is not None
    if not secure:
        assert dp.ledger.phases == (phase_module.Phase(1.0, 0.25, 6, "allocation"),)
    said = [
        caveat for caveat in dp.statement().caveats if caveat.startswith("each example is in exactly 3 of every 12")
    ]
    assert len(said) == 1
    assert said[0].endswith("counts as 3 blocks of 4 steps with one each")
    assert dp.ledger.numbers["participations"] == 3


def test_every_set_of_steps_is_as_likely() -> None:
    def fast(number: int) -> Any:
        generator = np.random.default_rng(number)
        return lambda steps: allocation(generator, 3000, steps)

    def exact(number: int) -> Any:
        stream = Keystream(number.to_bytes(32, "big"))
        return lambda steps: exact_allocation(stream, 3000, steps)

    for make in (fast, exact):
        places = np.concatenate([distinct_steps(make(n), 5, 3) for n in range(4)])
        sets = Counter(tuple(sorted(row)) for row in places.tolist())
        assert len(sets) == 10
        assert stats.chisquare(list(sets.values())).pvalue > 1e-6
        assert np.array_equal(distinct_steps(make(7), 5, 1)[:, 0], make(7)(5))


@pytest.mark.parametrize("sampling", SCHEMES)
def test_a_run_is_the_loop_by_hand(sampling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = harness.Setting(steps=6, sigma=0.7, batch=6, examples=18)
    key, step = RandomKey.from_seed(setting.seed), itertools.count()

    def drawn(_: np.random.Generator, size: int, q: float) -> Any:
        number, place = divmod(next(step), 3)
        first = 3 * number if sampling == "random_allocation" else 0
        return np.flatnonzero(key.generator(Stream.SAMPLING, first).integers(3, size=size) == place)

    monkeypatch.setattr(harness, "poisson_sample", drawn)
    torch.testing.assert_close(
        harness.by_package(setting, "vmap", sampling=sampling), harness.by_hand(setting), rtol=1e-4, atol=1e-5
    )


def test_places_are_uniform_and_independent() -> None:
    for make in (
        lambda n: allocation(np.random.default_rng(n), 2000, 6),
        lambda n: exact_allocation(Keystream(n.to_bytes(32, "big")), 2000, 6),
    ):
        places = np.stack([make(n) for n in range(30)])
        assert places.min() == 0
        assert places.max() == 5
        assert stats.chisquare(np.bincount(places.ravel())).pvalue > 1e-6
        pairs = np.bincount(places[:, 0::2].ravel() * 6 + places[:, 1::2].ravel(), minlength=36)
        assert stats.chisquare(pairs).pvalue > 1e-6
        sizes = np.stack([np.bincount(row, minlength=6) for row in places]).ravel()
        assert 0.6 < sizes.var() / (2000 * 5 / 36) < 1.5  # Binomial(N, 1/k): a shuffle into equal parts would have none


def test_words_that_would_favour_some_steps_are_drawn_again() -> None:
    class Top(Keystream):
        def words(self, count: int) -> Any:
            return np.full(count, 2**64 - 1, dtype=np.uint64)

    assert exact_allocation(Top(bytes(32)), 4, 4).tolist() == [3, 3, 3, 3]  # 2⁶⁴ is a multiple of 4: all words are fair
    assert len(set(exact_allocation(Top(bytes(32)), 400, 5).tolist())) == 5


@pytest.mark.parametrize("sampling", SCHEMES)
def test_ranks_share_one_allocation_and_neighbours_do_not_move_each_other(sampling: str) -> None:
    plan = PrivacyPlan(
        noise_multiplier=1.0, clip_norm=1.0, delta=1e-5, dataset_size=40, expected_batch_size=10, sampling=sampling
    )  # fmt: skip
    key = RandomKey.from_seed(3)
    whole = Draws(range(40), plan, key, 0, 1, None, 5)
    without = Draws(range(40), plan, key, 0, 1, None, 5)
    without.left_out = [7]
    ranks = [Draws(range(40), plan, key, rank, 3, None, 5) for rank in range(3)]
    for step in [*range(5, 21), 8, 9, 12, 5]:  # workers read ahead, and a loop goes back
        drawn = whole.at(step)[0].tolist()
        assert sorted(np.concatenate([rank.at(step)[0] for rank in ranks]).tolist()) == drawn
        assert without.at(step)[0].tolist() == [index for index in drawn if index != 7]
    for start in range(5, 21, 4):
        assert sorted(itertools.chain(*(whole.at(step)[0].tolist() for step in range(start, start + 4)))) == list(
            range(40)
        )
    with pytest.raises(ValueError, match="step=4: expected at least 5"):
        whole.at(4)


def interrupted(
    sampling: str, before: int | None, after: int | None, at: int, folder: Path
) -> tuple[DifferentialPrivacy, Any, Members]:
    """Trained to a checkpoint at a step, and on from it to step 8 by another process's callback."""
    saved = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=at, save_top_k=-1)
    fitted(private(sampling, seed=before), saved, steps=at, enable_checkpointing=True, default_root_dir=str(folder))
    dp, members = private(sampling, seed=after), Members()
    module = fitted(dp, members, ckpt_path=str(folder / f"step={at}.ckpt"), default_root_dir=str(folder / "b"))
    return dp, module, members


@pytest.mark.parametrize(("sampling", "at"), [("random_allocation", 6), ("balls_in_bins", 6), ("random_allocation", 4)])
def test_resumed_with_a_seed_is_uninterrupted(sampling: str, at: int, tmp_path: Path) -> None:
    whole, members = private(sampling, seed=7), Members()
    trained = fitted(whole, members)
    dp, module, resumed = interrupted(sampling, 7, 7, at, tmp_path)
    assert members.steps[at:] == resumed.steps
    torch.testing.assert_close(weights(module), weights(trained), rtol=0, atol=0)
    assert dp.statement().epsilon == whole.statement().epsilon
    assert dp.ledger.phases == whole.ledger.phases


@pytest.mark.parametrize(
    ("sampling", "before", "after"),
    [("random_allocation", None, None), ("balls_in_bins", None, None), ("balls_in_bins", 7, 8)],
)
def test_another_key_begins_new_blocks_and_is_charged_for_them(
    sampling: str, before: int | None, after: int | None, tmp_path: Path
) -> None:
    dp, _, members = interrupted(sampling, before, after, 6, tmp_path)
    assert dp.ledger is not None
    mechanism = dp.ledger.plan.mechanism
    assert dp.ledger.phases in (
        (phase_of(mechanism, 6), phase_of(mechanism, 2)),
        (phase_of(mechanism, 6 + 4),),  # three blocks of an allocation, in one phase
    )
    bound = epsilon_bound([phase_of(mechanism, 6), phase_of(mechanism, 2)], 1e-3).epsilon
    assert dp.statement().epsilon == bound > epsilon_bound([phase_of(mechanism, 8)], 1e-3).epsilon
    assert any("began anew 1 time," in caveat for caveat in dp.statement().caveats)
    assert len(set(itertools.chain(*members.steps))) == sum(map(len, members.steps))  # of one new block


@contextmanager
def every_key_goes_on() -> Iterator[None]:
    """The allocation of a key that is gone is taken to go on, as where blocks are counted by the steps of the ledger."""
    with patched((RandomKey, "digest", lambda self: "the same")):
        yield


@contextmanager
def a_part_of_a_block_is_free() -> Iterator[None]:
    original = phase_module.phase_of_numbers

    def rounded_down(sigma: float, q: float, steps: int, sampling: Any = "poisson", times: int = 1) -> Any:
        return original(sigma, q, steps if sampling == "poisson" else steps - steps % round(1 / q), sampling, times)

    with patched((phase_module, "phase_of_numbers", rounded_down)):
        yield


@contextmanager
def accounted_for_as_poisson() -> Iterator[None]:
    def poisson(sigma: float, q: float, steps: int, *_: Any) -> Any:
        return phase_module.Phase(sigma, q, steps)

    with patched((phase_module, "phase_of_numbers", poisson)):
        yield


@contextmanager
def with_replacement() -> Iterator[None]:
    """The same step of a block may be drawn twice."""

    def again(draw: Any, block: int, times: int) -> Any:
        return np.stack([draw(block) for _ in range(times)], axis=1)

    with patched((draws_module, "distinct_steps", again)):
        yield


@contextmanager
def drawn_anew_for_every_step() -> Iterator[None]:
    """Each step allocates for itself: an example may be in several steps of a block, or in none."""
    original = draws_module.Draws._in_the_block

    def anew(self: Any, step: int) -> Any:
        self._allocated = {}
        self._begun_at = step
        return original(self, step)

    with patched((draws_module.Draws, "_in_the_block", anew)):
        yield


def test_planted_bugs_are_caught(tmp_path: Path) -> None:
    with every_key_goes_on(), pytest.raises(AssertionError):
        test_another_key_begins_new_blocks_and_is_charged_for_them("random_allocation", None, None, tmp_path)
    with with_replacement(), pytest.raises(AssertionError):
        test_every_example_is_in_exactly_as_many_steps_of_a_block_as_asked(False)
    with drawn_anew_for_every_step(), pytest.raises(AssertionError):
        test_every_example_is_in_exactly_one_step_of_a_block("random_allocation", False)
    with accounted_for_as_poisson(), pytest.raises(AssertionError):
        test_a_partial_block_is_told_of_and_costs_the_whole("balls_in_bins")
    with a_part_of_a_block_is_free(), pytest.raises(AssertionError):
        test_a_partial_block_is_told_of_and_costs_the_whole("random_allocation")


@pytest.mark.parametrize("sampling", SCHEMES)
def test_a_partial_block_is_told_of_and_costs_the_whole(sampling: str) -> None:
    dp = private(sampling)
    with pytest.warns(UserWarning, match=r"6 steps to take in blocks of 4: expected a multiple of 4, such as 4 or 8"):
        fitted(dp, steps=6)
    assert dp.plan is not None
    whole = private(sampling)
    fitted(whole, steps=8)
    assert dp.statement().epsilon == whole.statement().epsilon
    assert whole.statement().accountant == "PLD"


def test_the_batch_is_made_to_fit_and_noise_is_found_for_whole_blocks() -> None:
    dp = private("random_allocation", noise_multiplier=None, epsilon=2.0)
    fitted(dp, steps=10, size=15)  # 64 / 15 is no whole number: 5 steps of 12.8
    assert dp.plan is not None
    assert (dp.plan.expected_batch_size, dp.plan.mechanism.sampling.block) == (12.8, 5)
    assert 1.98 <= dp.statement().epsilon <= 2.0
    assert epsilon_bound([phase_of(dp.plan.mechanism, 15)], 1e-3).epsilon > 2.0


@pytest.mark.parametrize("sampling", SCHEMES[:1])  # in one block the other is the same
def test_an_audit_stays_below_the_claim(sampling: str) -> None:
    result = audit(
        trainer(private(sampling, noise_multiplier=None, epsilon=6.0, delta=1e-5, seed=0), max_steps=4),
        regressor(lr=0.1), loader(batch_size=32), gradient_canaries=1000, input_canaries=10, seed=0,
    )  # fmt: skip
    assert result.verdict == "consistent"
    assert 1.0 < result.epsilon_lower < result.epsilon_claimed <= 6.0
    assert result.plan_p_value is not None
    assert result.plan_p_value > 1e-6


class EverySecond(Regressor):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        if batch_idx % 2:
            self.manual_backward(loss)
            self.optimizers().step()


def test_what_is_not_proved_is_refused() -> None:
    with pytest.raises(ValueError, match=r"simulate=2 with sampling='balls_in_bins': expected sampling='poisson'"):
        private("balls_in_bins", simulate=2)
    with pytest.raises(
        ValueError, match=r"participations=2 with sampling='balls_in_bins': expected sampling='random_allo"
    ):
        private("balls_in_bins", participations=2)
    with pytest.raises(ValueError, match=r"participations=0"):
        private("random_allocation", participations=0)
    with pytest.raises(ValueError, match=r"sampling='shuffle': expected one of 'poisson'"):
        private("shuffle")
    with pytest.raises(PreflightError, match=r"reload_dataloaders_every_n_epochs: expected one training loader"):
        fitted(private("random_allocation"), reload_dataloaders_every_n_epochs=1)
    subset = Subset(regression_data(), list(range(64)))

    class Reorders(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            subset.indices = list(reversed(subset.indices))

    with pytest.raises(ValueError, match=r"dataset=Subset has other indices than when its loader was made"):
        trainer(private("balls_in_bins"), Reorders(), max_steps=8).fit(regressor(), loader(subset))
    with pytest.raises(PreflightError, match=r"expected a private step in every training_step"):
        trainer(private("random_allocation"), max_steps=8).fit(EverySecond(), loader())
