from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.engines.accumulate import Accumulated, accumulate
from lightning_dp.engines.select import make_engine
from tests.engines import oracle
from tests.engines.family import FAMILY, Case, case
from tests.mechanism.laws import CAUGHT, FALSE_ALARM, poisson_sampling_p_values

# torch has no batched kernel of attention for the CPU and says that it is slow; the numbers are right all the same
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

ENGINES = ["ghost", "vmap", "loop"]


def run(engine: str, of: Case, clip_norm: float, sizes: list[int] | None = None) -> Accumulated:
    pieces, start = [], 0
    for size in [of.examples] if sizes is None else sizes:
        pieces.append((tuple(part[start : start + size] for part in of.batch), size))
        start += size
    assert start == of.examples
    return accumulate(make_engine(engine, of.module), of.loss_function(), of.parameters(), pieces, clip_norm)


def same(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert list(one) == list(other)
    for name in one:
        torch.testing.assert_close(
            one[name], other[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FAMILY)
@settings(max_examples=12)
@given(examples=st.integers(1, 6), seed=st.integers(0, 10_000), clip_norm=st.sampled_from([0.1, 1.0, 2.0, math.inf]))
def test_every_engine_gives_what_plain_backward_passes_give(
    engine: str, name: str, examples: int, seed: int, clip_norm: float
) -> None:
    of = case(name, examples, seed)
    expected, norms, losses = oracle.clipped_sum(of, clip_norm)
    result = run(engine, of, clip_norm)
    same(result.gradient, expected)
    torch.testing.assert_close(
        torch.cat(result.norms), torch.tensor(norms, dtype=torch.float64), rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(
        torch.cat(result.losses), torch.tensor(losses, dtype=torch.float64), rtol=1e-10, atol=1e-10
    )
    assert result.examples == examples


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=30)
@given(
    name=st.sampled_from(sorted(FAMILY)),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 10_000),
)
def test_micro_batches_change_nothing(engine: str, name: str, sizes: list[int], seed: int) -> None:
    of = case(name, sum(sizes), seed)
    whole, pieces = run(engine, of, 0.7), run(engine, of, 0.7, sizes)
    same(whole.gradient, pieces.gradient)
    for column in ("losses", "norms"):
        torch.testing.assert_close(torch.cat(getattr(whole, column)), torch.cat(getattr(pieces, column)))
    outputs = [torch.cat([part["output"] for part in result.outputs]) for result in (whole, pieces)]
    torch.testing.assert_close(*outputs)
    assert [len(part) for part in pieces.losses] == sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mlp", "convolution and GroupNorm"])
def test_engines_agree_in_lower_precision_and_sum_in_float32(name: str, dtype: torch.dtype) -> None:
    results = [run(engine, case(name, 6, 0, dtype), 0.7).gradient for engine in ENGINES]
    assert {tensor.dtype for result in results for tensor in result.values()} == {torch.float32}
    for result in results[1:]:
        same(results[0], result, tolerance=1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_clip_gives_the_gradient_of_the_summed_loss(engine: str) -> None:
    of = case("mlp", 6, 0)
    inputs, targets = of.batch
    loss = F.cross_entropy(of.module(inputs), targets, reduction="sum")
    names, parameters = zip(*of.parameters().items(), strict=True)
    plain = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    same(run(engine, of, math.inf).gradient, plain)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_unused_parameter_has_a_gradient_of_zero_and_a_frozen_one_none(engine: str) -> None:
    of = case("unused and frozen parameters", 4, 0)
    gradient = run(engine, of, 0.5).gradient
    assert set(gradient) == {"idle.weight", "idle.bias", "head.weight", "head.bias"}
    assert torch.count_nonzero(gradient["idle.weight"]) == torch.count_nonzero(gradient["idle.bias"]) == 0
    assert torch.count_nonzero(gradient["head.weight"]) > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_reads_no_parameter_has_a_gradient_of_zero(engine: str) -> None:
    parameters = {"w": torch.ones(3)}
    for loss in (lambda _, batch: (batch.sum(), []), lambda _, batch: (torch.tensor(2.0), [])):
        result = make_engine(engine, nn.Module()).clipped_sum(loss, parameters, torch.ones(4, 3), 4, 1.0)
        assert result.gradient["w"].tolist() == [0.0] * 3
        assert result.losses.shape == (4,)


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_leave_the_parameters_and_their_gradients_alone(engine: str) -> None:
    of = case("mlp", 4, 0)
    for parameter in of.parameters().values():
        parameter.grad = torch.full_like(parameter, 3.0)
    before = {name: parameter.detach().clone() for name, parameter in of.parameters().items()}
    result = run(engine, of, 1.0)
    for name, parameter in of.parameters().items():
        assert torch.equal(parameter.detach(), before[name])
        assert torch.equal(parameter.grad, torch.full_like(parameter, 3.0))
        assert not result.gradient[name].requires_grad
    assert not any(tensor.requires_grad for part in result.outputs for tensor in part.values())
    assert not any(tensor.requires_grad for tensor in [*result.losses, *result.norms])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_example_is_counted_and_adds_nothing(engine: str, value: float) -> None:
    of = case("mlp", 5, 0)
    of.batch[0][3] = value
    result = run(engine, of, 0.5)
    same(result.gradient, oracle.clipped_sum(of, 0.5, indices=[0, 1, 2, 4])[0])
    assert result.not_finite == 1
    assert result.examples == 5


class TestDropout:
    """Random layers draw anew for every example."""

    RATE, FEATURES, EXAMPLES = 0.25, 40, 500

    def masks(self, engine: str, seed: int = 0) -> Tensor:
        def loss_function(parameters: Any, batch: Tensor) -> tuple[Tensor, Any]:
            kept = F.dropout(batch, self.RATE) > 0
            return (parameters["w"] * kept).sum(), [kept[0]]

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            batch = torch.ones(self.EXAMPLES, self.FEATURES)
            result = make_engine(engine, nn.Module()).clipped_sum(
                loss_function, {"w": torch.ones(self.FEATURES)}, batch, self.EXAMPLES, math.inf
            )
        masks: Tensor = result.outputs[0]
        torch.testing.assert_close(result.gradient["w"], masks.float().sum(0))
        return masks

    @pytest.mark.parametrize("engine", ENGINES)
    def test_masks_of_examples_are_independent_and_of_the_right_rate(self, engine: str) -> None:
        p_values = poisson_sampling_p_values(self.masks(engine).numpy(), 1 - self.RATE)
        assert min(p_values.values()) > FALSE_ALARM, p_values

    def test_the_check_rejects_one_mask_for_all_examples(self) -> None:
        masks = self.masks("vmap")[:1].expand(self.EXAMPLES, -1).numpy()
        assert min(poisson_sampling_p_values(masks, 1 - self.RATE).values()) < CAUGHT

    @pytest.mark.parametrize("engine", ENGINES)
    def test_masks_follow_torchs_seed(self, engine: str) -> None:
        assert torch.equal(self.masks(engine, 1), self.masks(engine, 1))
        assert not torch.equal(self.masks(engine, 1), self.masks(engine, 2))
