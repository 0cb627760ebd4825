"""Odd data: a clear error before anything is released, or a right result; the budget fits what was released."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_dp import DifferentialPrivacy, PreflightError
from tests.conftest import Notes, Regressor, loader, regression_data, regressor, sample_of, trainer, weights


class Items(Dataset[Any]):
    """Map-style data made of a function of the index."""

    def __init__(self, item: Callable[[int], Any], length: int = 64) -> None:
        self.item = item
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(regression_data())


def example(index: int) -> tuple[Tensor, Tensor]:
    return torch.full((4,), float(index % 5)), torch.tensor(float(index % 3))


def fit(data: Any, *, batch_size: int = 16, steps: int = 4, **arguments: Any) -> tuple[Any, DifferentialPrivacy]:
    module = regressor(lr=0.1)
    options = {"noise_multiplier": 1.0, "delta": 1e-6, **arguments}
    private = DifferentialPrivacy(**options)
    given = data if isinstance(data, DataLoader) else loader(data, batch_size)
    trainer(private, max_steps=steps).fit(module, given)
    return module, private


def test_one_example_is_data(tmp_path: Path) -> None:
    module, private = fit(Items(example, 1), batch_size=1)
    assert private.plan is not None
    assert private.plan.sampling_probability == 1
    assert bool(weights(module).isfinite().all())
    assert private.statement().steps == 4


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_pixels_that_are_no_numbers_add_nothing(broken: float) -> None:
    data = regression_data()
    data.tensors[0][::2] = broken
    with pytest.warns(UserWarning, match="were not finite and contributed zero"):
        module, private = fit(data)
    assert bool(weights(module).isfinite().all())
    assert private.statement().steps == 4


def test_an_example_that_comes_twice_counts_as_two() -> None:
    one = regression_data()
    module, private = fit(torch.utils.data.ConcatDataset([one, one]))
    assert private.plan is not None
    assert private.plan.dataset_size == 128
    assert bool(weights(module).isfinite().all())


def changing(index: int) -> Any:
    raise IndexError(f"index {index} is out of range")


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no examples": (lambda: Items(example, 0), ValueError, r"(dataset_size=0|num_samples=0)"),
    "stream": (lambda: DataLoader(Stream(), batch_size=4), PreflightError, r"IterableDataset: expected"),
    "0-d tensors": (lambda: Items(lambda index: torch.tensor(1.0)), Exception, r"."),
    "no tensors": (lambda: Items(lambda index: "text"), ValueError, r"runs training_step for each example"),
    "nothing": (lambda: Items(lambda index: None), TypeError, r"NoneType"),
    "ragged": (lambda: Items(lambda index: torch.zeros(index + 1)), RuntimeError, r"equal size"),
    "raises": (lambda: Items(changing), IndexError, r"out of range"),
    "fewer than a batch": (lambda: Items(example, 3), ValueError, r"batch_size=16 with 3 examples"),
}


@pytest.mark.parametrize("kind", list(REFUSED))
def test_odd_data_are_refused_before_anything_is_released(kind: str, tmp_path: Path) -> None:
    make, error, text = REFUSED[kind]
    with pytest.raises(error, match=text):
        fit(make())
    assert not list(tmp_path.rglob("privacy.json")) or '"steps": 0' in (tmp_path / "privacy.json").read_text()


def test_a_list_is_map_style_data() -> None:
    assert fit([example(index) for index in range(64)])[1].statement().steps == 4


def test_an_item_that_raises_later_ends_the_run_with_the_budget_of_the_steps_before(tmp_path: Path) -> None:
    seen = Notes()

    def item(index: int) -> Any:
        seen.append(index)
        if len(seen) > 90:  # before the first step some are looked at
            raise OSError(f"example {index} cannot be read")
        return example(index)

    private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-6)
    with pytest.raises(OSError, match=r"example \d+ cannot be read"):
        trainer(private, max_steps=100).fit(regressor(), loader(Items(item)))
    assert private.ledger is not None
    assert 0 < private.ledger.steps < 8
    assert f'"steps": {private.ledger.steps},' in (tmp_path / "privacy.json").read_text()


def test_data_that_grow_or_shrink_between_epochs_are_refused() -> None:
    class Module(Regressor):
        def train_dataloader(self) -> Any:
            return loader(regression_data(64 + 8 * self.current_epoch))

    private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-6)
    with pytest.raises(PreflightError, match=r"training data changed during the run: planned .*dataset_size=64"):
        trainer(private, max_steps=20, reload_dataloaders_every_n_epochs=1).fit(Module())
    assert private.ledger is not None
    assert private.ledger.steps == 4


@pytest.mark.parametrize("now", [32, 80])
def test_a_dataset_whose_length_changes_behind_ones_back_keeps_its_draws(now: int) -> None:
    """The draw is of the length that was planned with: a shorter dataset raises, a longer one is not drawn from."""
    data = Items(lambda index: example(index) if index < data.length else changing(index))
    largest: list[int] = []

    class Module(Regressor):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            drawn = sample_of(self.trainer).indices
            largest.append(int(drawn.max()) if len(drawn) else 0)
            data.length = now

    private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-6)
    fitting = trainer(private, max_steps=8)
    if now < 64:
        with pytest.raises(IndexError, match="out of range"):
            fitting.fit(Module(), loader(data))
    else:
        fitting.fit(Module(), loader(data))
    assert max(largest) < 64
    assert private.plan is not None
    assert private.plan.dataset_size == 64


def test_labels_without_features_and_dicts_are_data() -> None:
    class Module(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch["x"]).square().mean()

    private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-6)
    trainer(private, max_steps=2).fit(Module(), loader(Items(lambda index: {"x": example(index)[0], "name": "n"})))
    assert private.statement().steps == 2
