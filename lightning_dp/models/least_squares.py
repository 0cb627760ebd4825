"""A linear classifier by least squares, from second moments of the features and their moments with the labels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_dp.models.second_moments import MomentsStep, OnSecondMoments, check_count, check_number


class LeastSquares(OnSecondMoments):
    """Ridge regression on the classes, whose statistics are the gradient of one training step.

    Each feature vector x becomes z = (x − c) / ‖x − c‖ with the public centre c, each of the k classes the vector
    y = e_class − 1/k, and what is wanted of the data are two sums: A = Σ z zᵀ and M = Σ z yᵀ. The loss of an example,

        ℓ = −a ( zᵀ S z + w zᵀ B y ),    a = (1 + w² (1 − 1/k))^(−1/2),

    is linear in the parameters S (d × d) and B (k × d), so its gradient is −a (z zᵀ, w y zᵀ) wherever they are. From zero, one
    step at rate 1 over all N examples leaves S = a A / N and B = a w Mᵀ / N. Then the classifier is solved for:

        W = (A₊/N + λ)⁻¹ M / N,    A₊: A without its negative eigenvalues.

    **Sensitivity.** The gradient of an example has norm a (‖z zᵀ‖² + w² ‖z‖² ‖y‖²)^(1/2) = a (1 + w² (1 − 1/k))^(1/2) = 1, as
    ‖z‖ = 1 and ‖y‖² = (1 − 1/k)² + (k − 1)/k² = 1 − 1/k; a feature vector equal to c has gradient 0. So adding or removing an
    example moves the sums by at most 1, ``clip_norm=1`` clips nothing, and any other clip norm only scales all alike. Nothing
    depends on this proof: under ``DifferentialPrivacy`` each gradient is clipped, S and B are noised once and charged as the
    step that they are, and W is made of them alone.

    Noise of standard deviation s on each number of S becomes, in the symmetric part of A/N, a matrix whose eigenvalues lie
    between ±R, R = s √(2d) / a (Wigner's semicircle). The ridge is λ = ``ridge`` + ``noise_ridge`` · R. s is told by
    ``DifferentialPrivacy`` to an optimizer that asks; without it s is 0.

    All examples belong into one step, ``max_steps=1`` with an (expected) batch of all of them: the noise is then added once.
    Fewer are a sample and more steps are refused.

    Args:
        in_features: d.
        num_classes: k.
        label_weight: w, how much of the sensitivity is spent on M.
        ridge: the part of λ that is there without noise. z zᵀ has trace 1.
        noise_ridge: the part that the noise asks for, in units of R.
        centre: c, d numbers, or one for all. It must be public.

    Raises:
        ValueError: an argument is out of range, or the Trainer would make more than one step.

    Example:
        >>> module = LeastSquares(in_features=2, num_classes=2, ridge=0.1)
        >>> x, y = torch.tensor([[3.0, 0.0], [0.0, 0.5]]), torch.tensor([0, 1])
        >>> loss = module.training_step((x, y), 0)
        >>> loss.backward()
        >>> module.configure_optimizers().step()
        >>> module(x).argmax(1).tolist()
        [0, 1]

    Source: H. Mehta, W. Krichene, A. Thakurta, A. Kurakin and A. Cutkosky, *Differentially Private Image Classification from
    Features*, TMLR 2023 (arXiv 2211.13403): its DP-LS. Its DP-FC uses the noised covariance to precondition the gradient of the
    logistic loss instead: :class:`~lightning_dp.models.FeatureCovariance`.
    """

    network: Moments
    noise_std: Tensor

    def __init__(
        self,
        in_features: int,
        num_classes: int = 10,
        label_weight: float = 1.0,
        ridge: float = 1e-4,
        noise_ridge: float = 1.0,
        centre: float | list[float] = 0.0,
    ) -> None:
        check_count("in_features", in_features, 1)
        check_count("num_classes", num_classes, 2)
        check_number("label_weight", label_weight)
        super().__init__(Moments(in_features, num_classes), in_features, num_classes, ridge, noise_ridge, centre)
        self.label_weight = label_weight
        self.scale = 1 / math.sqrt(1 + label_weight**2 * (1 - 1 / num_classes))
        self.register_buffer("noise_std", torch.zeros(()))

    @override
    def on_fit_start(self) -> None:
        """Refuse more than one step."""
        if self.trainer.max_steps != 1:
            raise ValueError(
                f"max_steps={self.trainer.max_steps} with LeastSquares: expected 1. Its sums are the gradient of a single "
                "step, and each further one would noise them again. Give Trainer(max_steps=1) and a batch of all examples."
            )

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map features ``(n, d)`` to the classes' scores ``(n, k)``."""
        scores: Tensor = self.network(self.unit(images))
        return scores

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean of ℓ."""
        features, labels = batch
        z, k = self.unit(features), self.network.labels.out_features
        y = F.one_hot(labels, k).to(z.dtype) - 1 / k
        second, moments = self.network.second(z), self.network.labels(z)
        each = (second * z).sum(-1) + self.label_weight * (moments * y).sum(-1)
        loss: Tensor = -self.scale * each.mean()
        return loss

    @torch.no_grad()
    def solve(self) -> None:
        """Make the classifier of the two statistics. It reads nothing else of the data."""
        moments = self.network.labels.weight.double() / (self.scale * self.label_weight)
        inverse = self.inverse_of(self.network.second.weight / self.scale, float(self.noise_std) / self.scale)
        self.network.weight.copy_(moments @ inverse)

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the step that leaves the negative gradient in the parameters, and solves for the classifier."""
        return Whole(self)


class Moments(nn.Module):
    """S and B, the parameters of the training step, and W, the classifier that is made of them."""

    weight: Tensor

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        self.second = nn.Linear(in_features, in_features, bias=False)
        self.labels = nn.Linear(in_features, num_classes, bias=False)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("weight", torch.zeros(num_classes, in_features))

    @override
    def forward(self, z: Tensor) -> Tensor:
        """The scores, of W alone."""
        return F.linear(z, self.weight)


class Whole(MomentsStep):
    """A single step from zero, θ = −g, after which the classifier is solved for."""

    def __init__(self, module: LeastSquares) -> None:
        super().__init__(module.network.parameters(), {"lr": 1.0, "noise_std": 0.0})
        self.module = module

    @override
    def move(self, group: dict[str, Any], noise_std: float) -> None:
        """See the class."""
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.copy_(-parameter.grad)
        self.module.noise_std.fill_(noise_std)
        self.module.solve()
