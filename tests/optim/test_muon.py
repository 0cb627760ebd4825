"""DPMuon: the plain Muon without noise, and with noise less of the bias that the noise has made."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_dp.optim.muon as muon_module
from lightning_dp.optim import DPAdamW, DPMuon
from lightning_dp.optim.muon import orthogonal, unsmoothed
from lightning_dp.optim.noise_std import tell_noise_std
from tests.guarantees.mutations import caught, patched
from tests.optim.test_adamw import steps

DRAWS, TAU = 40_000, 0.1


def drawn(count: int, shape: torch.Size, seed: int) -> Tensor:
    """Standard normal numbers, each with its negative, so that whatever is odd in them cancels."""
    half = torch.randn(count // 2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([half, -half])


def matrix(rows: int = 3, columns: int = 4) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def mean(values: Tensor) -> tuple[Tensor, float]:
    """The mean over draws, and six standard deviations of its length."""
    return values.mean(0), 6 * float(values.std(0).norm()) / math.sqrt(len(values))


def biases(tau: float, ns_steps: int) -> tuple[float, float]:
    """How far the mean of the plain and of the corrected direction is from that of the momentum without noise."""
    at = matrix()
    noisy = at + tau * drawn(DRAWS, at.shape, 1)
    plain = orthogonal(noisy, ns_steps, torch.float64)
    probes = torch.randn(1, *noisy.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    fixed = muon_module.unsmoothed(plain, noisy, tau, probes, ns_steps, torch.float64)
    true = orthogonal(at, ns_steps, torch.float64)
    return tuple(float((one.mean(0) - true).norm()) for one in (plain, fixed))


def check_the_leading_term() -> None:
    """One iteration is smooth, so the expansion holds: a tenth of the bias is left. Five oscillate; at least a quarter goes."""
    plain, fixed = biases(TAU, 1)
    assert fixed < 0.1 * plain
    plain, fixed = biases(TAU, 5)
    assert fixed < 0.75 * plain


def test_the_bias_that_noise_makes_is_taken_off_to_leading_order() -> None:
    check_the_leading_term()


@pytest.mark.parametrize("times", [0.0, 0.5, 2.0])
def test_probes_of_another_size_are_noticed(times: float) -> None:
    def wrong(found: Tensor, at: Tensor, noise_std: float, *rest: Any) -> Tensor:
        return unsmoothed(found, at, noise_std * times, *rest)

    with caught(patched((muon_module, "unsmoothed", wrong))):
        check_the_leading_term()


def test_its_mean_is_twice_that_at_the_noise_less_that_at_double_its_variance() -> None:
    """Without any expansion, so also where the noise is larger than the momentum."""
    at, tau = matrix(), 1.5
    noisy = at + tau * drawn(DRAWS, at.shape, 4)
    probes = torch.randn(1, *noisy.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found, within = mean(unsmoothed(orthogonal(noisy, 5, torch.float64), noisy, tau, probes, 5, torch.float64))
    once, a = mean(orthogonal(at + tau * drawn(DRAWS, at.shape, 6), 5, torch.float64))
    twice, b = mean(orthogonal(at + math.sqrt(2) * tau * drawn(DRAWS, at.shape, 7), 5, torch.float64))
    assert float((found - (2 * once - twice)).norm()) < within + 2 * a + b
    assert within < 0.1 * float(found.norm())


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_noise_of_the_momentum_is_what_it_is_taken_for(nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, float]] = []

    def watched(found: Tensor, at: Tensor, noise_std: float, *_: Any) -> Tensor:
        seen.append((at.clone(), noise_std))
        return found

    monkeypatch.setattr(muon_module, "unsmoothed", watched)
    weight = torch.nn.Parameter(torch.zeros(300, 400))
    optimizer = DPMuon([weight], lr=0.0, momentum=0.7, nesterov=nesterov)
    generator = torch.Generator().manual_seed(0)
    for noise_std in (1.0, 1.0, 3.0, 0.5, 2.0):
        weight.grad = noise_std * torch.randn(300, 400, generator=generator)
        tell_noise_std(optimizer, noise_std)
        optimizer.step()
    for at, noise_std in seen:
        assert abs(float(at.double().square().mean()) / noise_std**2 - 1) < 6 * math.sqrt(2 / at.numel())
    assert len(seen) == 5


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_without_noise_it_is_the_plain_one(adjust: str) -> None:
    options: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.3, "adjust_lr_fn": adjust}

    def matrices() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 8), (8, 3))]

    plain = steps(torch.optim.Muon(matrices(), **options))
    for ours, theirs in zip(steps(DPMuon(matrices(), **options)), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.01)  # Newton-Schulz is in bfloat16


def test_what_is_no_matrix_is_stepped_on_by_dpadamw_and_a_kernel_is_a_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    kernel, bias, head = (torch.randn(*shape, generator=generator) for shape in ((6, 2, 3, 3), (5,), (4, 5)))

    def run(kind: Any, *given: Any, **options: Any) -> list[Tensor]:
        return steps(kind(list(given), lr=0.1, weight_decay=0.2, **options), noise_std=0.7, count=4)

    def own(*tensors: Tensor) -> list[torch.nn.Parameter]:
        return [torch.nn.Parameter(one.clone()) for one in tensors]

    for one, other in zip(run(DPMuon, *own(bias)), run(DPAdamW, *own(bias)), strict=True):
        torch.testing.assert_close(one, other)
    head_alone = run(DPMuon, *own(head), orthogonalize=False)
    torch.testing.assert_close(head_alone[0], run(DPAdamW, *own(head))[0])
    (as_kernel,) = run(DPMuon, *own(kernel))
    assert as_kernel.shape == kernel.shape
    moved = (as_kernel - kernel * (1 - 0.02) ** 4).flatten(1) / (4 * 0.1 * 0.2 * math.sqrt(18))
    assert 0.2 < float(torch.linalg.svdvals(moved).mean()) < 3  # a few steps along directions of singular values near 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"momentum": 1.0}, r"momentum=1.0: expected a number in \[0, 1\)"),
        ({"probes": -1}, r"probes=-1"),
        ({"ns_steps": 0}, r"ns_steps=0"),
        ({"adjust_lr_fn": "no"}, r"adjust_lr_fn='no': expected one of match_rms_adamw, original"),
        ({"nesterov": 1}, r"nesterov="),
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DPMuon([torch.nn.Parameter(torch.zeros(2, 2))], **wrong)
    with pytest.raises(ValueError, match="DPMuon with complex parameters: expected real ones"):
        DPMuon([torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
