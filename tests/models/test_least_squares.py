"""Least squares from statistics that are noised once: right without noise, of sensitivity 1, charged as one step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from scipy.stats import norm
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy
from lightning_dp.models import LeastSquares
from tests.conftest import trainer

N, D, K = 60, 6, 3


def examples(seed: int = 0, size: float = 3.0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(N) % K
    return size * torch.randn(N, D, generator=random) + 2 * F.one_hot(labels, D) + 1, labels


def fitted(
    x: Tensor, y: Tensor, kind: type[LeastSquares] = LeastSquares, *callbacks: Any, **options: Any
) -> LeastSquares:
    module = kind(x.shape[1], K, **options)
    data = DataLoader(TensorDataset(x, y), batch_size=len(x))
    trainer(*callbacks, max_steps=1).fit(module, data)
    return module


def private(noise: float, **options: Any) -> DifferentialPrivacy:
    return DifferentialPrivacy(noise_multiplier=noise, seed=3, **options)


def statistics(module: LeastSquares) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.network.parameters()])


@pytest.mark.parametrize("callbacks", [(), (private(0.0),)], ids=["plain", "private"])
def test_without_noise_it_is_ridge_regression_in_closed_form(callbacks: tuple[Any, ...]) -> None:
    x, y = examples()
    module = fitted(x, y, LeastSquares, *callbacks, label_weight=2.0, ridge=0.01, centre=[1.0] * D)
    z = (x.double() - 1).numpy()
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    target = np.eye(K)[y] - 1 / K
    expected = np.linalg.solve(z.T @ z / N + 0.01 * np.eye(D), z.T @ target / N)
    np.testing.assert_allclose(module.network.weight.double().T, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(module(x).detach(), z @ expected, rtol=1e-3, atol=1e-4)
    assert float(module.noise_std) == 0


class Unscaled(LeastSquares):
    """A bug that the docstring's proof does not survive: features of any length."""

    def _unit(self, features: Tensor) -> Tensor:
        return features - self.centre


@pytest.mark.parametrize("kind", [LeastSquares, Unscaled])
@pytest.mark.parametrize("weight", [0.5, 4.0])
def test_one_example_moves_the_sums_by_the_clip_norm_and_no_more(kind: type[LeastSquares], weight: float) -> None:
    """An example that equals the centre counts nothing: beside it, an example is added or removed."""
    x, y = examples(size=30.0)
    without = x.clone()
    without[7] = 0.0
    sums = [N * statistics(fitted(data, y, kind, private(1.3), label_weight=weight)) for data in (x, without)]
    moved = float((sums[0] - sums[1]).norm())
    assert moved == pytest.approx(1.0, abs=2e-3), "the same noise on both, as they have the same seed"
    if kind is LeastSquares:
        free = [N * statistics(fitted(data, y, kind, label_weight=weight)) for data in (x, without)]
        assert float((free[0] - free[1]).norm()) == pytest.approx(1.0, abs=1e-4), "so it is before anything clips"


def test_it_is_charged_as_one_gaussian_mechanism() -> None:
    """ε of the ledger is where the δ of the Gaussian mechanism in closed form is 1e-5 (Balle and Wang 2018, theorem 8)."""
    dp = private(2.0, delta=1e-5)
    module = fitted(*examples(), LeastSquares, dp)
    epsilon, sigma = dp.statement().epsilon, 2.0
    delta = norm.cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * norm.cdf(-0.5 / sigma - epsilon * sigma)
    assert 0.9e-5 < delta <= 1.0e-5
    assert float(module.noise_std) == pytest.approx(sigma / N)


def test_the_ridge_grows_with_the_noise_as_wigner_says() -> None:
    """Where nothing but noise is released, the eigenvalues of its symmetric part fill [−R, R]."""
    d = 120
    module = fitted(torch.zeros(N, d), torch.arange(N) % K, LeastSquares, private(1.0))
    module.requires_grad_(False)
    second = module.network.second.weight / module.scale
    radius = float(module.noise_std) * math.sqrt(2 * d) / module.scale
    values = torch.linalg.eigvalsh((second + second.T) / 2)
    assert 0.85 * radius < float(values.max()) < 1.15 * radius
    largest = torch.linalg.matrix_norm(module.network.weight, 2)
    moments = module.network.labels.weight / module.scale
    assert float(largest) <= float(torch.linalg.matrix_norm(moments, 2)) / radius


def test_refusals() -> None:
    x, y = examples()
    data = DataLoader(TensorDataset(x, y), batch_size=N)
    with pytest.raises(ValueError, match=r"max_steps=2 with LeastSquares: expected 1"):
        trainer(private(1.0), max_steps=2).fit(LeastSquares(D, K), data)
    for options, message in (
        ({"in_features": 0}, "in_features=0: expected at least 1"),
        ({"num_classes": 1}, "num_classes=1: expected at least 2"),
        ({"label_weight": 0.0}, "label_weight=0.0: expected a finite number above 0"),
        ({"ridge": math.inf}, "ridge=inf: expected a finite number above 0"),
        ({"noise_ridge": -1.0}, "noise_ridge=-1.0: expected a finite number of at least 0"),
        ({"centre": [0.0]}, "centre has 1 numbers: expected one, or in_features=6"),
    ):
        with pytest.raises(ValueError, match=message):
            LeastSquares(**{"in_features": D, "num_classes": K, **options})


def test_a_checkpoint_of_the_step_has_the_classifier(tmp_path: Path) -> None:
    """ModelCheckpoint's hook runs before the module's."""
    x, y = examples()
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    module = LeastSquares(D, K)
    fit = trainer(private(1.0), saves, max_steps=1, enable_checkpointing=True)
    fit.fit(module, DataLoader(TensorDataset(x, y), batch_size=N))
    (path,) = tmp_path.glob("*.ckpt")
    kept = torch.load(path, weights_only=False)["state_dict"]["network.weight"]
    torch.testing.assert_close(kept, module.network.weight)
    assert kept.any()
