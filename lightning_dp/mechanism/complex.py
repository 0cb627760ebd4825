"""Complex parameters as pairs of real numbers: what is differentiated, clipped and made noisy is always real."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def as_real_pairs(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same parameters, complex ones as pairs of their real and imaginary parts, ``(..., 2)``, without copies.

    For a real loss, the gradient with respect to the two parts is the complex number ∂L/∂Re + i ∂L/∂Im that PyTorch puts
    into ``p.grad``; its L2 norm is that of the pair. So a clip norm bounds the same as for real parameters, and noise on
    every real coordinate falls on both parts, independently.

    Example:
        >>> as_real_pairs({"phase": torch.tensor([1 + 2j])})["phase"]
        tensor([[1., 2.]])

    Source: K. Kreutz-Delgado 2009, *The Complex Gradient Operator and the CR-Calculus* (arXiv 0906.4835).
    """
    return {name: torch.view_as_real(p.detach()) if p.is_complex() else p for name, p in parameters.items()}


def coordinates(parameters: Iterable[Tensor]) -> int:
    """How many real numbers the parameters are, each of which gets noise of its own."""
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in parameters)


def as_complex_like(value: Tensor, like: Tensor) -> Tensor:
    """A gradient or a value as real pairs in the shape and type of the parameter ``like``."""
    if like.is_complex():
        return torch.view_as_complex(value.clone()).to(like.dtype)  # a part of a flat vector may start at an odd place
    return value.to(like.dtype)


def put_together(parameters: Mapping[str, Tensor], complex_names: frozenset[str]) -> dict[str, Tensor]:
    """Parameters as their module takes them: those of ``complex_names`` that come as real pairs complex again."""
    return {
        name: torch.view_as_complex(p) if name in complex_names and not p.is_complex() else p
        for name, p in parameters.items()
    }
