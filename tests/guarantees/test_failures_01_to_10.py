"""Rows 1 to 10 of the field's silent failures. Each check holds here, and fails when the bug is planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import WeightedRandomSampler

from lightning_dp import DifferentialPrivacy, PreflightError
from lightning_dp.engines.select import ENGINES, EngineName
from lightning_dp.step.engine_comparison import EngineComparison
from tests.conftest import Regressor, loader, regression_data, regressor, sample_of, trainer, weights
from tests.engines import oracle
from tests.engines.family import case
from tests.guarantees import mutations
from tests.guarantees import mutations_outside as outside
from tests.guarantees.mutations import caught
from tests.guarantees.on_ranks import WRONG, WRONG_AND_DISCRETE, noise_on_two_ranks
from tests.harness import Setting, by_hand
from tests.loading import test_loader as loaders
from tests.mechanism.laws import (
    CAUGHT,
    FALSE_ALARM,
    noise_p_values,
    poisson_sampling_p_values,
    standard_normal_p_values,
)
from tests.training import test_randomness as randomness
from tests.training import test_refusals as refusals
from tests.training import test_step_equals_loop as whole_step

EVERY_ENGINE = [name for name in get_args(EngineName) if name != "auto"]


def sampling_p_values(steps: int = 150, expected: int = 24) -> dict[str, float]:
    """How likely the draws of a real run are under the q that its ledger charged."""
    members = np.zeros((steps, 64), dtype=bool)
    module = regressor(lr=0.0)
    private = DifferentialPrivacy(noise_multiplier=1.0, expected_batch_size=expected)

    def remember(batch: Any, batch_idx: int) -> None:
        sample = sample_of(module.trainer)
        members[sample.step, sample.indices.numpy()] = True

    module.on_train_batch_start = remember
    trainer(private, max_steps=steps).fit(module, loader())
    assert private.ledger is not None
    (phase,) = private.ledger.phases
    assert phase.steps == steps
    return poisson_sampling_p_values(members, phase.sampling_probability)


def test_01_the_private_gradient_is_made_but_not_used() -> None:
    def check() -> None:
        """The first step's weights hold the noise of a huge σ, and little else."""
        module = regressor(hidden=200, lr=1.0)
        before = weights(module)
        private = DifferentialPrivacy(noise_multiplier=1e4, expected_batch_size=16)
        trainer(private, max_steps=1).fit(module, loader())
        noise = (weights(module) - before).numpy() * 16 / 1e4
        assert min(standard_normal_p_values(noise).values()) > FALSE_ALARM

    check()
    with caught(mutations.private_gradient_made_but_not_used()):
        check()
    with caught(mutations.private_gradient_made_but_not_used()):
        randomness.test_a_huge_sigma_does_not_learn()


@pytest.mark.parametrize(
    "wrong", [mutations.divisor_is_the_realised_batch, mutations.divisor_from_the_private_dataset_size]
)
def test_02_the_divisor_depends_on_the_private_data(wrong: mutations.Mutation) -> None:
    whole_step.test_the_divisor_is_public_and_not_the_realised_batch()
    with caught(wrong()):
        whole_step.test_the_divisor_is_public_and_not_the_realised_batch()


def test_03_a_weighted_sampler_is_accounted_with_one_over_the_loaders_length() -> None:
    def check() -> None:
        weighted = loader(sampler=WeightedRandomSampler([1.0, *[0.01] * 63], 64))
        refusals.refused(PreflightError, "WeightedRandomSampler", "same probability", data=weighted)

    check()
    with caught(outside.any_loader_is_accepted()):
        check()
    assert min(sampling_p_values().values()) > FALSE_ALARM
    with outside.accounted_with_one_over_the_loaders_length():
        assert min(sampling_p_values(expected=30).values()) < CAUGHT


def test_04_shuffled_batches_are_accounted_as_poisson_samples() -> None:
    assert min(sampling_p_values().values()) > FALSE_ALARM
    with outside.shuffled_fixed_batches():
        assert min(sampling_p_values().values()) < CAUGHT


@pytest.mark.parametrize("wrong", [outside.empty_local_batches_are_dropped, outside.own_draw_on_every_rank])
def test_05_ranks_drop_empty_batches_or_draw_identical_masks(wrong: mutations.Mutation) -> None:
    def check() -> None:
        """Three ranks of a loader whose steps are often empty: all take every step, and draw by the law together."""
        ranks = [
            loaders.poisson_loader(examples=9, expected=0.01, epoch=900, rank=rank, world_size=3) for rank in range(3)
        ]
        steps = [[batch.step for batch in rank] for rank in ranks]
        assert steps == [list(range(900))] * 3
        ranks = [
            loaders.poisson_loader(examples=30, expected=0.03, epoch=1000, rank=rank, world_size=3) for rank in range(3)
        ]
        members = np.zeros((1000, 30), dtype=bool)
        with pytest.MonkeyPatch.context() as patch:  # a larger q than the short epoch of a test would allow
            patch.setattr(type(ranks[0].plan), "sampling_probability", 0.3)
            for rank in ranks:
                for batch in rank:
                    members[batch.step, batch.indices.numpy()] = True
        assert min(poisson_sampling_p_values(members, 0.3).values()) > FALSE_ALARM

    check()
    with caught(wrong()):
        check()


def test_06_an_empty_draw_is_skipped() -> None:
    randomness.test_a_storm_of_empty_draws_is_noise_and_accounted_steps()
    with caught(mutations.empty_steps_are_skipped(charged=True)):
        randomness.test_a_storm_of_empty_draws_is_noise_and_accounted_steps()
    with mutations.empty_steps_are_skipped(charged=False), pytest.raises(RuntimeError, match="steps are charged"):
        randomness.test_a_storm_of_empty_draws_is_noise_and_accounted_steps()


def test_07_the_noise_is_scaled_wrongly_across_ranks(tmp_path: Path) -> None:
    """Two gloo processes train for a step with a gradient of zero: what moved the weights is the noise."""
    moves = noise_on_two_ranks(tmp_path)
    assert min(noise_p_values(moves.pop("right")).values()) > FALSE_ALARM
    assert min(noise_p_values(moves.pop("right_and_discrete")).values()) > FALSE_ALARM
    assert set(moves) == {*WRONG, *(f"{name}_and_discrete" for name in WRONG_AND_DISCRETE)}
    for name, noise in moves.items():
        assert min(noise_p_values(noise).values()) < CAUGHT, name


class Adapted(Regressor):
    """A frozen layer with a low-rank adapter beside it, as LoRA does it."""

    def __init__(self) -> None:
        super().__init__(lr=0.5)
        self.net[0].requires_grad_(False)
        self.lora_a, self.lora_b = nn.Parameter(torch.randn(2, 4) / 2), nn.Parameter(torch.zeros(8, 2))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        hidden = self.net[0](batch[0]) + batch[0] @ self.lora_a.T @ self.lora_b.T
        return nn.functional.mse_loss(self.net[2](torch.tanh(hidden)).squeeze(-1), batch[1])


@pytest.mark.parametrize("engine", EVERY_ENGINE)
def test_08_the_parameters_of_an_adapter_never_move(engine: Any) -> None:
    def check() -> None:
        torch.manual_seed(0)
        module = Adapted()
        before = {name: p.detach().clone() for name, p in module.named_parameters()}
        private = DifferentialPrivacy(noise_multiplier=0.0, clip_norm=1.0, engine=engine)
        trainer(private, max_steps=3).fit(module, loader())
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter.detach(), before[name]) != parameter.requires_grad, name

    check()
    with caught(mutations.frozen_by_a_hook("lora")):
        check()


@pytest.mark.parametrize("wrong", [mutations.no_clipping, mutations.clipped_per_batch])
def test_09_an_engine_ignores_the_clip_norm(wrong: mutations.Mutation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineComparison, "is_due", False)  # which would refuse it first

    def check() -> None:
        expected = by_hand(Setting(clip=0.05, batch=16, examples=64))
        for engine in EVERY_ENGINE:
            module: L.LightningModule = regressor()
            private = DifferentialPrivacy(noise_multiplier=0.7, clip_norm=0.05, seed=3, engine=engine)
            trainer(private, max_steps=3).fit(module, loader(regression_data()))
            torch.testing.assert_close(weights(module), expected, rtol=1e-5, atol=1e-6)

    check()
    with caught(wrong()):
        check()


def clipped_sums_are_right(name: str, clip_norm: float = 0.1) -> None:
    """Every engine gives the sum of plain backward passes, in which no example exceeds the clip norm."""
    of = case(name, 6, seed=2)
    total, norms, _ = oracle.clipped_sum(of, clip_norm)
    assert min(norms) > clip_norm
    for engine in ENGINES.values():
        found = engine(of.module).clipped_sum(of.loss_function(), of.parameters(), of.batch, of.examples, clip_norm)
        assert set(found.gradient) == set(total)
        for parameter, gradient in found.gradient.items():
            torch.testing.assert_close(gradient, total[parameter], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("name", "shared", "calls"), [("reused layer", "layer", 3), ("tied weights", "embedding", 2)])
def test_10_a_shared_layer_counts_once_in_the_norm(name: str, shared: str, calls: int) -> None:
    clipped_sums_are_right(name)
    with caught(mutations.norm_without_cross_terms(shared, calls)):
        clipped_sums_are_right(name)
