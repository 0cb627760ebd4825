"""A linear classifier by preconditioned gradients: the preconditioner is a covariance of the features that is noised once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_dp.models.classifier import ImageClassifier


class FeatureCovariance(ImageClassifier):
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
    centre: Tensor
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
            if value < least:
                raise ValueError(f"{name}={value}: expected at least {least}.")
        for name, number, good in (
            ("lr", lr, lr > 0), ("momentum", momentum, 0 <= momentum < 1), ("ridge", ridge, ridge > 0),
            ("noise_ridge", noise_ridge, noise_ridge >= 0),
        ):  # fmt: skip
            if not math.isfinite(number) or not good:
                raise ValueError(
                    f"{name}={number}: expected a finite number above 0 (momentum in [0, 1); noise_ridge may be 0)."
                )
        if isinstance(centre, list) and len(centre) != in_features:
            raise ValueError(f"centre has {len(centre)} numbers: expected one, or in_features={in_features}.")
        super().__init__(Weights(in_features, num_classes), num_classes)
        self.covariance_steps, self.lr, self.momentum = covariance_steps, lr, momentum
        self.ridge, self.noise_ridge = ridge, noise_ridge
        self.register_buffer("centre", torch.tensor(centre, dtype=torch.float32).expand(in_features).clone())
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
        logits: Tensor = self.network(self._unit(images))
        return logits

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean of −zᵀ S z in the first steps, and of the cross-entropy in the others."""
        features, labels = batch
        z = self._unit(features)
        if self.trainer.global_step < self.covariance_steps:
            loss: Tensor = -(self.network.second(z) * z).sum(-1).mean()
            return loss
        return F.cross_entropy(self.network(z), labels)

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Make the preconditioner, once the covariance is there."""
        if self.trainer.global_step == self.covariance_steps:
            (optimizer,) = self.trainer.optimizers
            self.precondition(float(optimizer.param_groups[0]["told"]))

    @torch.no_grad()
    def precondition(self, noise_std: float) -> None:
        """Make P of S. It reads nothing else of the data.

        Args:
            noise_std: of the noise on each number of the gradient of one step.
        """
        second = self.network.second.weight.double()
        radius = noise_std * math.sqrt(2 * len(second) / self.covariance_steps)
        values, vectors = torch.linalg.eigh((second + second.T) / 2)
        inverse = 1 / (values.clamp(min=0) + self.ridge + self.noise_ridge * radius)
        self.inverse.copy_((vectors * inverse) @ vectors.T)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of both kinds of steps."""
        return Preconditioned(self.network, self.inverse, self.covariance_steps, self.lr, self.momentum)

    def _unit(self, features: Tensor) -> Tensor:
        return F.normalize(features.to(self.centre.dtype) - self.centre, dim=-1)


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


class Preconditioned(torch.optim.Optimizer):
    """See :class:`FeatureCovariance`. What is no part of a step, noise alone in the other parameter's gradient, is left out."""

    def __init__(self, network: Weights, inverse: Tensor, covariance_steps: int, lr: float, momentum: float) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "first": covariance_steps,
            "taken": 0,
            "noise_std": 0.0,
            "told": 0.0,
        }
        super().__init__([network.second.weight, network.classifier.weight], defaults)
        self.inverse = inverse

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch's overloads
        """One step of the kind whose turn it is."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        second, weight = group["params"]
        group["told"], group["noise_std"] = group["noise_std"], 0.0
        group["taken"] += 1
        if group["taken"] <= group["first"]:
            second.sub_(second.grad / group["first"])
            return loss
        moved = self.state[weight].setdefault("moved", torch.zeros_like(weight))
        moved.mul_(group["momentum"]).add_(weight.grad @ self.inverse)
        weight.sub_(group["lr"] * moved)
        return loss
