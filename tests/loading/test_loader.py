from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_dp.loading.loader import LogicalBatch, LogicalBatchConsumedError, PoissonLoader
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.sampling import poisson_sample
from tests.conftest import PATIENCE
from tests.mechanism.laws import plan

KEY = RandomKey.from_seed(51)


class Numbers(Dataset[dict[str, Tensor]]):
    """Example i is the number i, so that a batch says which examples it holds."""

    def __init__(self, examples: int) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.tensor([float(index)])}


def listed(batch: dict[str, Tensor]) -> list[int]:
    return [int(x) for x in batch["x"].flatten()]


class OfLength(DataLoader[Any]):
    """A loader that says how many batches it has."""

    batches = 0

    def __len__(self) -> int:
        return self.batches


def poisson_loader(
    examples: int = 40,
    expected: float = 7,
    *,
    epoch: int | None = None,
    key: RandomKey = KEY,
    rank: int = 0,
    world_size: int = 1,
    physical_batch_size: int = 3,
    next_step: Callable[[], int] = lambda: 0,
    **options: Any,
) -> PoissonLoader:
    loader = OfLength(Numbers(examples), batch_size=4, **options)
    loader.batches = max(1, round(examples / expected)) if epoch is None else epoch
    return PoissonLoader(
        loader,
        plan(dataset_size=examples, expected_batch_size=expected),
        key,
        rank=rank,
        world_size=world_size,
        physical_batch_size=physical_batch_size,
        next_step=next_step,
    )


def expected_draw(step: int, examples: int = 40, expected: float = 7, key: RandomKey = KEY) -> list[int]:
    return poisson_sample(key.generator(Stream.SAMPLING, step), examples, expected / examples).tolist()


def delivered(batch: LogicalBatch) -> list[int]:
    return [index for micro_batch, _ in batch.micro_batches() for index in listed(micro_batch)]


@given(examples=st.integers(1, 60), batch_size=st.integers(1, 20), drop_last=st.booleans(), expected=st.floats(0.1, 1))
def test_an_epoch_has_as_many_steps_as_the_users_loader_has_batches(
    examples: int, batch_size: int, drop_last: bool, expected: float
) -> None:
    given = DataLoader(Numbers(examples), batch_size=batch_size, drop_last=drop_last)
    mechanism = plan(dataset_size=examples, expected_batch_size=expected)
    loader = PoissonLoader(given, mechanism, KEY, rank=0, world_size=1, physical_batch_size=3, next_step=lambda: 0)
    assert len(loader) == len(given) == len(list(loader)) == sum(1 for _ in given)


@settings(max_examples=20)
@given(
    examples=st.integers(1, 60),
    fraction=st.floats(0.05, 1.0),
    physical_batch_size=st.integers(1, 20),
    seed=st.integers(0, 1000),
    first=st.integers(0, 10**6),
)
def test_each_step_delivers_its_draw_once_in_micro_batches_of_bounded_size(
    examples: int, fraction: float, physical_batch_size: int, seed: int, first: int
) -> None:
    key, expected = RandomKey.from_seed(seed), fraction * examples
    loader = poisson_loader(
        examples, expected, key=key, physical_batch_size=physical_batch_size, next_step=lambda: first
    )
    for step, batch in enumerate(loader, start=first):
        assert batch.step == step
        seen = []
        for micro_batch, size in batch.micro_batches():
            assert 0 < size == len(micro_batch["x"]) <= physical_batch_size
            seen += listed(micro_batch)
        assert seen == batch.indices.tolist() == expected_draw(step, examples, expected, key)
        assert batch.global_size == len(seen)


def test_steps_without_examples_have_no_micro_batch_and_shift_nobody() -> None:
    loader = poisson_loader(examples=5, expected=0.2)
    batches = [(batch.step, batch.global_size, delivered(batch)) for _ in range(4) for batch in loader]
    empty = sum(size == 0 for _, size, _ in batches)
    assert 0.6 < empty / len(batches) < 0.97
    assert all(seen == expected_draw(step, 5, 0.2) and size == len(seen) for step, size, seen in batches)


def test_draws_are_a_function_of_key_and_step() -> None:
    once, again = ([delivered(batch) for batch in poisson_loader()] for _ in range(2))
    assert once == again
    assert once != [delivered(batch) for batch in poisson_loader(key=RandomKey.from_seed(52))]
    assert len({tuple(draw) for draw in once}) == len(once)


def test_an_epoch_goes_on_from_the_next_step() -> None:
    charged = 0
    loader = poisson_loader(next_step=lambda: charged)
    first = list(loader)
    assert [batch.step for batch in first] == list(range(6))
    charged = 4  # the epoch was cut short after four steps
    second = [(batch.step, delivered(batch)) for batch in loader]
    assert second == [(step, expected_draw(step)) for step in range(4, 10)]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_is_cut_short_does_not_leak_into_the_next(workers: int) -> None:
    charged = 0
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": workers > 0}
    loader = poisson_loader(next_step=lambda: charged, **options)
    for batch in loader:
        assert delivered(batch) == expected_draw(batch.step)
        charged += 1
        if charged == 2:
            break
    assert [(batch.step, delivered(batch)) for batch in loader] == [(step, expected_draw(step)) for step in range(2, 8)]


@pytest.mark.parametrize(
    "options", [{"num_workers": 2}, {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 5}]
)
def test_workers_deliver_what_the_main_process_delivers(options: dict[str, Any]) -> None:
    charged = 0
    loader = poisson_loader(next_step=lambda: charged, **options)
    for epoch in range(2):
        charged = 6 * epoch
        assert [delivered(batch) for batch in loader] == [expected_draw(step) for step in range(charged, charged + 6)]


@pytest.mark.parametrize("how_far", [0, 1, 100])
def test_a_sample_is_handed_out_once(how_far: int) -> None:
    batch = next(iter(poisson_loader(examples=40, expected=20)))
    for _, _ in zip(range(how_far), batch.micro_batches(), strict=False):
        pass
    with pytest.raises(
        LogicalBatchConsumedError, match=r"sample of step 0 has been used already: expected one pass.*LBFGS"
    ):
        batch.micro_batches()


def test_a_sample_stays_used_when_a_later_one_has_been_used() -> None:
    batches = list(poisson_loader())
    delivered(batches[2])
    with pytest.raises(LogicalBatchConsumedError, match="step 1"):
        batches[1].micro_batches()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("used", [[0, 3, 4], [5], [1, 2]])
def test_samples_that_nobody_used_do_not_shift_the_others(used: list[int], workers: int) -> None:
    for batch in poisson_loader(num_workers=workers):
        if batch.step in used:
            assert delivered(batch) == expected_draw(batch.step)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("taken", [0, 1, 2, 3])
def test_a_sample_that_was_left_half_read_does_not_shift_the_others(taken: int, workers: int) -> None:
    others = 0
    for batch in poisson_loader(expected=8, physical_batch_size=2, num_workers=workers):
        if batch.step == 1:
            assert len(batch.indices) > 6
            micro_batches = batch.micro_batches()
            for _ in range(taken):
                next(micro_batches)
        else:
            assert delivered(batch) == expected_draw(batch.step, expected=8)
            others += 1
    assert others == 4


def fail_at_the_first(batch: LogicalBatch) -> None:
    for _ in batch.micro_batches():
        raise ArithmeticError


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_consumer_does_not_shift_the_others(workers: int) -> None:
    for batch in poisson_loader(expected=8, physical_batch_size=2, num_workers=workers):
        if batch.step == 1:
            with pytest.raises(ArithmeticError):
                fail_at_the_first(batch)
        else:
            assert delivered(batch) == expected_draw(batch.step, expected=8)


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_together_deliver_the_global_draw(world_size: int) -> None:
    ranks = [
        poisson_loader(examples=9, expected=2, key=RandomKey.from_seed(53), rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(loader) for loader in ranks}) == 1
    for step, of_rank in enumerate(zip(*ranks, strict=True)):
        parts = [delivered(batch) for batch in of_rank]
        draw = expected_draw(step, 9, 2, RandomKey.from_seed(53))
        assert sorted(index for part in parts for index in part) == draw
        assert {batch.global_size for batch in of_rank} == {len(draw)}


def test_the_users_collate_function_is_used() -> None:
    def collate(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"x": 100 + torch.stack([example["x"] for example in examples])}

    loader = poisson_loader(collate_fn=collate)
    for batch in loader:
        assert delivered(batch) == [100 + index for index in expected_draw(batch.step)]
    assert listed(loader.first_examples(2)[0]) == [100, 101]


def test_shuffling_and_drop_last_play_no_part() -> None:
    plain = [delivered(batch) for batch in poisson_loader()]
    torch.manual_seed(0)
    assert [delivered(batch) for batch in poisson_loader(shuffle=True, drop_last=True)] == plain


@pytest.mark.parametrize(("examples", "count"), [(40, 2), (1, 1)])
def test_the_first_examples_are_there_to_try_an_engine(examples: int, count: int) -> None:
    batch, size = poisson_loader(examples, 1).first_examples(2)
    assert size == count
    assert listed(batch) == list(range(count))


def double_precision(batch: LogicalBatch) -> LogicalBatch:
    return DoublePrecision().convert_input(batch)


def to_device(batch: LogicalBatch) -> LogicalBatch:
    return apply_to_collection(batch, Tensor, lambda tensor: tensor.clone())


@pytest.mark.parametrize("convert", [double_precision, to_device, copy.copy])
def test_what_lightning_does_to_batches_leaves_a_logical_batch_usable(convert: Any) -> None:
    for batch in poisson_loader():
        converted = convert(batch)
        assert isinstance(converted, LogicalBatch)
        assert converted.indices.dtype == torch.int64
        assert delivered(converted) == converted.indices.tolist() == expected_draw(batch.step)
        with pytest.raises(LogicalBatchConsumedError):
            batch.micro_batches()


def test_a_logical_batch_cannot_be_copied_into_a_second_one() -> None:
    batch = next(iter(poisson_loader()))
    with pytest.raises((TypeError, NotImplementedError), match="pickle"):  # by the key, or by torch's iterator
        copy.deepcopy(batch)


def test_a_resume_needs_no_state_of_the_loader() -> None:
    loader = poisson_loader()
    assert loader.state_dict() == {}
    loader.load_state_dict({})
    assert [delivered(batch) for batch in loader] == [expected_draw(step) for step in range(6)]


def test_what_workers_are_given_can_be_pickled() -> None:
    """So it holds no key, which refuses to be, and workers can be spawned as well as forked."""
    inner = poisson_loader(num_workers=1)._micro_batch_loader
    pickle.dumps((inner.dataset, inner.collate_fn, inner.worker_init_fn))


def test_memory_of_past_draws_is_given_back() -> None:
    loader = poisson_loader(examples=1000, expected=5)
    for batch in loader:
        delivered(batch)
        assert len(loader._draws._made) <= 3
    assert len(loader) == 200
    assert np.all([index < 1000 for index in batch.indices])


class Counting(Numbers):
    """Tells in a file what has been read, from whichever process."""

    def __init__(self, examples: int, file: Any) -> None:
        super().__init__(examples)
        self.file = file

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        with self.file.open("a") as told:
            told.write(f"{index}\n")
        return super().__getitem__(index)


def counting_loader(file: Any, charged: list[int], **options: Any) -> PoissonLoader:
    mechanism = plan(dataset_size=40, expected_batch_size=20)  # an epoch of two steps
    return PoissonLoader(
        DataLoader(Counting(40, file), batch_size=20, **options), mechanism, KEY,
        rank=0, world_size=1, physical_batch_size=50, next_step=lambda: len(charged),
    )  # fmt: skip


def read_so_far(file: Any, at_least: int) -> list[int]:
    """What the workers have read, once they have read that much."""
    for _ in range(PATIENCE * 20):
        found = [int(line) for line in file.read_text().split()] if file.exists() else []
        if len(found) >= at_least:
            break
        time.sleep(0.05)
    return found


def test_the_next_sample_is_read_while_this_one_is_used_also_over_the_end_of_an_epoch(tmp_path: Any) -> None:
    file, charged = tmp_path / "read", []
    loader = counting_loader(file, charged, num_workers=1, persistent_workers=True, prefetch_factor=2)
    draws = [expected_draw(step, expected=20) for step in range(7)]
    for _epoch in range(2):
        for batch in loader:
            assert delivered(batch) == draws[batch.step]
            charged.append(batch.step)
            ahead = [index for draw in draws[: batch.step + 3] for index in draw]  # two micro-batches, so two samples
            assert read_so_far(file, len(ahead)) == ahead
    assert charged == [0, 1, 2, 3]
    loader.close()


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
def test_the_order_of_samples_does_not_depend_on_who_reads_ahead(tmp_path: Any, options: dict[str, Any]) -> None:
    charged: list[int] = []
    loader = counting_loader(tmp_path / "read", charged, **options)
    for steps in (2, 1, 2, 2):  # an epoch that is cut short goes on where it stopped
        for batch, _ in zip(loader, range(steps), strict=False):
            assert batch.step == len(charged)
            assert delivered(batch) == expected_draw(batch.step, expected=20)
            charged.append(batch.step)
    assert charged == list(range(7))
    loader.resize(3)  # micro-batches of another size: what has been read ahead is read again
    assert [delivered(batch) for batch in loader] == [expected_draw(step, expected=20) for step in (7, 8)]
    loader.close()


def test_the_time_that_the_loop_waits_is_counted() -> None:
    loader = poisson_loader()
    assert loader.waited == 0.0
    batches = list(loader)
    assert loader.waited == 0.0
    delivered(batches[0])
    assert loader.waited > 0.0
