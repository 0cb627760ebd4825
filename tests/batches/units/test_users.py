"""With a privacy unit, users are drawn and clipped: the result is a loop over users, and no user moves it by more than C."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_dp.loading.draws as draws_module
from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy
from lightning_dp.batches.transforms import Flip, ViewTransform
from lightning_dp.batches.units import Grouped, Piece, Units, group, pieces, ungroup
from lightning_dp.engines.accumulate import accumulate
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.vmap import VmapEngine
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.plan.clipping import Clipping
from lightning_dp.step.planned import Planned
from tests.batches.units.data import USERS, WithUser, dict_regressor
from tests.conftest import sample_of, trainer, weights
from tests.guarantees.mutations import caught, patched
from tests.harness import OWNERS, Setting, by_hand
from tests.mechanism.laws import CAUGHT, FALSE_ALARM, poisson_sampling_p_values
from tests.nearly import assert_nearly

KEY = RandomKey.from_seed(0)


@contextmanager
def clipped_per_example() -> Iterator[None]:
    """Every example of a user is clipped by itself, so that a user moves the sum by as many times C."""
    original = Planned.micro_batches

    def micro_batches(*args: Any) -> Iterator[tuple[Any, int]]:
        for batch, _ in original(*args):
            rows = ungroup(batch.content)
            yield rows, len(rows["inputs"])

    with patched((Planned, "micro_batches", micro_batches)):
        yield


@contextmanager
def examples_are_drawn() -> Iterator[None]:
    """Examples are drawn in the place of users, at the users' q, and then put together by user."""

    def draw(units: Units, drawn: Any, physical_batch_size: int, key: RandomKey, step: int) -> list[Piece]:
        members = np.random.default_rng(step).random(len(units.order)) < 0.25
        of_unit = [(unit, [i for i in units.examples_of(unit) if members[i]]) for unit in range(len(units))]
        return [Piece(np.array([unit]), np.array(examples)) for unit, examples in of_unit if examples]

    with patched((draws_module, "pieces", draw)):
        yield


@contextmanager
def split_between_micro_batches() -> Iterator[None]:
    """A user's examples go into micro-batches of one, and count as a user each."""

    def draw(units: Units, drawn: Any, physical_batch_size: int, key: RandomKey, step: int) -> list[Piece]:
        right = pieces(units, drawn, 1, key, step)
        return [Piece(piece.units, piece.examples[at : at + 1]) for piece in right for at in range(len(piece.examples))]

    with patched((draws_module, "pieces", draw)):
        yield


def fit(
    module: L.LightningModule, private: DifferentialPrivacy, data: Any = None, steps: int = 4, **options: Any
) -> Tensor:
    data = WithUser() if data is None else data
    trainer(private, max_steps=steps, **options).fit(module, DataLoader(data, batch_size=3))
    return weights(module)


# --- the result -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
@pytest.mark.parametrize(("physical_batch_size", "most"), [(None, 32), (5, 3), (1, 1)])
def test_training_equals_the_loop_over_users(engine: str, physical_batch_size: int | None, most: int) -> None:
    private = DifferentialPrivacy(
        noise_multiplier=0.7, clip_norm=0.3, seed=3, engine=engine, physical_batch_size=physical_batch_size,
        privacy_unit="user_id", max_examples_per_unit=most,
    )  # fmt: skip
    found = fit(dict_regressor(), private)
    expected = by_hand(Setting(users=True, batch=3, steps=4, most=most))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
def test_in_float64_it_is_the_loop_to_the_last_digits(engine: str) -> None:
    private = DifferentialPrivacy(
        noise_multiplier=0.0, clip_norm=0.05, seed=1, engine=engine, privacy_unit=OWNERS, max_examples_per_unit=2
    )
    found = fit(dict_regressor(), private, precision="64-true")
    exact = Setting(users=True, sigma=0.0, clip=0.05, batch=3, seed=1, steps=4, most=2, dtype=torch.float64)
    torch.testing.assert_close(found.double(), by_hand(exact), rtol=1e-9, atol=1e-11)


def test_users_with_one_example_each_are_the_examples() -> None:
    results = []
    for options in ({}, {"privacy_unit": list(range(len(OWNERS)))}):
        private = DifferentialPrivacy(noise_multiplier=1.0, seed=0, **options)
        results.append(fit(dict_regressor(), private))
    assert_nearly(*results, rtol=1e-5, atol=1e-6)  # float32, in another order of sums at most


class Manual(L.LightningModule):
    """The regressor under manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = dict_regressor().net

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(self.net(batch["inputs"]).squeeze(-1), batch["target"])
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def test_manual_optimization_equals_the_loop_over_users() -> None:
    data = [{name: item[name] for name in ("inputs", "target")} for item in WithUser()]
    private = DifferentialPrivacy(noise_multiplier=0.7, clip_norm=0.3, seed=3, privacy_unit=OWNERS)
    found = fit(Manual(), private, data)
    expected = by_hand(Setting(users=True, batch=3, steps=4, most=32))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class Same(ViewTransform):
    """A view that is the image itself."""

    draws = 1

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        return images


class Images(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]).squeeze(-1), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_views_of_a_users_examples() -> None:
    """Views that are the images change nothing, and others do not depend on the micro-batches."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(len(OWNERS), 3, 2, 2, generator=generator), torch.arange(float(len(OWNERS))))

    def result(views: AugmentationMultiplicity | None, size: int | None) -> Tensor:
        private = DifferentialPrivacy(noise_multiplier=0.0, seed=0, privacy_unit=OWNERS, physical_batch_size=size)
        module = Images()
        run = trainer(private, *([] if views is None else [views]), max_steps=3)
        run.fit(module, DataLoader(data, batch_size=3))
        return weights(module)

    torch.testing.assert_close(result(AugmentationMultiplicity(3, Same()), None), result(None, None))
    flipped = [result(AugmentationMultiplicity(2, Flip()), size) for size in (None, 1)]
    torch.testing.assert_close(*flipped)
    assert not torch.allclose(flipped[0], result(None, None))


def test_every_example_of_a_drawn_user_is_logged_and_counted() -> None:
    module = dict_regressor()
    sizes: list[int] = []
    module.on_train_batch_start = lambda *_: sizes.append(
        sum(len(p.examples) for p in sample_of(module.trainer).pieces)
    )
    fit(module, DifferentialPrivacy(noise_multiplier=1.0, seed=5, privacy_unit="user_id"))
    assert float(module.seen.compute()) == sum(sizes) > 0


# --- the guarantee ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
def test_a_whole_user_moves_the_sum_by_at_most_the_clip_norm(engine: str) -> None:
    """Two datasets, one without user 0, the one with most examples, all of whose gradients are longer than C."""

    def check() -> None:
        updates = []
        for left_out in ((), (0,)):
            module = dict_regressor(lr=1.0)
            before = weights(module)
            private = DifferentialPrivacy(
                noise_multiplier=0.0, clip_norm=0.01, dataset_size=USERS - 1, expected_batch_size=USERS - 1,
                engine=engine, privacy_unit="user_id",
            )  # fmt: skip
            updates.append(fit(module, private, WithUser(left_out), steps=1) - before)
        difference = float((updates[0] - updates[1]).norm()) * (USERS - 1)
        assert difference == pytest.approx(0.01, rel=1e-3)

    check()
    for mutation in (clipped_per_example, split_between_micro_batches):
        with caught(mutation()):
            check()


@given(
    owners=st.lists(st.integers(0, 5), min_size=1, max_size=14),
    seed=st.integers(0, 2**32),
    clip=st.floats(1e-3, 10.0),
    size=st.integers(1, 8),
    per_layer=st.booleans(),
)
def test_adding_a_user_moves_any_sum_by_at_most_the_clip_norm(
    owners: list[int], seed: int, clip: float, size: int, per_layer: bool
) -> None:
    """Whoever is added, with whatever examples, in whatever micro-batches."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(len(owners), 3, generator=generator, dtype=torch.float64) * 5
    parameters = {name: torch.randn(3, generator=generator, dtype=torch.float64) for name in ("a", "b")}

    def loss(given: Any, batch: Any) -> tuple[Tensor, Any]:
        rows = ungroup(batch)
        return ((rows @ given["a"]).tanh() + (rows @ given["b"]) ** 2).mean(), ()

    def total(kept: list[int]) -> Tensor:
        names: dict[int, int] = {}
        units = Units.of([names.setdefault(owners[index], len(names)) for index in kept], most=20)
        batches = [
            (
                group(inputs[kept][piece.examples], len(piece.units), len(piece.examples) // len(piece.units)),
                len(piece.units),
            )
            for piece in pieces(units, np.arange(len(units)), size, KEY, 0)
        ]
        found = accumulate(
            VmapEngine(), loss, parameters, batches, Clipping(clip, "per_layer" if per_layer else "flat")
        )
        return torch.cat(list(found.gradient.values()))

    everybody = total(list(range(len(owners))))
    for user in set(owners):
        without = [index for index, owner in enumerate(owners) if owner != user]
        assert float((everybody - (total(without) if without else 0.0)).norm()) <= clip * (1 + 1e-9)


def test_users_are_drawn_with_all_their_examples_and_with_the_q_that_is_charged() -> None:
    def check() -> None:
        steps, most = 150, 3
        members = np.zeros((steps, USERS), dtype=bool)
        seen = np.zeros((steps, len(OWNERS)), dtype=bool)
        module = dict_regressor(lr=0.0)
        private = DifferentialPrivacy(noise_multiplier=1.0, privacy_unit="user_id", max_examples_per_unit=most, seed=8)

        def remember(batch: Any, batch_idx: int) -> None:
            sample = sample_of(module.trainer)
            for piece in sample.pieces:
                seen[sample.step, piece.examples] = True

        module.on_train_batch_start = remember
        fit(module, private, steps=steps)
        assert private.ledger is not None
        owners = np.array(OWNERS)
        for user in range(USERS):
            own = seen[:, owners == user]
            members[:, user] = own.any(1)
            assert set(own.sum(1).tolist()) <= {0, min(most, own.shape[1])}
        (phase,) = private.ledger.phases
        assert phase.sampling_probability == 3 / USERS
        assert min(poisson_sampling_p_values(members, phase.sampling_probability).values()) > FALSE_ALARM
        often = seen[:, owners == 0][members[:, 0]]
        assert len(np.unique(often, axis=0)) > 3  # of user 0's seven examples not always the same three

    check()
    with caught(examples_are_drawn()):
        check()


def test_the_check_of_the_draw_notices_users_drawn_too_often() -> None:
    draws = np.random.default_rng(0).random((150, USERS)) < 1.5 * 3 / USERS
    assert min(poisson_sampling_p_values(draws, 3 / USERS).values()) < CAUGHT


# --- what is said -----------------------------------------------------------------------------------------------------


def test_the_statement_the_file_and_the_ledger_name_the_unit(tmp_path: Path) -> None:
    private = DifferentialPrivacy(noise_multiplier=2.0, privacy_unit="user_id")
    fit(dict_regressor(), private, default_root_dir=tmp_path)
    assert "add/remove one user_id" in str(private.statement())
    written = json.loads((tmp_path / "privacy.json").read_text())
    assert written["neighbouring_relation"] == "add/remove one user_id with N public"
    assert (written["dataset_size"], written["expected_batch_size"]) == (USERS, 3)
    assert private.ledger is not None
    assert {phase["unit"] for phase in private.ledger.state_dict()["phases"]} == {"user_id"}
    assert "user 1" not in repr(private.privacy_unit)


def test_a_run_goes_on_with_its_unit_and_with_no_other(tmp_path: Path) -> None:
    def run(steps: int, unit: str | None, start: str | None) -> Tensor:
        module = dict_regressor()
        run = trainer(
            DifferentialPrivacy(noise_multiplier=0.5, seed=2, privacy_unit=unit, expected_batch_size=3), max_steps=steps
        )
        run.fit(module, DataLoader(WithUser(), batch_size=3), ckpt_path=start)
        run.save_checkpoint(tmp_path / "half.ckpt")
        return weights(module)

    straight = run(4, "user_id", None)
    run(2, "user_id", None)
    half = str(tmp_path / "half.ckpt")
    with pytest.raises(ValueError, match="privacy_unit='example' after steps with 'user_id': expected the same"):
        run(4, None, half)
    torch.testing.assert_close(run(4, "user_id", half), straight, rtol=1e-5, atol=1e-6)


# --- the pieces -------------------------------------------------------------------------------------------------------


@given(
    numbers=st.lists(st.integers(0, 4), min_size=1, max_size=30),
    most=st.integers(1, 6),
    size=st.integers(1, 9),
    step=st.integers(0, 3),
)
def test_pieces_hold_every_drawn_unit_once_and_whole(numbers: list[int], most: int, size: int, step: int) -> None:
    names: dict[int, int] = {}
    owners = np.array([names.setdefault(number, len(names)) for number in numbers])
    units = Units.of(owners, most)
    drawn = np.arange(0, len(units), 2)
    found = pieces(units, drawn, size, KEY, step)
    assert sorted(unit for piece in found for unit in piece.units) == drawn.tolist()
    for piece in found:
        each = len(piece.examples) // len(piece.units)
        assert len(piece.examples) <= max(size, each)
        assert each <= most
        for unit, own in zip(piece.units, piece.examples.reshape(len(piece.units), each), strict=True):
            assert set(owners[own]) == {unit}
            assert len(set(own)) == each == min(most, int((owners == unit).sum()))


def test_a_group_is_taken_apart_into_units_and_back_into_rows() -> None:
    batch = {"x": torch.arange(12.0).reshape(6, 2), "name": list("abcdef"), "shared": 3}
    grouped = group(batch, 2, 3)
    assert isinstance(grouped, Grouped)
    assert grouped.parts["x"].shape == (2, 3, 2)
    back = ungroup(grouped)
    assert torch.equal(back["x"], batch["x"])
    assert back["name"] == batch["name"]
    names: list[list[str]] = []

    def loss(parameters: Any, one: Any) -> tuple[Tensor, Any]:
        rows = ungroup(one)
        names.append(rows["name"])
        return (rows["x"] @ parameters["w"]).mean(), ()

    LoopEngine().clipped_sum(loss, {"w": torch.ones(2)}, grouped, 2, 1.0)
    assert names == [["a", "b", "c"], ["d", "e", "f"]]
