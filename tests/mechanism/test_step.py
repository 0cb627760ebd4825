from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_dp.batches.microbatch import split
from lightning_dp.engines.accumulate import accumulate, private_gradient
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import Engine
from lightning_dp.engines.vmap import VmapEngine
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.sampling import poisson_sample, rank_slice
from tests.engines import oracle
from tests.engines.family import Case, case
from tests.mechanism.laws import plan, release

KEY = RandomKey.from_seed(41)
ENGINES: list[Engine] = [VmapEngine(), LoopEngine()]
EVERY_ENGINE = pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
NAMES = ["mlp", "convolution and GroupNorm", "tied weights", "scalar parameter"]


def micro_batches(of: Case, indices: Any, physical_batch_size: int) -> Iterator[tuple[Any, int]]:
    for piece in split(indices, physical_batch_size):
        yield tuple(part[piece] for part in of.batch), len(piece)


def by_hand(of: Case, indices: Any, step: int) -> dict[str, Tensor]:
    """(Σ clip(gᵢ) + N(0, (1.5 · 0.8)²)) / 7, written out with plain backward passes and NumPy's generator."""
    total, _, _ = oracle.clipped_sum(of, 0.8, indices)
    numbers = iter(KEY.generator(Stream.NOISE, step).standard_normal(sum(t.numel() for t in total.values())).tolist())
    noise = {name: [next(numbers) for _ in range(t.numel())] for name, t in total.items()}
    return {name: (t + 1.2 * torch.tensor(noise[name], dtype=t.dtype).view(t.shape)) / 7 for name, t in total.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float) -> None:
    assert list(one) == list(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)


@EVERY_ENGINE
@settings(max_examples=20)
@given(name=st.sampled_from(NAMES), physical_batch_size=st.integers(1, 12), step=st.integers(0, 50))
def test_a_private_gradient_is_a_batch_of_one_loop_with_noise_added_once(
    engine: Engine, name: str, physical_batch_size: int, step: int
) -> None:
    of = case(name, 40, seed=step)
    drawn = poisson_sample(KEY.generator(Stream.SAMPLING, step), 40, plan().sampling_probability)
    pieces = micro_batches(of, drawn, physical_batch_size)
    gradient = private_gradient(engine, of.loss_function(), of.parameters(), pieces, plan(), KEY, step)
    same(gradient, by_hand(of, drawn, step), tolerance=1e-10)


@EVERY_ENGINE
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_that_walk_different_micro_batches_release_what_one_rank_releases(
    engine: Engine, world_size: int
) -> None:
    of, mechanism = case("mlp", 40, 0), plan()
    drawn = poisson_sample(KEY.generator(Stream.SAMPLING, 0), 40, mechanism.sampling_probability)
    alone = private_gradient(
        engine, of.loss_function(), of.parameters(), micro_batches(of, drawn, 3), mechanism, KEY, 0
    )
    sent: list[Tensor] = []
    for rank in range(world_size):
        pieces = micro_batches(of, rank_slice(drawn, rank, world_size), rank + 1)
        own = accumulate(engine, of.loss_function(), of.parameters(), pieces, mechanism.clip_norm)
        release(
            own.gradient, mechanism, KEY, 0, rank=rank, size=world_size,
            total=lambda flat: sent.append(flat.clone()) or flat,
        )  # fmt: skip
    nothing = {name: torch.zeros_like(p) for name, p in of.parameters().items()}
    together = release(nothing, mechanism, KEY, 0, total=lambda _: torch.stack(sent).sum(0))
    same(together, alone, tolerance=1e-12)


@EVERY_ENGINE
def test_without_noise_and_clip_and_with_all_examples_it_is_the_mean_gradient(engine: Engine) -> None:
    of = case("mlp", 40, 0)
    mechanism = plan(noise_multiplier=0.0, clip_norm=math.inf, expected_batch_size=40)
    drawn = poisson_sample(KEY.generator(Stream.SAMPLING, 0), 40, mechanism.sampling_probability)
    pieces = micro_batches(of, drawn, 16)
    gradient = private_gradient(engine, of.loss_function(), of.parameters(), pieces, mechanism, KEY, 0)
    inputs, targets = of.batch
    of.loss(of.module(inputs), targets).backward()
    same(gradient, {name: p.grad for name, p in of.parameters().items()}, tolerance=1e-12)


@EVERY_ENGINE
def test_a_step_without_examples_is_noise_over_the_expected_batch_size(engine: Engine) -> None:
    of = case("mlp", 40, 0)
    total = accumulate(engine, of.loss_function(), of.parameters(), [], 0.8)
    assert total.examples == total.not_finite == 0
    assert all(torch.count_nonzero(tensor) == 0 for tensor in total.gradient.values())
    gradient = private_gradient(engine, of.loss_function(), of.parameters(), [], plan(), KEY, 9)
    same(gradient, by_hand(of, [], 9), tolerance=1e-10)


@EVERY_ENGINE
@settings(max_examples=20)
@given(seed=st.integers(0, 1000), gone=st.integers(0, 9))
def test_taking_one_example_away_moves_a_release_by_at_most_the_clip_norm_over_the_divisor(
    engine: Engine, seed: int, gone: int
) -> None:
    of = case("mlp", 10, seed)
    everybody = torch.arange(10).numpy()
    others = everybody[everybody != gone]

    def released(indices: Any) -> Tensor:
        pieces = micro_batches(of, indices, 4)
        gradient = private_gradient(engine, of.loss_function(), of.parameters(), pieces, plan(), KEY, 0)
        return torch.cat([tensor.flatten() for tensor in gradient.values()])

    moved = float((released(everybody) - released(others)).norm())
    assert moved <= 0.8 / 7 * (1 + 1e-6)
    assert moved > 0
