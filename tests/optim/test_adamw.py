"""DPAdamW: the plain AdamW without noise, and with noise the second moment of the gradient alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_dp.optim.base as base_module
from lightning_dp.optim import DPAdamW
from lightning_dp.optim.noise_std import tell_noise_std
from tests.guarantees.mutations import caught, patched

OPTIONS: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.2}


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((3, 4), (5,), ())]


def gradients(step: int, like: list[torch.nn.Parameter], noise_std: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    found = [(1 + noise_std) * torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in like]
    return found if step % 3 else [*found[:-1], None]


def steps(optimizer: torch.optim.Optimizer, noise_std: float = 0.0, count: int = 8) -> list[Tensor]:
    (group,) = optimizer.param_groups
    for step in range(count):
        for parameter, gradient in zip(group["params"], gradients(step, group["params"], noise_std), strict=True):
            parameter.grad = gradient
        tell_noise_std(optimizer, noise_std)
        optimizer.step()
    return [parameter.detach() for parameter in group["params"]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16])
def test_without_noise_it_is_the_plain_one(dtype: torch.dtype) -> None:
    plain = steps(torch.optim.AdamW(parameters(dtype), **OPTIONS))
    for ours, theirs in zip(steps(DPAdamW(parameters(dtype), **OPTIONS)), plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    defaults = torch.optim.AdamW(parameters()).defaults
    assert {name: defaults[name] for name in ("lr", "betas", "eps", "weight_decay")} == {
        name: DPAdamW(parameters()).defaults[name] for name in ("lr", "betas", "eps", "weight_decay")
    }


def by_hand(noise_std: float, floor: float, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The authors' form: the noise's variance comes off the bias-corrected second moment of the noisy gradient."""
    weights = [p.detach().clone() for p in parameters(dtype)]
    mean, square, count = ([torch.zeros_like(w) for w in weights] for _ in range(3))
    (beta1, beta2), lr = OPTIONS["betas"], OPTIONS["lr"]
    for step in range(8):
        for place, gradient in enumerate(gradients(step, parameters(dtype), noise_std)):
            if gradient is None:
                continue
            count[place] += 1
            mean[place] = beta1 * mean[place] + (1 - beta1) * gradient
            square[place] = beta2 * square[place] + (1 - beta2) * gradient**2
            own = square[place] / (1 - beta2 ** count[place]) - noise_std**2
            divisor = own.clamp(min=floor * noise_std**2).sqrt() + OPTIONS["eps"]
            weights[place] *= 1 - lr * OPTIONS["weight_decay"]
            weights[place] -= lr * mean[place] / (1 - beta1 ** count[place]) / divisor
    return weights


@pytest.mark.parametrize("floor", [0.1, 3.0])
def test_with_noise_it_is_the_authors(floor: float) -> None:
    ours = steps(DPAdamW(parameters(torch.float64), **OPTIONS, floor=floor), noise_std=0.7)
    for one, other in zip(ours, by_hand(0.7, floor), strict=True):
        torch.testing.assert_close(one, other)


def check_the_second_moment() -> None:
    """E[v̂] is that of the gradient, at noise levels that change, to six standard deviations of what is drawn."""
    coordinates, beta2, signal = 200_000, 0.9, 0.5
    weight = torch.nn.Parameter(torch.zeros(coordinates))
    optimizer = DPAdamW([weight], lr=0.0, betas=(0.9, beta2))
    generator, variance = torch.Generator().manual_seed(1), 0.0
    for step, noise_std in enumerate((1.0, 1.0, 3.0, 0.5, 2.0)):
        weight.grad = signal + noise_std * torch.randn(coordinates, generator=generator)
        tell_noise_std(optimizer, noise_std)
        optimizer.step()
        noisy_square = 2 * noise_std**4 + 4 * signal**2 * noise_std**2  # the variance of (signal + noise)²
        variance = beta2**2 * variance + (1 - beta2) ** 2 * noisy_square
        unbias = 1 - beta2 ** (step + 1)
        found = float(optimizer.state[weight]["exp_avg_sq"].double().mean()) / unbias
        assert abs(found - signal**2) < 6 * math.sqrt(variance / coordinates) / unbias


def test_the_second_moment_is_that_of_the_gradient_without_the_noise() -> None:
    check_the_second_moment()


@contextmanager
def taken_off(times: float) -> Iterator[None]:
    """Bug: something else than the variance is taken off."""
    original = base_module.take_noise_std
    with patched((base_module, "take_noise_std", lambda group: original(group) * times)):
        yield


@pytest.mark.parametrize("times", [0.0, math.sqrt(0.5), math.sqrt(2)])
def test_another_variance_is_noticed(times: float) -> None:
    with caught(taken_off(times)):
        check_the_second_moment()


def test_what_is_told_counts_for_one_step() -> None:
    told, plain = DPAdamW([torch.nn.Parameter(torch.zeros(2))]), DPAdamW([torch.nn.Parameter(torch.zeros(2))])
    for optimizer in (told, plain):
        (group,) = optimizer.param_groups
        group["params"][0].grad = torch.ones(2)
    tell_noise_std(told, 0.5)
    told.step()
    plain.step()
    assert not torch.equal(told.state_dict()["state"][0]["exp_avg_sq"], plain.state_dict()["state"][0]["exp_avg_sq"])
    before = told.state_dict()["state"][0]["exp_avg_sq"].clone()
    told.step()
    torch.testing.assert_close(told.state_dict()["state"][0]["exp_avg_sq"], 0.999 * before + 0.001)
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0).step()
    tell_noise_std(torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=1.0), 0.5)  # who does not ask is left alone


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"floor": 0}, r"floor=0: expected a number above 0"),
        ({"floor": math.nan}, r"floor=nan"),
        ({"lr": -1.0}, r"lr=-1.0: expected a finite number of at least 0"),
        ({"betas": (0.9, 1.0)}, r"betas=1.0: expected a number in \[0, 1\)"),
        ({"betas": 0.9}, r"betas=0.9: expected two numbers"),
        ({"weight_decay": math.inf}, r"weight_decay=inf"),
        ({"eps": "1e-8"}, r"eps="),
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DPAdamW(parameters(), **wrong)
