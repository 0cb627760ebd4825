from __future__ import annotations

import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_dp import DifferentialPrivacy, HeldRecords, PreflightError
from lightning_dp.loading.held_records import HeldRecordsError, _sketch
from tests.conftest import loader, regression_data, regressor, trainer, weights


def words(shard: str) -> list[int]:
    return [int(word) for word in shard.split()]


def test_the_records_of_all_shards_are_one_dataset_in_the_order_of_the_shards() -> None:
    records = HeldRecords(["5 6", "7", "8 9 10"], words)
    assert [records[index] for index in range(len(records))] == [5, 6, 7, 8, 9, 10]
    assert records.here.tolist() == list(range(6))
    assert records.held(np.array([0, 3, 5])).tolist() == [0, 3, 5]
    assert records.held(np.array([], dtype=np.int64)).tolist() == []


def test_a_part_of_the_records_answers_for_its_own_and_names_what_others_hold() -> None:
    records = HeldRecords(["5 6", "7", "8 9 10"], words)
    records.here, records._records, records.rank = np.array([0, 1, 3]), [5, 6, 8], 1
    assert records.held(np.arange(6)).tolist() == [0, 1, 3]
    assert records.held(np.array([2, 4, 5])).tolist() == []
    assert records[3] == 8
    for index in (2, 5):
        with pytest.raises(IndexError, match=f"record {index} is not held by rank 1: expected .* without Subset"):
            records[index]


def test_training_on_held_records_is_training_on_the_dataset() -> None:
    data = regression_data()
    records = HeldRecords([range(20), range(20, 64)], lambda shard: (data[index] for index in shard))
    reached = []
    for dataset in (data, records):
        module = regressor()
        trainer(DifferentialPrivacy(noise_multiplier=1.0, seed=3), max_steps=3).fit(module, loader(dataset))
        reached.append(weights(module))
    assert torch.equal(*reached)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"shards": ["1", ""]}, "shard '' holds no record"),
        (
            {"shards": ["1", "x"]},
            "shard 'x' on rank 0: ValueError: invalid literal .* expected every shard to be readable",
        ),
        ({"shards": ["1", "1"]}, "2 shards, not all of them different: expected each shard once"),
        ({"shards": []}, "0 shards for 1 ranks"),
        ({"shards": ["1"], "copies": "drop"}, "copies='drop': expected 'refuse' or 'count'"),
    ],
)
def test_what_cannot_be_held_is_refused(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(HeldRecordsError, match=told):
        HeldRecords(read=words, **arguments)


def test_a_digest_is_of_the_record_and_not_of_what_it_is_a_view_of() -> None:
    whole = torch.arange(6.0).reshape(3, 2)
    views, copies = [{"x": row} for row in whole], [{"x": row.clone()} for row in whole]
    assert np.array_equal(_sketch(views), _sketch(copies))
    assert len(set(_sketch(views).tolist())) == 3


def test_a_record_has_the_same_digest_in_every_process(tmp_path: Path) -> None:
    records = [
        {"x": torch.tensor(2.5), "y": torch.ones(2, 3, dtype=torch.bfloat16), "name": "a"},
        (np.ones(3), None, 4),
    ]
    child = multiprocessing.get_context("fork").Process(
        target=lambda: np.save(tmp_path / "there.npy", _sketch(records))
    )
    child.start()
    child.join()
    assert np.array_equal(_sketch(records), np.load(tmp_path / "there.npy"))


def test_held_records_can_go_to_spawned_workers() -> None:
    records = HeldRecords(["5 6", "7"], words)
    assert pickle.loads(pickle.dumps(records))[2] == 7


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(regression_data())


def test_a_stream_is_refused_with_the_reason_and_the_way_out() -> None:
    expected = r"Stream is an IterableDataset: .*shuffle buffer .* neither independent .*lightning_dp\.HeldRecords"
    with pytest.raises(PreflightError, match=expected):
        trainer(DifferentialPrivacy(noise_multiplier=1.0)).fit(regressor(), DataLoader(Stream(), batch_size=4))
