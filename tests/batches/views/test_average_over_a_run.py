"""The averaged weights of a private run with views: the closed form over 100 updates, also when it was resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy, ExponentialMovingAverage
from lightning_dp.batches.transforms import ViewTransform
from tests.conftest import Regressor, regression_data, regressor, trainer, weights


class Shift(ViewTransform):
    """Views of a vector."""

    draws = 4

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        return images + 0.1 * uniforms


class Remember(L.Callback):
    """The weights after each optimizer step, and before the first."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen = self.seen or [weights(pl_module)]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.seen.append(weights(pl_module))


def run(steps: int, remember: Remember, folder: Path, resume: Path | None = None) -> Regressor:
    module = regressor(lr=0.05)
    private = DifferentialPrivacy(noise_multiplier=1.0, seed=3)
    average = ExponentialMovingAverage(decay=0.9)
    fitter = trainer(private, AugmentationMultiplicity(2, Shift(), images=0), average, remember, max_steps=steps)
    fitter.fit(module, DataLoader(regression_data(), batch_size=16), ckpt_path=resume)
    fitter.save_checkpoint(folder / f"{steps}.ckpt")
    return module


@pytest.mark.parametrize("interrupted_after", [None, 37])
def test_closed_form(tmp_path: Path, interrupted_after: int | None) -> None:
    """Average = Σ_t (1 − μ_t) Π_{s>t} μ_s θ_t + Π_s μ_s θ_0 with μ_t = min(μ, (1 + t) / (10 + t))."""
    remember, resume = Remember(), None
    if interrupted_after is not None:
        run(interrupted_after, remember, tmp_path)
        resume = tmp_path / f"{interrupted_after}.ckpt"
    averaged = weights(run(100, remember, tmp_path, resume))
    assert len(remember.seen) == 101
    decays = [min(0.9, (1 + t) / (10 + t)) for t in range(1, 101)]
    products = torch.tensor([*decays, 1.0], dtype=torch.float64).flip(0).cumprod(0).flip(0)  # Π_{s ≥ t} μ_s
    shares = [products[0], *(products[t + 1] * (1 - decays[t]) for t in range(100))]
    expected = sum(share * theta.double() for share, theta in zip(shares, remember.seen, strict=True))
    torch.testing.assert_close(averaged.double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(averaged, remember.seen[-1], atol=1e-3), "the average is not the last point"
