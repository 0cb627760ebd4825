"""Preconditioned gradients: right without noise, the covariance clipped, noised and charged as the steps that it takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy
from lightning_dp.accounting import Phase, epsilon_bound
from lightning_dp.models import FeatureCovariance
from tests.conftest import trainer

N, D, K = 60, 6, 3


def examples(size: float = 3.0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % K
    return size * torch.randn(N, D, generator=random) + 2 * F.one_hot(labels, D) + 1, labels


def fitted(
    x: Tensor,
    y: Tensor,
    *callbacks: Any,
    kind: type[FeatureCovariance] = FeatureCovariance,
    steps: int = 4,
    **options: Any,
) -> FeatureCovariance:
    module = kind(x.shape[1], K, **options)
    trainer(*callbacks, max_steps=steps).fit(module, DataLoader(TensorDataset(x, y), batch_size=len(x)))
    return module


def private(noise: float, **options: Any) -> DifferentialPrivacy:
    return DifferentialPrivacy(noise_multiplier=noise, seed=3, expected_batch_size=N, **options)


@pytest.mark.parametrize("engine", [None, "ghost", "vmap"])
@pytest.mark.parametrize("covariance_steps", [1, 2])
def test_without_noise_and_clip_it_is_the_preconditioned_gradient_method(engine: Any, covariance_steps: int) -> None:
    x, y = examples()
    callbacks = () if engine is None else (private(0.0, clip_norm=2.0, engine=engine),)
    options = {"lr": 0.3, "momentum": 0.5, "ridge": 0.01, "covariance_steps": covariance_steps}
    module = fitted(x, y, *callbacks, steps=covariance_steps + 3, **options)
    z = F.normalize(x.double(), dim=-1)
    inverse = torch.linalg.inv(z.T @ z / N + 0.01 * torch.eye(D, dtype=torch.float64))
    weight = moved = torch.zeros(K, D, dtype=torch.float64)
    for _ in range(3):
        gradient = (torch.softmax(z @ weight.T, -1) - F.one_hot(y, K)).T @ z / N
        moved = 0.5 * moved + gradient @ inverse
        weight = weight - 0.3 * moved
    torch.testing.assert_close(module.network.classifier.weight.double(), weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(module.network.second.weight.double(), z.T @ z / N, rtol=1e-4, atol=1e-6)


def test_the_ledger_has_the_steps_of_the_covariance() -> None:
    """Two for the covariance, three for the classifier: five Gaussian mechanisms of σ on all examples, and no less."""
    dp = private(2.0, delta=1e-5)
    fitted(*examples(), dp, steps=5, covariance_steps=2)
    assert dp.ledger is not None
    assert dp.ledger.steps == 5
    assert dp.statement().epsilon >= epsilon_bound([Phase(2.0, 1.0, 5)], 1e-5).epsilon * (1 - 1e-6)


@pytest.mark.parametrize("covariance_steps", [1, 4])
def test_the_covariance_has_the_noise_of_its_steps(covariance_steps: int) -> None:
    """Of features that are the centre nothing but noise is released, of σ C / (N √m) on each number."""
    d, sigma = 40, 1.5
    module = fitted(
        torch.zeros(N, d),
        torch.arange(N) % K,
        private(sigma),
        steps=covariance_steps + 1,
        covariance_steps=covariance_steps,
    )
    expected = sigma / N / math.sqrt(covariance_steps)
    assert float(module.network.second.weight.detach().std()) == pytest.approx(expected, rel=0.1)
    radius = expected * math.sqrt(2 * d)
    largest = float(torch.linalg.matrix_norm(module.inverse, 2))
    assert largest == pytest.approx(1 / (1e-4 + radius), rel=1e-3), "of the negative eigenvalues, which are taken for 0"


class Unscaled(FeatureCovariance):
    """A bug that the proof of norm 1 does not survive: features of any length."""

    def _unit(self, features: Tensor) -> Tensor:
        return features - self.centre


@pytest.mark.parametrize("kind", [FeatureCovariance, Unscaled])
def test_one_example_moves_the_covariance_by_the_clip_norm_and_no_more(kind: type[FeatureCovariance]) -> None:
    x, y = examples(size=30.0)
    without = x.clone()
    without[7] = 0.0
    released = [
        fitted(data, y, private(1.3), kind=kind, steps=2).network.second.weight.detach() for data in (x, without)
    ]
    assert N * float((released[0] - released[1]).norm()) == pytest.approx(1.0, abs=2e-3), "the same noise on both"
    if kind is FeatureCovariance:
        free = [fitted(data, y, kind=kind, steps=2).network.second.weight.detach() for data in (x, without)]
        assert N * float((free[0] - free[1]).norm()) == pytest.approx(1.0, abs=1e-4), "so it is before anything clips"


def test_refusals() -> None:
    x, y = examples()
    with pytest.raises(ValueError, match=r"max_steps=2 with covariance_steps=2: expected more"):
        fitted(x, y, steps=2, covariance_steps=2)
    for options, message in (
        ({"in_features": 0}, "in_features=0: expected at least 1"),
        ({"covariance_steps": 0}, "covariance_steps=0: expected at least 1"),
        ({"lr": 0.0}, "lr=0.0: expected a finite number above 0"),
        ({"momentum": 1.0}, "momentum=1.0: expected"),
        ({"centre": [0.0]}, "centre has 1 numbers: expected one, or in_features=6"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureCovariance(**{"in_features": D, "num_classes": K, **options})


def test_a_checkpoint_of_the_last_covariance_step_has_the_preconditioner(tmp_path: Path) -> None:
    """ModelCheckpoint's hook runs before the module's."""
    x, y = examples()
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    fit = trainer(private(1.0), saves, max_steps=4, enable_checkpointing=True)
    fit.fit(FeatureCovariance(D, K, covariance_steps=2), DataLoader(TensorDataset(x, y), batch_size=N))
    first, last = (
        torch.load(path, weights_only=False)["state_dict"]["inverse"] for path in sorted(tmp_path.glob("*.ckpt"))
    )
    torch.testing.assert_close(first, last)
    assert not torch.allclose(first, torch.eye(D))
