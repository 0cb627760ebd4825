"""Gradients as integers: a sensitivity that holds exactly, sums that do not depend on order, noise added once."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_dp.engines.accumulate import accumulate, private_gradient
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.rounded import RoundedEngine
from lightning_dp.mechanism import grid
from lightning_dp.mechanism.discrete import add_discrete_noise
from lightning_dp.mechanism.discrete_gaussian import discrete_gaussian
from lightning_dp.mechanism.grid import (
    RESOLUTION,
    SHORTER,
    to_grid,
)
from lightning_dp.mechanism.keystream import Keystream
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.release import noise_of
from tests.engines import oracle
from tests.engines.family import case
from tests.mechanism.laws import FALSE_ALARM, plan, release
from tests.mechanism.test_discrete_gaussian import large_noise_p_values

KEY = RandomKey.from_seed(72)
ANY_FLOAT = st.floats(width=32) | st.sampled_from([0.0, 1e-38, -1e38, math.inf, math.nan, 1.0, -0.5])


def squares(units: dict[str, Tensor]) -> int:
    return sum(int(value) ** 2 for part in units.values() for value in part.flatten().tolist())


def the_sensitivity_holds(values: list[float], clip_norm: float, resolution: int) -> dict[str, Tensor]:
    row = torch.tensor(values, dtype=torch.float32)
    units = grid.to_grid(
        {"a": row[: len(values) // 2].clone(), "b": row[len(values) // 2 :].view(-1, 1)}, clip_norm, resolution
    )
    assert {part.dtype for part in units.values()} == {torch.int64}
    assert squares(units) <= resolution**2
    return units


@given(
    values=st.lists(ANY_FLOAT, min_size=2, max_size=30),
    clip_norm=st.floats(1e-6, 1e6),
    resolution=st.sampled_from([1, 3, 16, 1000, 2**20, RESOLUTION]),
)
def test_no_gradient_is_longer_than_the_clip_norm_in_exact_arithmetic(
    values: list[float], clip_norm: float, resolution: int
) -> None:
    units = the_sensitivity_holds(values, clip_norm, resolution)
    norm = math.sqrt(sum(value**2 for value in values)) if all(map(math.isfinite, values)) else math.inf
    flat = torch.cat([part.flatten() for part in units.values()])
    if math.isinf(norm):
        assert not flat.any()
        return
    exact = np.array(values) * (resolution / clip_norm) * min(1.0, SHORTER * clip_norm / max(norm, 1e-300))
    assert np.all(np.abs(flat.numpy()) <= np.abs(exact) * (1 + 1e-12))
    assert np.all(np.abs(flat.numpy() - exact) <= 1 + 1e-9 * np.abs(exact))


@pytest.mark.parametrize("coordinates", [1, 1000, 300_000])
def test_a_gradient_at_the_clip_norm_keeps_nearly_all_of_it(coordinates: int) -> None:
    row = torch.randn(coordinates, generator=torch.Generator().manual_seed(0))
    row = row / row.norm()
    units = to_grid({"w": row}, 1.0)
    assert 1 - 2e-4 < math.sqrt(squares(units)) / RESOLUTION <= 1
    torch.testing.assert_close(units["w"].double() / RESOLUTION, row.double(), rtol=1e-4, atol=2e-9)


def test_float64_gradients_of_any_size_are_within_the_clip_norm() -> None:
    for scale in (1e-300, 1e-8, 1e140, 1e308):
        units = to_grid({"w": torch.tensor([scale, -scale, 0.3 * scale], dtype=torch.float64)}, 0.5)
        assert squares(units) <= RESOLUTION**2
        assert units["w"].any() == (scale in (1e-8, 1e140))


def of_case(name: str, examples: int) -> Any:
    return case(name, examples, seed=2)


def test_the_sum_is_that_of_plain_backward_passes_whatever_the_micro_batches() -> None:
    of = of_case("reused layer", 6)
    expected, norms, losses = oracle.clipped_sum(of, 0.1)
    found = RoundedEngine(LoopEngine()).clipped_sum(of.loss_function(), of.parameters(), of.batch, 6, 0.1)
    assert found.norms.tolist() == pytest.approx([float(norm) for norm in norms])
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found.gradient[name].double() * (0.1 / RESOLUTION), gradient.double(), rtol=1e-4, atol=1e-7
        )
    assert len(found.losses) == len(losses) == 6


def integers(*micro_batches: list[int]) -> dict[str, Tensor]:
    """The summed integers of the examples named, in micro-batches."""
    of = of_case("reused layer", 6)
    rows = [(_rows(of.batch, wanted), len(wanted)) for wanted in micro_batches]
    return accumulate(RoundedEngine(LoopEngine()), of.loss_function(), of.parameters(), rows, 0.1).gradient


def _rows(batch: Any, wanted: list[int]) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: leaf[wanted] if isinstance(leaf, Tensor) else leaf, batch)


def no_gradient_is_longer_than_the_clip_norm() -> None:
    """Gradients at and above the clip norm, on coarse and on fine grids."""
    generator = torch.Generator().manual_seed(0)
    for resolution in (3, 16, 1000, RESOLUTION):
        for length in (0.99999, 1.0, 3.0):
            row = torch.randn(20, generator=generator)
            the_sensitivity_holds((row / row.norm() * length).tolist(), 1.0, resolution)


def removing_an_example_takes_exactly_its_integers() -> None:
    whole, order = integers([0, 1, 2, 3, 4, 5]), integers([5, 3], [1], [4, 0, 2])
    for removed in (0, 3):
        rest, alone = integers([i for i in range(6) if i != removed]), integers([removed])
        assert squares(alone) <= RESOLUTION**2
        for name in whole:
            assert torch.equal(whole[name], order[name])
            assert torch.equal(whole[name] - rest[name], alone[name])


def test_removing_an_example_takes_exactly_its_integers_and_nothing_else() -> None:
    """The sensitivity theorem, through the engine: no rounding anywhere in the sum depends on who else is there."""
    removing_an_example_takes_exactly_its_integers()


def on_ranks(ranks: int, coordinates: int = 200_000) -> Tensor:
    """The integers released by ``ranks`` ranks with gradients of zero: the noise of one step."""
    on_a_grid = plan(resolution=RESOLUTION, coordinates=coordinates)
    sums: list[Tensor] = []

    def collect(flat: Tensor) -> Tensor:
        sums.append(flat.clone())
        return flat

    for rank in range(ranks):
        release(
            {"w": torch.zeros(coordinates, dtype=torch.int64)},
            on_a_grid,
            KEY,
            3,
            rank=rank,
            size=ranks,
            total=collect,
        )
    return torch.stack(sums).sum(0)


def noise_is_added_once_and_has_the_law(ranks: int) -> None:
    noise = on_ranks(ranks).numpy()
    assert (
        min(
            large_noise_p_values(
                noise, noise_of(plan(resolution=RESOLUTION, coordinates=1).mechanism).variance
            ).values()
        )
        > FALSE_ALARM
    )


@pytest.mark.parametrize("ranks", [1, 3])
def test_noise_is_added_once_whatever_the_number_of_ranks(ranks: int) -> None:
    noise_is_added_once_and_has_the_law(ranks)


def test_what_is_released_is_sum_plus_noise_in_the_units_of_a_gradient() -> None:
    five = plan(resolution=RESOLUTION, coordinates=5)
    gradient = {"w": torch.tensor([[RESOLUTION, 0], [-7, 3]]), "b": torch.tensor(5)}
    released = release(gradient, five, KEY, 2)
    noise = discrete_gaussian(noise_of(five.mechanism).variance, 5, Keystream.of(KEY, Stream.NOISE, 2, 0))
    unit = five.clip_norm / RESOLUTION / five.expected_batch_size
    assert released["w"].shape == (2, 2)
    assert released["b"].shape == ()
    flat = torch.cat([released["w"].flatten(), released["b"].flatten()]) / unit
    assert (flat.numpy() - noise).tolist() == pytest.approx([RESOLUTION, 0, -7, 3, 5], abs=1e-3)
    again = private_gradient(  # the whole step on a page takes the same way
        RoundedEngine(LoopEngine()), *_nothing(), [], plan(resolution=RESOLUTION, coordinates=5), KEY, 2
    )
    assert torch.equal(again["w"] / unit, torch.from_numpy(noise).double() * unit / unit)


def _nothing() -> tuple[Any, dict[str, Tensor]]:
    return (lambda parameters, batch: None), {"w": torch.zeros(5)}


def test_sums_that_are_not_integers_and_coordinates_nobody_accounts_for_are_refused() -> None:
    three = plan(resolution=RESOLUTION, coordinates=3)
    with pytest.raises(TypeError, match=r"dtype=torch.float32: expected torch.int64"):
        release({"w": torch.zeros(3)}, three, KEY, 0)
    with pytest.raises(TypeError, match=r"expected torch.int64"):
        release({"w": torch.zeros(3, dtype=torch.int64)}, three, KEY, 0, total=lambda flat: flat.double())
    with pytest.raises(RuntimeError, match=r"4 trainable coordinates: expected at most 3"):
        release({"w": torch.zeros(4, dtype=torch.int64)}, three, KEY, 0)
    with pytest.raises(TypeError, match=r"expected torch.int64"):
        add_discrete_noise([(0, torch.zeros(3))], 3, variance=Fraction(1), key=KEY, step=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noise_multiplier": 0.0}, "noise_multiplier=0 with secure=True: expected noise"),
        ({"coordinates": None}, "coordinates=None"),
        ({"noise_multiplier": 1e-9, "resolution": 2**20}, "expected noise of at least one unit"),
        ({"dataset_size": 2**32}, "fit into 62 bits"),
        ({"noise_multiplier": 5e6}, "fit into 62 bits"),
        ({"max_batch_size": 0}, "max_batch_size=0"),
    ],
)
def test_plans_that_do_not_fit_the_grid_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan(**{"resolution": RESOLUTION, "coordinates": 10, **changes})


def test_parts_of_a_sum_get_the_noise_of_the_whole() -> None:
    whole, cut, variance = torch.zeros(100_000, dtype=torch.int64), torch.zeros(100_000, dtype=torch.int64), Fraction(9)
    add_discrete_noise([(0, whole)], 100_000, variance=variance, key=KEY, step=1)
    for start, end in ((0, 7), (7, 70_000), (70_000, 100_000)):
        add_discrete_noise([(start, cut[start:end])], 100_000, variance=variance, key=KEY, step=1)
    assert torch.equal(whole, cut)
    assert whole.unique().numel() > 10
