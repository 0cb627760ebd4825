from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_dp.mechanism.noise import BLOCK, share_of
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.reduce import flatten, no_reduce, unflatten
from lightning_dp.plan.privacy_plan import PrivacyPlan
from tests.guarantees import mutations
from tests.mechanism.laws import (
    CAUGHT,
    FALSE_ALARM,
    independence_p_values,
    noise_p_values,
    plan,
    release,
    standard_normal_p_values,
)

KEY = RandomKey.from_seed(31)
SHAPES = {"weight": (30, 20), "bias": (20,), "temperature": (), "none": (0, 3)}


def sums(
    seed: int = 0, shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def release_on_ranks(
    of_rank: list[dict[str, Tensor]], mechanism: PrivacyPlan, step: int = 0
) -> list[dict[str, Tensor]]:
    """What each rank releases when their vectors really are added up over all of them."""
    sent: list[Tensor] = []
    for rank, own in enumerate(of_rank):
        release(
            own,
            mechanism,
            KEY,
            step,
            rank=rank,
            size=len(of_rank),
            total=lambda flat: sent.append(flat.clone()) or flat,
        )
    return [release(own, mechanism, KEY, step, total=lambda flat: torch.stack(sent).sum(0)) for own in of_rank]


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_unflatten_undoes_flatten(shapes: list[tuple[int, ...]], seed: int) -> None:
    named = sums(seed, {str(place): shape for place, shape in enumerate(shapes)})
    flat = flatten(named)
    assert flat.shape == (sum(math.prod(shape) for shape in shapes),)
    again = unflatten(flat, named)
    assert list(again) == list(named)
    assert all(torch.equal(again[name], tensor) for name, tensor in named.items())


def test_unflatten_restores_types_and_flatten_shares_no_memory() -> None:
    named = {"a": torch.ones(2), "b": torch.ones(3, dtype=torch.float64)}
    flat = flatten(named)
    assert {name: part.dtype for name, part in unflatten(flat, named).items()} == {
        "a": torch.float32,
        "b": torch.float64,
    }
    single = {"a": torch.ones(4)}
    flatten(single).zero_()
    assert single["a"].tolist() == [1.0] * 4
    assert no_reduce(flat) is flat


def test_a_release_is_the_written_out_formula() -> None:
    total, mechanism = sums(), plan()
    released = release(total, mechanism, KEY, 6)
    numbers = KEY.generator(Stream.NOISE, 6).standard_normal(sum(t.numel() for t in total.values()))
    for name, tensor in total.items():
        z, numbers = numbers[: tensor.numel()].reshape(tensor.shape), numbers[tensor.numel() :]
        torch.testing.assert_close(released[name], (tensor + 1.5 * 0.8 * torch.as_tensor(z)) / 7, rtol=0, atol=1e-13)


def test_a_release_leaves_the_sums_as_they_are_and_can_be_repeated_to_the_bit() -> None:
    total = sums()
    before = {name: tensor.clone() for name, tensor in total.items()}
    first, second = release(total, plan(), KEY, 0), release(total, plan(), KEY, 0)
    assert all(torch.equal(total[name], before[name]) for name in total)
    assert all(torch.equal(first[name], second[name]) for name in total)


SEVERAL_BLOCKS = {"bias": (7,), "weight": (1001, 263), "gain": (70_000,)}


@pytest.mark.parametrize("shapes", [SHAPES, SEVERAL_BLOCKS], ids=["less than a block", "several blocks"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
def test_any_number_of_ranks_releases_the_noise_of_one(ranks: int, shapes: dict[str, tuple[int, ...]]) -> None:
    parts = [sums(seed, shapes) for seed in range(ranks)]
    together = {name: torch.stack([part[name] for part in parts]).sum(0) for name in shapes}
    alone = release(together, plan(), KEY, 2)
    on_ranks = release_on_ranks(parts, plan(), 2)
    for one, other in pairwise(on_ranks):
        assert all(torch.equal(one[name], other[name]) for name in shapes)
    for name in shapes:
        torch.testing.assert_close(on_ranks[0][name], alone[name], rtol=0, atol=1e-12)


def noise_of(released: dict[str, Tensor], clean: dict[str, Tensor], mechanism: PrivacyPlan) -> Any:
    difference = flatten(released) * mechanism.expected_batch_size - flatten(clean)
    return (difference / (mechanism.noise_multiplier * mechanism.clip_norm)).numpy()


@pytest.mark.parametrize(
    ("ranks", "noise_multiplier", "clip_norm"), [(1, 1.0, 1.0), (2, 0.3, 4.0), (3, 6.0, 0.05), (4, 1.5, 0.8)]
)
def test_the_noise_of_a_release_is_gaussian_of_scale_sigma_c(
    ranks: int, noise_multiplier: float, clip_norm: float
) -> None:
    mechanism = plan(noise_multiplier=noise_multiplier, clip_norm=clip_norm)
    parts = [sums(seed, {"w": (700, 500)}, torch.float32) for seed in range(ranks)]
    clean = {"w": torch.stack([part["w"] for part in parts]).sum(0)}
    noise = noise_of(release_on_ranks(parts, mechanism)[0], clean, mechanism)
    p_values = noise_p_values(noise)
    assert min(p_values.values()) > FALSE_ALARM, p_values
    assert min(standard_normal_p_values(1.03 * noise).values()) < CAUGHT


@given(ranks=st.integers(1, 70), blocks=st.integers(0, 200))
def test_the_ranks_shares_are_disjoint_cover_everything_and_are_nearly_equal(ranks: int, blocks: int) -> None:
    shares = [share_of(rank, ranks, blocks) for rank in range(ranks)]
    assert [block for share in shares for block in share] == list(range(blocks))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_is_not_one_of_the_ranks_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=rf"rank={rank} with world_size={world_size}: expected a rank from 0 to"):
        release(sums(), plan(), KEY, 0, rank=rank, size=world_size)


WRONG_SHARES: dict[str, mutations.Mutation] = {
    "one share without noise": mutations.one_share_without_noise,
    "no rank adds noise": mutations.no_rank_adds_noise,
    "one stream for every share": mutations.one_stream_for_every_share,
    "two ranks add the noise of a block": lambda: mutations.shares_given(
        lambda rank, world_size, blocks: range(
            blocks * rank // world_size, min(blocks, blocks * (rank + 1) // world_size + 1)
        )
    ),
    "every rank adds the noise of all blocks": lambda: mutations.shares_given(
        lambda rank, world_size, blocks: range(blocks)
    ),
}


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("fault", WRONG_SHARES)
def test_noise_that_is_divided_wrongly_among_the_ranks_is_caught(fault: str, ranks: int) -> None:
    nothing = [{"w": torch.zeros(3 * BLOCK)} for _ in range(ranks)]
    with WRONG_SHARES[fault]():
        noise = noise_of(release_on_ranks(nothing, plan())[0], nothing[0], plan())
    assert min(noise_p_values(noise).values()) < CAUGHT


def test_the_shares_of_different_ranks_and_steps_are_independent() -> None:
    nothing = [{"w": torch.zeros(4 * BLOCK)} for _ in range(4)]
    steps = [noise_of(release_on_ranks(nothing, plan(), step)[0], nothing[0], plan()) for step in range(5)]
    p_values = independence_p_values(np.concatenate(steps).reshape(20, BLOCK))
    assert min(p_values.values()) > FALSE_ALARM, p_values


def test_noise_on_every_rank_would_be_caught() -> None:
    parts = [sums(seed, {"w": (200, 500)}, torch.float32) for seed in range(2)]
    shared, own = (
        [release(part, plan(), RandomKey.from_seed(seed * key), 0)["w"] for seed, part in enumerate(parts)]
        for key in (0, 1)
    )
    clean = {"w": parts[0]["w"] + parts[1]["w"]}
    for released in (shared, own):
        noise = noise_of({"w": released[0] + released[1]}, clean, plan())
        assert min(standard_normal_p_values(noise).values()) < CAUGHT


@given(size=st.integers(0, 40), seed=st.integers(0, 1000))
def test_the_divisor_is_the_expected_batch_size_whatever_the_sample(size: int, seed: int) -> None:
    rows = torch.randn(size, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mechanism = plan(noise_multiplier=0.0, clip_norm=math.inf)
    released = release({"w": rows.sum(0)}, mechanism, KEY, 0)["w"]
    torch.testing.assert_close(released * 7, rows.sum(0))


def test_neighbouring_datasets_have_the_same_divisor_and_the_same_noise() -> None:
    """What an observer sees differ is the one example's clipped gradient over the public divisor: nothing else."""
    one = {"w": torch.tensor([0.3, -0.4, 0.0], dtype=torch.float64)}
    with_it, without_it = sums(1, {"w": (3,)}), sums(1, {"w": (3,)})
    with_it["w"] += one["w"]
    difference = release(with_it, plan(), KEY, 3)["w"] - release(without_it, plan(), KEY, 3)["w"]
    torch.testing.assert_close(difference, one["w"] / 7, rtol=0, atol=1e-14)


def test_an_empty_step_releases_noise_over_the_expected_batch_size() -> None:
    nothing = {"w": torch.zeros(100_000)}
    released = release(nothing, plan(), KEY, 0)
    p_values = standard_normal_p_values(noise_of(released, nothing, plan()))
    assert min(p_values.values()) > FALSE_ALARM, p_values
    assert float(released["w"].std()) == pytest.approx(1.5 * 0.8 / 7, rel=0.02)


def test_no_noise_releases_the_scaled_sum_to_the_bit() -> None:
    total = sums()
    released = release(total, plan(noise_multiplier=0.0), KEY, 0)
    assert all(np.array_equal(released[name], total[name] / 7) for name in SHAPES)
