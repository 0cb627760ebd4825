"""``max_batch_size``: no step uses more examples, δ pays for it, and nobody is told otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest

from lightning_dp import DifferentialPrivacy
from lightning_dp.accounting.binomial import at_least
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.sampling import cut
from tests.conftest import Notes, loader, regressor, sample_of, trainer
from tests.loading import test_loader as loaders
from tests.mechanism.laws import CAUGHT, FALSE_ALARM, poisson_sampling_p_values
from tests.training import test_refusals as refusals

BOUND = 40


class Sizes(L.Callback):
    """The sizes of the steps' batches and of their micro-batches."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, _: int) -> None:
        self.steps.append(len(sample_of(trainer).indices))


def test_a_run_uses_no_more_than_the_bound_and_says_so() -> None:
    module, sizes, micro_batches = regressor(lr=0.01), Sizes(), Notes()
    whole = module.training_step

    def training_step(batch: Any, batch_idx: int) -> Any:
        micro_batches.append(len(batch[0]))
        return whole(batch, batch_idx)

    module.training_step = training_step
    private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, max_batch_size=BOUND, engine="loop")
    trainer(private, sizes, max_steps=12).fit(module, loader())
    assert len(sizes.steps) == 12
    assert max(sizes.steps) <= BOUND
    assert private.ledger is not None
    (phase,) = private.ledger.phases
    assert phase.seldom is not None
    assert phase.seldom.probability == pytest.approx(at_least(64, 0.25, BOUND), rel=1e-9, abs=0)
    assert phase.seldom.probability > 0
    statement = json.loads(Path("privacy.json").read_text(encoding="utf-8"))
    assert statement["max_batch_size"] == BOUND
    assert statement["sampling"] == "truncated Poisson"
    plain = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3)
    trainer(plain, max_steps=12).fit(regressor(), loader())
    assert plain.statement().epsilon < private.statement().epsilon < plain.statement().epsilon + 0.05


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_bound_holds_over_all_ranks_together_and_for_each_micro_batch(world_size: int) -> None:
    """A bound that cuts every other step, although no accountant would accept it."""
    ranks = []
    for rank in range(world_size):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loaders, "plan", lambda **fields: PLAN(**fields, max_batch_size=14))
            ranks.append(loaders.poisson_loader(30, 15, rank=rank, world_size=world_size, physical_batch_size=14))
    cut_steps = 0
    for step in range(60):
        parts = [rank._draws.at(step)[0] for rank in ranks]
        together = np.sort(np.concatenate(parts))
        whole = loaders.expected_draw(step, 30, 15)
        assert set(together) <= set(whole)
        assert len(together) == len(set(together)) == min(14, len(whole)) == ranks[0]._draws.at(step)[1]
        cut_steps += len(whole) > 14
    assert 20 < cut_steps < 55
    for rank in ranks:
        for batch in rank:
            assert all(size <= 14 for _, size in batch.micro_batches())


PLAN = loaders.plan


def sampled(wrong: bool) -> np.ndarray[Any, np.dtype[np.bool_]]:
    key, members = RandomKey.from_seed(5), np.zeros((6000, 30), dtype=bool)
    for step in range(6000):
        generator = key.generator(Stream.SAMPLING, step, 1)
        members[step, np.arange(30)[:9] if wrong else cut(generator, np.arange(30), 9)] = True
    return members


def test_what_stays_of_a_cut_draw_is_a_uniform_part() -> None:
    """Every example as often as every other, whatever its index."""
    for wrong in (False, True):
        p_values = poisson_sampling_p_values(sampled(wrong), 9 / 30)
        frequency = p_values["every example's frequency"]
        assert frequency < CAUGHT if wrong else frequency > FALSE_ALARM


def test_with_a_target_the_noise_pays_for_the_bound() -> None:
    noise = []
    for bound in (None, 20):
        private = DifferentialPrivacy(epsilon=2.0, delta=1e-3, max_batch_size=bound)
        trainer(private, max_steps=10).fit(regressor(), loader())
        assert private.plan is not None
        assert 1.9 < private.statement().epsilon <= 2.0
        noise.append(private.plan.noise_multiplier)
    assert noise[0] < noise[1]


def test_a_resumed_run_keeps_what_the_bound_has_cost(tmp_path: Path) -> None:
    first = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, max_batch_size=38)
    fit = trainer(first, max_steps=4)
    fit.fit(regressor(), loader())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    second = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, max_batch_size=50)
    trainer(second, max_steps=8).fit(regressor(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert second.ledger is not None
    found = [phase.seldom and phase.seldom.probability for phase in second.ledger.phases]
    assert found == [at_least(64, 0.25, bound) for bound in (38, 50)]
    assert any("changed during training from 38 to 50" in caveat for caveat in second.statement().caveats)


def test_bounds_that_cannot_be_are_refused() -> None:
    private: dict[str, Any] = {"noise_multiplier": 1.0, "delta": 1e-3, "sampling": "random_allocation"}
    refusals.refused(ValueError, "max_batch_size=20", "at least 3", private={**private, "max_batch_size": 20})
