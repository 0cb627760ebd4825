"""A linear classifier by preconditioned gradients: the preconditioner is a covariance of the features that is noised once."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_dp.models.second_moments import MomentsStep, OnSecondMoments, check_count, check_number


class FeatureCovariance(OnSecondMoments):
    """Logistic regression on features by noised gradients that a noised covariance of the features preconditions (DP-FC).

    Each feature vector x becomes z = (x − c) / ‖x − c‖ with the public centre c. Steps are of two kinds, and each is an
    ordinary step: clipped, noised and charged like all others.

    - The first m = ``covariance_steps`` have the loss −zᵀ S z of a parameter S (d × d). Its gradient is −z zᵀ wherever S is,
      of norm 1, so ``clip_norm=1`` clips nothing. From zero they leave S, the mean over the m steps of A / N with
      A = Σ z zᵀ over the step's examples, with 1/√m of a step's noise.
    - All others have the cross-entropy of the logits W z. The noised gradient g moves the classifier by
      v ← ``momentum`` v + g P and W ← W − ``lr`` v, where P = (S₊ + λ)⁻¹. S₊ is S symmetrised, without its negative
      eigenvalues.

    P is made of S alone, and P g of two releases: both are post-processing. What the ledger says of m + T steps is
    the cost of all. m says how the budget is divided.

    Noise of standard deviation s on each number of S becomes a matrix with eigenvalues between ±R, R = s √(2d) (Wigner's
    semicircle). λ = ``ridge`` + ``noise_ridge`` · R; s is told by ``DifferentialPrivacy``, and without it is 0.

    Args:
        in_features: d.
        num_classes: k.
        covariance_steps: m.
        lr: rate of the other steps.
        momentum: of the other steps, in [0, 1).
        ridge: the part of λ that is there without noise. z zᵀ has trace 1.
        noise_ridge: the part that the noise asks for, in units of R.
        centre: c, d numbers, or one for all. It must be public.

    Raises:
        ValueError: an argument is out of range, or the Trainer has no steps after the first m.

    Source: H. Mehta, W. Krichene, A. Thakurta, A. Kurakin and A. Cutkosky, *Differentially Private Image Classification from
    Features*, TMLR 2023 (arXiv 2211.13403): its DP-FC. The division of the budget by steps and the ridge that follows from the
    noise are ours.
    """

    network: Weights
    inverse: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int = 10,
        covariance_steps: int = 1,
        lr: float = 1.0,
        momentum: float = 0.0,
        ridge: float = 1e-4,
        noise_ridge: float = 1.0,
        centre: float | list[float] = 0.0,
    ) -> None:
        for name, value, least in (
            ("in_features", in_features, 1), ("num_classes", num_classes, 2), ("covariance_steps", covariance_steps, 1),
        ):  # fmt: skip
            check_count(name, value, least)
        check_number("lr", lr)
        check_number("momentum", momentum, zero=True)
        if momentum >= 1:
            raise ValueError(f"momentum={momentum}: expected a finite number in [0, 1).")
        super().__init__(Weights(in_features, num_classes), in_features, num_classes, ridge, noise_ridge, centre)
        self.covariance_steps, self.lr, self.momentum = covariance_steps, lr, momentum
        self.register_buffer("inverse", torch.eye(in_features))

    @override
    def on_fit_start(self) -> None:
        """Refuse a Trainer that would end before the classifier has taken a step."""
        if 0 <= self.trainer.max_steps <= self.covariance_steps:
            raise ValueError(
                f"max_steps={self.trainer.max_steps} with covariance_steps={self.covariance_steps}: expected more, since the "
                "classifier takes its steps after them."
            )

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map features ``(n, d)`` to logits ``(n, k)``."""
        logits: Tensor = self.network(self.unit(images))
        return logits

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean of −zᵀ S z in the first steps, and of the cross-entropy in the others."""
        features, labels = batch
        z = self.unit(features)
        if self.trainer.global_step < self.covariance_steps:
            loss: Tensor = -(self.network.second(z) * z).sum(-1).mean()
            return loss
        return F.cross_entropy(self.network(z), labels)

    @torch.no_grad()
    def precondition(self, noise_std: float) -> None:
        """Make P of S. It reads nothing else of the data.

        Args:
            noise_std: of the noise on each number of the gradient of one step.
        """
        noise_of_mean = noise_std / math.sqrt(self.covariance_steps)
        self.inverse.copy_(self.inverse_of(self.network.second.weight, noise_of_mean))

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of both kinds of steps."""
        return Preconditioned(self)


class Weights(nn.Module):
    """S and W, both zero."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.second = nn.Linear(in_features, in_features, bias=False)
        self.classifier = nn.Linear(in_features, num_classes, bias=False)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    @override
    def forward(self, z: Tensor) -> Tensor:
        """The logits, of W alone."""
        logits: Tensor = self.classifier(z)
        return logits


class Preconditioned(MomentsStep):
    """See :class:`FeatureCovariance`. What is no part of a step, noise alone in the other parameter's gradient, is left out."""

    def __init__(self, module: FeatureCovariance) -> None:
        numbers = {"lr": module.lr, "momentum": module.momentum, "first": module.covariance_steps, "taken": 0}
        super().__init__(
            [module.network.second.weight, module.network.classifier.weight], {**numbers, "noise_std": 0.0}
        )
        self.module = module

    @override
    def move(self, group: dict[str, Any], noise_std: float) -> None:
        """A step of the kind whose turn it is."""
        second, weight = group["params"]
        group["taken"] += 1
        if group["taken"] <= group["first"]:
            second.sub_(second.grad / group["first"])
            if group["taken"] == group["first"]:
                self.module.precondition(noise_std)
            return
        moved = self.state[weight].setdefault("moved", torch.zeros_like(weight))
        moved.mul_(group["momentum"]).add_(weight.grad @ self.module.inverse)
        weight.sub_(group["lr"] * moved)
