from __future__ import annotations

import base64
import copy
import io
import itertools
import pickle
import random

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_dp.mechanism.randomness import KEY_BYTES, RandomKey, Stream


def test_equal_keys_streams_and_counters_give_equal_numbers() -> None:
    one, other = RandomKey.from_seed(3), RandomKey.from_seed(3)
    assert one == other
    for stream in Stream:
        assert one.derive(stream, 5, 2) == other.derive(stream, 5, 2)
        assert one.torch_seed(stream, 5) == other.torch_seed(stream, 5)
        assert np.array_equal(one.generator(stream, 5).random(8), other.generator(stream, 5).random(8))


def test_every_key_stream_and_counter_gives_different_numbers() -> None:
    keys = [
        RandomKey.from_seed(0),
        RandomKey.from_seed(1),
        RandomKey.from_seed(-1),
        RandomKey.fresh(),
        RandomKey.fresh(),
    ]
    counters = [(), (0,), (1,), (2,), (12, 3), (1, 23), (123,), (0, 0), (2**40,)]
    places = list(itertools.product(keys, Stream, counters))
    derived = {key.derive(stream, *counter, size=16) for key, stream, counter in places}
    seeds = {key.torch_seed(stream, *counter) for key, stream, counter in places}
    first = {float(key.generator(stream, *counter).random()) for key, stream, counter in places}
    assert len(derived) == len(seeds) == len(first) == len(places)


def test_torch_seeds_are_accepted_by_torch() -> None:
    seeds = [RandomKey.from_seed(0).torch_seed(Stream.NOISE, step) for step in range(200)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    torch.Generator().manual_seed(max(seeds))


def test_a_key_draws_nothing_from_anybody_elses_generator() -> None:
    def state() -> tuple[object, ...]:
        return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()

    before = state()
    key = RandomKey.fresh()
    key.generator(Stream.SAMPLING, 0).random(10)
    key.torch_seed(Stream.DROPOUT, 0)
    RandomKey.from_seed(7)
    assert state() == before


def test_no_seeding_of_any_library_fixes_a_fresh_key() -> None:
    drawn = set()
    for _ in range(3):
        L.seed_everything(1, workers=True, verbose=False)
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        drawn.add(RandomKey.fresh().reveal())
    assert len(drawn) == 3
    assert {len(material) for material in drawn} == {KEY_BYTES}


def test_the_mode_says_where_the_key_comes_from() -> None:
    assert RandomKey.fresh().mode == "secret"
    assert RandomKey.from_seed(0).mode == "reproducible"


def test_what_a_key_prints_does_not_depend_on_its_material() -> None:
    one, other = RandomKey.fresh(), RandomKey.fresh()
    assert one != other
    for show in (repr, str, "{}".format, "{0!r}".format, ascii):
        assert show(one) == show(other)
        for encoded in (one.reveal().hex(), base64.b64encode(one.reveal()).decode(), repr(one.reveal())):
            assert encoded not in show(one)


@pytest.mark.parametrize(
    "write",
    [
        pickle.dumps,
        lambda key: pickle.dumps(key, protocol=0),
        copy.copy,
        copy.deepcopy,
        lambda key: torch.save({"key": key}, io.BytesIO()),
    ],
)
def test_a_key_cannot_be_written_anywhere(write: object) -> None:
    with pytest.raises(TypeError, match="never pickled"):
        write(RandomKey.fresh())
    with pytest.raises(TypeError, match="unhashable"):
        hash(RandomKey.fresh())


@pytest.mark.parametrize("length", [0, 16, 31, 33, 64])
def test_short_or_long_material_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=rf"material of {length} bytes: expected 32.*RandomKey.fresh"):
        RandomKey(bytes(length), "secret")


@pytest.mark.parametrize("distance", [2**32, 2**64, 2**96])
def test_numpy_keeps_all_128_bits_of_a_key_where_torch_keeps_32(distance: int) -> None:
    """Why noise on the CPU is NumPy's: 2³² seeds can be tried one after the other."""
    here, there = (np.random.Generator(np.random.Philox(key=5 + far)) for far in (0, distance))
    assert not np.array_equal(here.standard_normal(100), there.standard_normal(100))
    if distance == 2**32:
        near, far = (torch.Generator().manual_seed(5 + offset) for offset in (0, distance))
        assert torch.equal(torch.randn(100, generator=near), torch.randn(100, generator=far))


@given(block=st.integers(1, 2**64 - 1))
def test_the_blocks_of_a_stream_are_stretches_of_one_sequence_and_do_not_meet(block: int) -> None:
    """Philox counts draws in 256 bits; a block sets the upper 64, which no generator reaches by drawing."""
    key = RandomKey.from_seed(3)
    first, other = (key.generator(Stream.NOISE, 5, block=place).bit_generator.state["state"] for place in (0, block))
    assert list(first["key"]) == list(other["key"])
    assert [int(word) for word in first["counter"]] == [0, 0, 0, 0]
    assert [int(word) for word in other["counter"]] == [0, 0, 0, block]
