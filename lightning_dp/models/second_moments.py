"""What classifiers on second moments of features share: features of length one, the inverse of noised moments, the step."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_dp.models.classifier import ImageClassifier


class OnSecondMoments(ImageClassifier):
    """Base of :class:`~lightning_dp.models.LeastSquares` and :class:`~lightning_dp.models.FeatureCovariance`.

    Args:
        network: of the parameters.
        in_features: d.
        num_classes: k.
        ridge: the part of the ridge that is there without noise.
        noise_ridge: the part that the noise asks for, in units of R = s √(2d), s being the noise on each number of the moments.
        centre: c, d numbers, or one for all. It must be public.

    Raises:
        ValueError: an argument is out of range.
    """

    centre: Tensor

    def __init__(
        self,
        network: nn.Module,
        in_features: int,
        num_classes: int,
        ridge: float,
        noise_ridge: float,
        centre: float | list[float],
    ) -> None:
        check_number("ridge", ridge)
        check_number("noise_ridge", noise_ridge, zero=True)
        if isinstance(centre, list) and len(centre) != in_features:
            raise ValueError(f"centre has {len(centre)} numbers: expected one, or in_features={in_features}.")
        super().__init__(network, num_classes)
        self.ridge, self.noise_ridge = ridge, noise_ridge
        self.register_buffer("centre", torch.tensor(centre, dtype=torch.float32).expand(in_features).clone())

    def unit(self, features: Tensor) -> Tensor:
        """Z = (x − c) / ‖x − c‖; 0 where x = c."""
        return F.normalize(features.to(self.centre.dtype) - self.centre, dim=-1)

    def inverse_of(self, moments: Tensor, noise_std: float) -> Tensor:
        """(A₊ + λ)⁻¹ in float64 of noised moments A, whose negative eigenvalues are left out, with λ = ridge + noise_ridge · R.

        Args:
            moments: ``(d, d)``; its symmetric part is taken.
            noise_std: s.
        """
        radius = noise_std * math.sqrt(2 * len(moments))
        values, vectors = torch.linalg.eigh((moments + moments.T).double() / 2)
        inverse = 1 / (values.clamp(min=0) + self.ridge + self.noise_ridge * radius)
        found: Tensor = (vectors * inverse) @ vectors.T
        return found


class MomentsStep(torch.optim.Optimizer):
    """An optimizer of one group, told the noise of its gradient, whose whole step is :meth:`move`.

    What is made of the parameters is made in there and not in a hook, which runs after ``ModelCheckpoint``'s: a checkpoint of
    the step has it.
    """

    @abstractmethod
    def move(self, group: dict[str, Any], noise_std: float) -> None:
        """The step, in place.

        Args:
            group: the parameters and their numbers.
            noise_std: s, of the noise on each number of the gradient; 0 where nobody told it.
        """

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch's overloads
        """The closure, which may bring the gradient and what is said of its noise, and the step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        (group,) = self.param_groups
        noise_std, group["noise_std"] = float(group["noise_std"]), 0.0
        self.move(group, noise_std)
        return loss


def check_count(name: str, value: int, least: int) -> None:
    """Refuse a number below the least.

    Raises:
        ValueError: it is.
    """
    if value < least:
        raise ValueError(f"{name}={value}: expected at least {least}.")


def check_number(name: str, number: float, *, zero: bool = False) -> None:
    """Refuse what is not finite, below 0, or 0 if that is not allowed.

    Raises:
        ValueError: it is.
    """
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(f"{name}={number}: expected a finite number {'of at least' if zero else 'above'} 0.")
