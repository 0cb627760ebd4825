"""Views that are mixed of an example's own views, or of these and public images: each example is mixed on its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from lightning_dp.mechanism.memory import queued_to
from lightning_dp.validate import number, shown, whole

DEFAULT_ALPHA = 0.2
"""α of the Beta distribution that weights are drawn from: most mixtures lie near one of the two images."""


class MixViews(ABC):
    """Makes further views of an example out of all its views.

    What a subclass writes is :meth:`mix`, for *one* example; it is mapped over the examples of a batch by ``torch.vmap``, so it
    cannot see another example, keep a value of one, or draw random numbers of its own (torch refuses both).

    Attributes:
        views: how many views it makes of an example.
        draws: how many uniform numbers it needs for an example.
    """

    views: int
    draws: int

    @abstractmethod
    def mix(self, views: Tensor, numbers: Tensor) -> Tensor:
        """``(K, *image)`` and ``(draws,)`` to ``(self.views, *image)``."""

    def numbers(self, uniforms: Tensor) -> Tensor:
        """From uniform numbers in [0, 1), ``(B, draws)`` on the CPU, to those that :meth:`mix` takes. No data are seen."""
        return uniforms

    def __call__(self, views: Tensor, uniforms: Tensor) -> Tensor:
        """``(B, K, *image)`` and ``(B, draws)`` to ``(B, self.views, *image)``, each row from the same row alone."""
        numbers = queued_to(self.numbers(uniforms), views.device, views.dtype)
        mixed: Tensor = torch.vmap(self.mix)(views, numbers)
        expected = (len(views), self.views, *views.shape[2:])
        if tuple(mixed.shape) != expected:
            raise ValueError(
                f"{type(self).__name__}.mix made {tuple(mixed.shape[1:])} of {tuple(views.shape[1:])}: expected "
                f"{expected[1:]}, views={self.views} images of the same size. Change mix, or views."
            )
        return mixed


class MixSelf(MixViews):
    """Views that are each λ·a + (1 − λ)·b of two different views a, b of the same example, with λ from Beta(α, α).

    Both are views of one example, so its label stays right, and the example's gradient is of that example alone.

    Args:
        views: how many to make; the others stay.
        alpha: α > 0.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> mixed = MixSelf(views=3)(torch.rand(2, 4, 1, 8, 8), torch.rand(2, 9))
        >>> mixed.shape
        torch.Size([2, 3, 1, 8, 8])

    Source: "DP-Mix Self", W. Bao, F. Pittaluga, V. Kumar B G, V. Bindschaedler 2023 (arXiv 2311.01295).
    """

    def __init__(self, views: int = 16, alpha: float = DEFAULT_ALPHA) -> None:
        self.views, self.alpha = _views(views), _alpha(alpha)
        self.draws = 3 * views

    def numbers(self, uniforms: Tensor) -> Tensor:
        """The last third becomes weights λ."""
        return torch.cat([uniforms[:, : 2 * self.views], _beta(uniforms[:, 2 * self.views :], self.alpha)], 1)

    def mix(self, views: Tensor, numbers: Tensor) -> Tensor:
        """See :class:`MixViews`."""
        first, second, weight = torch.split(numbers, self.views)
        k = len(views)
        a = _place(first, k)
        b = (a + 1 + _place(second, max(k - 1, 1))) % k  # another one, each of them equally likely
        return _mixed(views[a], views[b], weight)


class MixPublic(MixViews):
    """Views that are each λ·a + (1 − λ)·p of a view a of the example and an image p of a public pool.

    λ is the larger of a number from Beta(α, α) and what it lacks to 1, so the example outweighs the public image and keeps its
    label. (How the authors label such a mixture was not found out.)

    Args:
        public_images: the pool, ``(M, *image)`` as training_step sees images (normalised, of their size): a tensor, or the
            path of a ``.npy`` or ``.pt`` file with one. It **counts as public**: made from or chosen by nobody's private data,
            such as images from a generator that was trained on public ones.
        views: how many to make; the others stay.
        alpha: α > 0.

    Raises:
        ValueError: a number is out of range, or the pool is empty, not finite or not a tensor.

    Source: "DP-Mix Diff", W. Bao, F. Pittaluga, V. Kumar B G, V. Bindschaedler 2023 (arXiv 2311.01295).
    """

    def __init__(self, public_images: Tensor | str | Path, views: int = 2, alpha: float = DEFAULT_ALPHA) -> None:
        self.views, self.alpha = _views(views), _alpha(alpha)
        self.draws = 3 * views
        self.pool = _pool(public_images)

    def numbers(self, uniforms: Tensor) -> Tensor:
        """The last third becomes weights λ ≥ ½."""
        weights = _beta(uniforms[:, 2 * self.views :], self.alpha)
        return torch.cat([uniforms[:, : 2 * self.views], torch.maximum(weights, 1 - weights)], 1)

    def __call__(self, views: Tensor, uniforms: Tensor) -> Tensor:
        """See :class:`MixViews`."""
        if self.pool.shape[1:] != views.shape[2:]:
            raise ValueError(
                f"public_images of shape {tuple(self.pool.shape)}: expected (M, {', '.join(map(str, views.shape[2:]))}), "
                "images as training_step sees them. Resize and normalise the pool as the data module does."
            )
        if self.pool.device != views.device or self.pool.dtype != views.dtype:
            self.pool = self.pool.to(device=views.device, dtype=views.dtype)
        return super().__call__(views, uniforms)

    def mix(self, views: Tensor, numbers: Tensor) -> Tensor:
        """See :class:`MixViews`."""
        first, second, weight = torch.split(numbers, self.views)
        return _mixed(views[_place(first, len(views))], self.pool[_place(second, len(self.pool))], weight)


def _mixed(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    weight = weight.view(-1, *(1 for _ in a.shape[1:]))
    return weight * a + (1 - weight) * b


def _place(uniform: Tensor, many: int) -> Tensor:
    """A number from 0 to ``many`` − 1, each equally likely."""
    return (uniform * many).long().clamp(max=many - 1)


def _beta(uniforms: Tensor, alpha: float) -> Tensor:
    """Beta(α, α) numbers by inversion; the uniforms are the middles of their 2²⁴ cells."""
    middles = uniforms.double().numpy() + 2.0**-25
    return torch.from_numpy(np.asarray(betaincinv(alpha, alpha, middles))).to(uniforms.dtype)


def _views(views: int) -> int:
    if whole("views", views) < 1:
        raise ValueError(f"views={views}: expected at least 1 mixed view per example, such as 16.")
    return views


def _alpha(alpha: float) -> float:
    if not 0.01 <= number("alpha", alpha) <= 100:
        raise ValueError(
            f"alpha={alpha}: expected a number from 0.01 to 100, such as {DEFAULT_ALPHA} (1 for uniform weights)."
        )
    return alpha


def _pool(given: Any) -> Tensor:
    if isinstance(given, (str, Path)):
        path = Path(given)
        if path.suffix not in (".npy", ".pt") or not path.is_file():
            raise ValueError(
                f"public_images={shown(str(path))}: expected the path of a .npy or .pt file with a tensor."
            )
        given = torch.from_numpy(np.load(path)) if path.suffix == ".npy" else torch.load(path, weights_only=True)
    if not isinstance(given, Tensor) or given.ndim < 2 or not len(given):
        what = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise ValueError(f"public_images={what}: expected a tensor (M, *image) with at least one image.")
    if not given.is_floating_point() or not bool(torch.isfinite(given).all()):
        raise ValueError(
            f"public_images of dtype {given.dtype}: expected finite floating-point images, as training_step sees them."
        )
    return given
