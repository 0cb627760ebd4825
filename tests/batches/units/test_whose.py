"""Whose an example is: every way to say it means the same, and what is unclear is refused with a sentence."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch.utils.data import DataLoader, Subset

import lightning_dp.loading.privacy_unit as unit_module
from lightning_dp import DifferentialPrivacy, PreflightError
from lightning_dp.audit import audit
from lightning_dp.loading.held_records import HeldRecords
from lightning_dp.loading.privacy_unit import PrivacyUnit
from tests.batches.units.data import OWNERS, WithUser, dict_regressor
from tests.conftest import sample_of, trainer


class Items:
    """A dataset of given items."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def digest(given: Any, dataset: Any = None) -> str:
    return PrivacyUnit(given, None).read(WithUser() if dataset is None else dataset).digest


def written(path: Path, write: Callable[[Path], Any]) -> Path:
    write(path)
    return path


def test_every_way_to_say_it_means_the_same(tmp_path: Path) -> None:
    names = [f"user {owner}" for owner in OWNERS]
    by_index = dict(enumerate(names))
    files = [
        written(tmp_path / "a.json", lambda path: path.write_text(json.dumps(names))),
        written(tmp_path / "b.json", lambda path: path.write_text(json.dumps(by_index))),
        written(tmp_path / "c.txt", lambda path: path.write_text("\n".join(names) + "\n")),
        written(tmp_path / "d.npy", lambda path: np.save(path, np.array(OWNERS))),
    ]
    given = [
        names, tuple(names), OWNERS, np.array(OWNERS), torch.tensor(OWNERS), by_index,
        [(owner, "a pair") for owner in OWNERS], *files, *map(str, files),
    ]  # fmt: skip
    assert {digest(each) for each in given} == {digest("user_id")}
    tuples = Items([(0.0, {"who": torch.tensor(owner)}, np.int64(owner)) for owner in OWNERS])
    assert {digest(each, tuples) for each in ("2", "1.who")} == {digest("user_id")}
    assert digest([*OWNERS[:-1], 0]) != digest(OWNERS)


def test_a_subset_is_read_as_it_is() -> None:
    kept = [23, 0, 2, 7, 6]
    units = PrivacyUnit("user_id", 1).read(Subset(WithUser(), kept))
    assert [units.examples_of(unit).tolist() for unit in range(len(units))] == [[0], [1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("who", r"privacy_unit='who' is no field of dataset\[0\], which has inputs, target, user_id: expected"),
        (OWNERS[:-1], "privacy_unit has 23 users for a dataset of 24 examples: expected one for each"),
        ({index + 1: owner for index, owner in enumerate(OWNERS)}, "privacy_unit has no user for example 0: expected"),
        ({f"example {index}": owner for index, owner in enumerate(OWNERS)}, "has no user for example 0"),
        ([*OWNERS[:3], None, *OWNERS[4:]], "privacy_unit='user' of example 3 is missing: expected a user"),
        ([*OWNERS[:3], float("nan"), *OWNERS[4:]], "of example 3 is missing"),
        ([*OWNERS[:3], "", *OWNERS[4:]], "of example 3 is missing"),
        ([*OWNERS[:3], [1], *OWNERS[4:]], "of example 3 is a list: expected"),
        ([*OWNERS[:3], torch.zeros(2), *OWNERS[4:]], "of example 3 is a Tensor: expected"),
        ("inputs", "privacy_unit='inputs' of example 0 is a Tensor: expected a user"),
        ("nowhere.json", "privacy_unit='nowhere.json': expected a file that is there"),
        (Path("users.csv"), "privacy_unit='users.csv': expected a file that is there, and ends in .json, .npy, .txt"),
    ],
)
def test_what_is_unclear_is_refused_before_training(given: Any, told: str) -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0, privacy_unit=given)
    with pytest.raises(PreflightError, match=told):
        trainer(private).fit(dict_regressor(), DataLoader(WithUser(), batch_size=3))
    assert private.ledger is None


@pytest.mark.parametrize(("content", "told"), [("[1, 2", "cannot be read"), ("7", "holds a int: expected a list")])
def test_a_file_of_something_else_is_refused(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "users.json").write_text(content)
    with pytest.raises(PreflightError, match=told):
        digest(tmp_path / "users.json")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"privacy_unit": 3}, "privacy_unit=<int>: expected the name of a field"),
        ({"privacy_unit": ""}, "privacy_unit=<str>: expected the name"),
        ({"privacy_unit": np.zeros((2, 2))}, "privacy_unit=<ndarray>"),
        ({"privacy_unit": "user_id", "max_examples_per_unit": 0}, "max_examples_per_unit=0: expected at least 1"),
        ({"privacy_unit": "user_id", "max_examples_per_unit": 2.5}, "max_examples_per_unit=2.5: expected a whole"),
        ({"max_examples_per_unit": 4}, "max_examples_per_unit=4 without privacy_unit: expected both"),
        ({"privacy_unit": "user_id", "static_shapes": True}, "static_shapes=True with privacy_unit: expected False"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DifferentialPrivacy(noise_multiplier=1.0, **options)


def test_more_expected_users_than_there_are_is_refused() -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0, privacy_unit="user_id")
    with pytest.raises(ValueError, match="batch_size=16 with 12 users"):
        trainer(private).fit(dict_regressor(), DataLoader(WithUser(), batch_size=16))


def test_an_audit_plants_users() -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0, privacy_unit="user_id")
    found = audit(trainer(private), dict_regressor(), DataLoader(WithUser(), batch_size=3))
    assert found.epsilon_lower <= found.epsilon_claimed


def test_one_giant_user_is_one_draw_with_the_examples_that_are_allowed() -> None:
    sizes: list[int] = []
    module = dict_regressor()
    module.on_train_batch_start = lambda *_: sizes.extend(len(p.examples) for p in sample_of(module.trainer).pieces)
    private = DifferentialPrivacy(noise_multiplier=1.0, privacy_unit=[7] * len(OWNERS), max_examples_per_unit=5)
    trainer(private, max_steps=3).fit(module, DataLoader(WithUser(), batch_size=1))
    assert sizes == [5, 5, 5]
    assert private.plan is not None
    assert (private.plan.dataset_size, private.plan.sampling_probability) == (1, 1.0)


def test_reading_a_field_is_told_while_it_lasts_and_leaves_random_numbers_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Random(WithUser):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return {**super().__getitem__(index), "noise": torch.rand(2)}

    monkeypatch.setattr(unit_module, "PATIENCE", 0.0)
    before = torch.random.get_rng_state()
    with caplog.at_level("INFO"):
        digest("user_id", Random())
    assert torch.equal(before, torch.random.get_rng_state())
    assert "reading 'user_id' of every item, 24 of 24" in caplog.text


def test_yaml_can_say_it() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DifferentialPrivacy, "dp")
    for words, told in (
        (
            ["--dp.privacy_unit=user_id", "--dp.max_examples_per_unit=4"],
            "PrivacyUnit('user_id', field, at most 4 each)",
        ),
        (["--dp.privacy_unit=[ada, bob]"], "PrivacyUnit('user', 2 values, at most 32 each)"),
        (["--dp.privacy_unit=people.json"], "PrivacyUnit('people', file people.json, at most 32 each)"),
    ):
        made = parser.instantiate_classes(parser.parse_args(["--dp.noise_multiplier=1", *words]))
        assert repr(made.dp.privacy_unit) == told


def test_the_callback_pickles_with_its_unit() -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0, privacy_unit=OWNERS)
    copied = pickle.loads(pickle.dumps(private))
    assert copied.privacy_unit.read(WithUser()).digest == digest("user_id")


def test_records_held_on_one_rank_each_are_refused() -> None:
    held = HeldRecords([[1, 2], [3]], lambda shard: shard)
    with pytest.raises(
        PreflightError, match="privacy_unit='user' with HeldRecords: expected a dataset that every rank"
    ):
        digest([0, 0, 1], held)
