from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_dp.mechanism.clip import accumulation_dtype, clip_and_sum, clip_factors, per_example_norms

SLACK = 1 + 1e-6
SHAPES = {"matrix": (3, 2), "vector": (5,), "scalar": (), "kernel": (2, 1, 3, 3), "empty": (0,)}


def gradients(
    examples: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (scale * torch.randn(examples, *shape, generator=generator, dtype=torch.float64)).to(dtype)
        for name, shape in SHAPES.items()
    }


def norm(named: dict[str, Tensor]) -> float:
    return float(torch.cat([tensor.double().flatten() for tensor in named.values()]).norm())


def example(named: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    return {name: rows[index : index + 1] for name, rows in named.items()}


def test_the_edge_table_of_the_factors() -> None:
    nan, inf = math.nan, math.inf
    norms = torch.tensor([0.0, 0.5, 1.0, 2.0, 1e30, nan, inf])
    torch.testing.assert_close(clip_factors(norms, 1.0), torch.tensor([1.0, 1.0, 1.0, 0.5, 1e-30, 0.0, 0.0]))
    torch.testing.assert_close(clip_factors(norms, inf), torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0]))
    assert clip_factors(torch.empty(0), 1.0).shape == (0,)
    assert clip_factors(torch.zeros(3, dtype=torch.float64), 1.0).dtype == torch.float64


@given(
    seed=st.integers(0, 10_000),
    examples=st.integers(1, 6),
    exponent=st.floats(-15, 15),
    clip_norm=st.floats(1e-3, 1e3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_no_example_adds_more_than_the_clip_norm(
    seed: int, examples: int, exponent: float, clip_norm: float, dtype: torch.dtype
) -> None:
    given_gradients = gradients(examples, seed, 10**exponent, dtype)
    for index in range(examples):
        alone, before = clip_and_sum(example(given_gradients, index), clip_norm)
        assert norm(alone) <= clip_norm * SLACK
        if before.item() <= clip_norm:
            assert all(
                torch.equal(alone[name], rows[index].to(alone[name].dtype)) for name, rows in given_gradients.items()
            )
        else:
            assert norm(alone) == pytest.approx(clip_norm, rel=1e-5)


@given(
    seed=st.integers(0, 10_000),
    examples=st.integers(0, 8),
    exponent=st.floats(-6, 6),
    clip_norm=st.floats(1e-3, 1e3),
)
def test_adding_or_removing_one_example_moves_the_sum_by_at_most_the_clip_norm(
    seed: int, examples: int, exponent: float, clip_norm: float
) -> None:
    larger = gradients(examples + 1, seed, 10**exponent, torch.float64)
    gone = seed % (examples + 1)
    smaller = {name: torch.cat([rows[:gone], rows[gone + 1 :]]) for name, rows in larger.items()}
    with_it, without_it = clip_and_sum(larger, clip_norm)[0], clip_and_sum(smaller, clip_norm)[0]
    assert norm({name: with_it[name] - without_it[name] for name in with_it}) <= clip_norm * SLACK


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("coordinates", [1_000_003, 8_000_000])
def test_the_clip_norm_holds_for_parameters_of_millions_of_coordinates(coordinates: int, layout: str) -> None:
    """Squares added up one after the other in float32 would lose up to per cents of the norm."""
    rows = torch.full((1, coordinates), 0.37)
    if layout == "columns":
        rows = rows.repeat(2, 1).t().contiguous().t()[:1]
    norms = per_example_norms({"weight": rows})
    assert norms.item() == pytest.approx(0.37 * math.sqrt(coordinates), rel=5e-7)
    assert norm(clip_and_sum({"weight": rows}, 1.0)[0]) <= SLACK


def test_the_sum_is_the_written_out_formula() -> None:
    given_gradients, clip_norm = gradients(7, dtype=torch.float64), 5.3
    sums, norms = clip_and_sum(given_gradients, clip_norm)
    for name, rows in given_gradients.items():
        expected = torch.zeros_like(rows[0])
        for index in range(7):
            size = norm(example(given_gradients, index))
            expected += rows[index] * (1 if size <= clip_norm else clip_norm / size)
        torch.testing.assert_close(sums[name], expected)
    torch.testing.assert_close(
        norms, torch.tensor([norm(example(given_gradients, i)) for i in range(7)], dtype=torch.float64)
    )
    assert 0 < int((norms > clip_norm).sum()) < 7


def test_the_norm_is_taken_over_all_parameters_together() -> None:
    sums, norms = clip_and_sum({"a": torch.tensor([[3.0]]), "b": torch.tensor([[4.0]])}, 1.0)
    assert norms.tolist() == pytest.approx([5.0], rel=1e-6)
    torch.testing.assert_close(torch.cat(list(sums.values())), torch.tensor([0.6, 0.8]))


def test_without_a_clip_norm_the_sum_is_the_plain_sum() -> None:
    given_gradients = gradients(5, scale=1e4)
    sums, _ = clip_and_sum(given_gradients, math.inf)
    for name, rows in given_gradients.items():
        torch.testing.assert_close(sums[name], rows.sum(0))


@pytest.mark.parametrize("clip_norm", [0.5, math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["matrix", "scalar"])
def test_an_example_whose_norm_is_not_finite_adds_exactly_nothing(value: float, where: str, clip_norm: float) -> None:
    clean, broken = gradients(4), gradients(4)
    broken[where].view(4, -1)[2, 0] = value
    sums, norms = clip_and_sum(broken, clip_norm)
    assert torch.isfinite(norms).tolist() == [True, True, False, True]
    others, _ = clip_and_sum({name: rows[[0, 1, 3]] for name, rows in clean.items()}, clip_norm)
    for name, total in others.items():
        torch.testing.assert_close(sums[name], total)
    alone, _ = clip_and_sum(example(broken, 2), clip_norm)
    assert all(torch.count_nonzero(total) == 0 for total in alone.values())


def test_a_batch_of_broken_examples_adds_nothing() -> None:
    sums, norms = clip_and_sum({"w": torch.full((3, 4), math.nan)}, 1.0)
    assert sums["w"].tolist() == [0.0] * 4
    assert int(torch.isfinite(norms).sum()) == 0


def test_a_zero_gradient_stays_zero() -> None:
    sums, norms = clip_and_sum({"w": torch.zeros(3, 4)}, 1.0)
    assert sums["w"].tolist() == [0.0] * 4
    assert norms.tolist() == [0.0] * 3


def test_an_empty_batch_adds_nothing() -> None:
    sums, norms = clip_and_sum(gradients(0), 1.0)
    assert norms.shape == (0,)
    assert {name: tuple(total.shape) for name, total in sums.items()} == SHAPES
    assert all(torch.count_nonzero(total) == 0 for total in sums.values())


def test_norms_and_sums_of_short_floats_are_kept_in_float32() -> None:
    assert accumulation_dtype(torch.bfloat16) == accumulation_dtype(torch.float16) == torch.float32
    assert accumulation_dtype(torch.float64) == torch.float64
    ones = {"w": torch.ones(1000, 3, dtype=torch.bfloat16)}  # in bfloat16 the sum would stop at 256
    sums, norms = clip_and_sum(ones, math.inf)
    assert sums["w"].dtype == norms.dtype == torch.float32
    assert sums["w"].tolist() == [1000.0] * 3
    torch.testing.assert_close(norms, torch.full((1000,), math.sqrt(3)))


def test_parameters_of_different_types_share_one_norm() -> None:
    mixed = {
        "a": torch.tensor([[3.0]], dtype=torch.bfloat16),
        "b": torch.tensor([[4.0]], dtype=torch.float64),
    }
    sums, norms = clip_and_sum(mixed, 1.0)
    assert norms.tolist() == pytest.approx([5.0], rel=1e-6)
    assert {name: total.dtype for name, total in sums.items()} == {"a": torch.float32, "b": torch.float64}
