"""Gradients and ε agree with Opacus on a model that both can do."""

from __future__ import annotations

import opacus
import pytest
import torch
from opacus.accountants import PRVAccountant
from torch import nn

from lightning_dp.accounting import Phase, epsilon_bound
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import Engine
from lightning_dp.engines.vmap import VmapEngine


@pytest.mark.filterwarnings("ignore:.*[Bb]ackward hook")
@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("engine", [VmapEngine(), LoopEngine()], ids=["vmap", "loop"])
def test_clipped_sums_agree(engine: Engine) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 64, 10)
    )
    images, labels, clip = torch.randn(12, 1, 8, 8), torch.randint(0, 10, (12,)), 0.7

    def loss(parameters: object, batch: object) -> object:
        x, y = batch
        return nn.functional.cross_entropy(torch.func.functional_call(net, parameters, (x,)), y), []

    ours = engine.clipped_sum(loss, dict(net.named_parameters()), (images, labels), 12, clip)
    theirs = opacus.GradSampleModule(net, loss_reduction="mean")
    nn.functional.cross_entropy(theirs(images), labels).backward()
    samples = {name.removeprefix("_module."): p.grad_sample for name, p in theirs.named_parameters()}
    norms = torch.stack([s.flatten(1).norm(dim=1) for s in samples.values()]).norm(dim=0)
    torch.testing.assert_close(ours.norms, norms, rtol=1e-4, atol=1e-6)
    factors = (clip / (norms + 1e-6)).clamp(max=1.0)  # Opacus adds 1e-6 to the norm
    for name, sample in samples.items():
        torch.testing.assert_close(ours.gradient[name], torch.einsum("i,i...", factors, sample), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")  # Opacus's accountant warns about its own grids
@pytest.mark.parametrize(("sigma", "q", "steps"), [(1.0, 0.01, 300), (2.0, 0.178, 120), (1.5, 0.05, 200)])
def test_epsilons_agree(sigma: float, q: float, steps: int) -> None:
    theirs = PRVAccountant()
    theirs.history = [(sigma, q, steps)]
    epsilon = theirs.get_epsilon(delta=1e-5, eps_error=0.01)
    assert epsilon_bound([Phase(sigma, q, steps)], 1e-5).epsilon == pytest.approx(epsilon, abs=0.025)
