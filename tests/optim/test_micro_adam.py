"""DPMicroAdam: the largest coordinates in a window of steps, and nothing of a gradient is lost."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dp.optim import DPMicroAdam, DPMuon
from tests.optim.test_adamw import OPTIONS, gradients, parameters, steps


def test_of_all_coordinates_and_within_the_window_it_is_adamw() -> None:
    plain = steps(torch.optim.AdamW(parameters(), **OPTIONS))
    for ours, theirs in zip(steps(DPMicroAdam(parameters(), **OPTIONS, density=1.0)), plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def by_hand(density: float, window: int, count: int) -> list[Tensor]:
    """As written: sparse gradients are dicts, and the moments are sums over the last few of them."""
    found = []
    (beta1, beta2), lr = OPTIONS["betas"], OPTIONS["lr"]
    for place, start in enumerate(parameters(torch.float64)):
        weight, error, past = start.detach().flatten().tolist(), [0.0] * start.numel(), []
        for step in range(count):
            gradient = gradients(step, parameters(torch.float64))[place]
            if gradient is None:
                continue
            total = [g + e for g, e in zip(gradient.flatten().tolist(), error, strict=True)]
            largest = sorted(range(len(total)), key=lambda at: -abs(total[at]))[: math.ceil(density * len(total))]
            past.append({at: total[at] for at in largest})
            error = [0.0 if at in past[-1] else value for at, value in enumerate(total)]
            t = len(past)
            for at in range(len(weight)):
                values = [(age, sparse.get(at, 0.0)) for age, sparse in enumerate(past[::-1][:window])]
                mean = (1 - beta1) / (1 - beta1**t) * sum(beta1**age * v for age, v in values)
                square = (1 - beta2) / (1 - beta2**t) * sum(beta2**age * v**2 for age, v in values)
                weight[at] *= 1 - lr * OPTIONS["weight_decay"]
                weight[at] -= lr * mean / (math.sqrt(square) + OPTIONS["eps"])
        found.append(torch.tensor(weight, dtype=torch.float64).view(start.shape))
    return found


def test_it_is_the_loop_by_hand_beyond_the_window_too() -> None:
    ours = steps(DPMicroAdam(parameters(torch.float64), **OPTIONS, density=0.3, window=3), count=9)
    for one, other in zip(ours, by_hand(0.3, 3, 9), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("kind", [DPMicroAdam, DPMuon])
def test_a_state_that_was_saved_goes_on_as_if_it_had_not_been(kind: Any, dtype: torch.dtype) -> None:
    if kind is DPMuon and dtype.is_complex:
        return  # refused
    weight = torch.nn.Parameter(torch.zeros(40, 30, dtype=dtype))
    generator = torch.Generator().manual_seed(0)
    optimizer = kind([weight], lr=0.1)

    def go_on(optimizer: Any, weight: Tensor, gradients: list[Tensor]) -> Tensor:
        for gradient in gradients:
            weight.grad = gradient
            for group in optimizer.param_groups:
                group["noise_std"] = 0.5
            optimizer.step()
        return weight.detach().clone()

    drawn = [torch.randn(40, 30, generator=generator).to(dtype) for _ in range(15)]
    go_on(optimizer, weight, drawn[:12])
    other = torch.nn.Parameter(weight.detach().clone())
    resumed = kind([other], lr=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(go_on(optimizer, weight, drawn[12:]), go_on(resumed, other, drawn[12:]))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"density": 0.0}, r"density=0.0: expected a number in \(0, 1\]"), ({"window": 0}, r"window=0")],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DPMicroAdam(parameters(), **wrong)
