from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.mechanism.reduce import flatten
from lightning_dp.mechanism.shards import by_rank, of_rank
from tests.mechanism.laws import plan, release

KEY = RandomKey.from_seed(17)
SHAPES = st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple), min_size=1, max_size=5)


def named(shapes: list[tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {str(i): torch.randn(shape, generator=generator, dtype=torch.float64) for i, shape in enumerate(shapes)}


def chunks(tensor: Tensor, world_size: int) -> list[Tensor]:
    """What torch.chunk gives each rank; it stops early where nothing is left."""
    given = list(torch.chunk(tensor, world_size))
    return given + [tensor[:0]] * (world_size - len(given))


@given(shapes=SHAPES, world_size=st.integers(1, 5))
def test_each_rank_gets_what_torch_chunk_gives_it(shapes: list[tuple[int, ...]], world_size: int) -> None:
    whole = named(shapes)
    sent = by_rank(flatten(whole), whole, world_size).view(world_size, -1)
    for rank in range(world_size):
        kept = of_rank(sent[rank], whole, rank, world_size)
        assert list(kept) == list(whole)
        for name, tensor in whole.items():
            assert torch.equal(kept[name], chunks(tensor, world_size)[rank])


INTEGERS = {"resolution": 2**20, "coordinates": 5 * 7**3}


@settings(max_examples=15)
@given(shapes=SHAPES, world_size=st.integers(1, 5), seed=st.integers(0, 99))
@pytest.mark.parametrize("of_plan", [{}, INTEGERS], ids=["floats", "integers"])
def test_sharded_ranks_release_their_shards_of_what_one_process_releases(
    of_plan: dict[str, int], shapes: list[tuple[int, ...]], world_size: int, seed: int
) -> None:
    """Sums, noise and divisor: put together, the shards are the gradient of one process."""
    mechanism = plan(**of_plan)
    sums = [named(shapes, seed + rank) for rank in range(world_size)]
    if of_plan:
        sums = [{name: (1000 * tensor).long() for name, tensor in of.items()} for of in sums]
    alone = release({n: torch.stack([of[n] for of in sums]).sum(0) for n in sums[0]}, mechanism, KEY, 3)
    sent: list[Tensor] = []
    for rank, own in enumerate(sums):
        release(
            own, mechanism, KEY, 3, rank=rank, size=world_size,
            total=lambda flat: sent.append(by_rank(flat, sums[0], world_size)) or flat,
        )  # fmt: skip
    scattered = torch.stack(sent).sum(0).view(world_size, -1)
    for rank, own in enumerate(sums):
        shards = release(
            own, mechanism, KEY, 3, rank=rank, size=world_size,
            total=lambda _, rank=rank: scattered[rank].clone(),
            named=lambda totals, like, rank=rank: of_rank(totals[0], like, rank, world_size),
        )  # fmt: skip
        for name, tensor in alone.items():
            torch.testing.assert_close(shards[name], chunks(tensor, world_size)[rank], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_have_the_type_of_the_sums(world_size: int) -> None:
    whole = {"a": torch.ones(4), "b": torch.ones(3, dtype=torch.float64)}
    sent = by_rank(flatten(whole), whole, world_size).view(world_size, -1)
    assert {name: t.dtype for name, t in of_rank(sent[0], whole, 0, world_size).items()} == {
        "a": torch.float32,
        "b": torch.float64,
    }


def test_ranks_that_hold_rows_of_the_sum_already_release_what_one_process_releases() -> None:
    """As layer by layer: the noise is added to the rows after the sum, by the rank that keeps them."""
    whole = named([(5, 3), (2,), (7, 1, 2)], 3)
    alone, rows = release(whole, plan(), KEY, 4), [{}, {}, {}]
    for rank, mine in enumerate(rows):

        def held(_: object, rank: int = rank) -> tuple[list[tuple[int, Tensor]], int]:
            parts, place = [], 0
            for tensor in whole.values():
                chunk = -(-len(tensor) // 3)
                part = tensor[rank * chunk : (rank + 1) * chunk].clone()
                parts.append((place + rank * chunk * tensor[0].numel(), part))
                place += tensor.numel()
            return parts, place

        mine |= release({}, plan(), KEY, 4, held=held, named=lambda totals, _: dict(zip(whole, totals, strict=True)))
    for name, tensor in alone.items():
        assert torch.equal(torch.cat([mine[name] for mine in rows]), tensor)
