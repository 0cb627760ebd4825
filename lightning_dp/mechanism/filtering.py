"""What a filter carries from step to step: the weights of the step before, and the filtered gradient. All of it is public."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from lightning_dp.plan.filtering import GradientFilter

KEY = "lightning_dp_gradient_filter"
"""Where a checkpoint holds it."""


@dataclass
class FilterState:
    """Empty before the first step, and again where other parameters are trained than in the step before.

    Of sharded parameters each rank keeps its part of both, and the state of a checkpoint has them whole.

    Attributes:
        weights: of the step before, by name.
        gradient: the filtered gradient m, by name.
        variance: of the noise on each coordinate of that.
        rule: the numbers of the filter that it is the state of; ``None`` before the first step.
    """

    weights: dict[str, Tensor] = field(default_factory=dict)
    gradient: dict[str, Tensor] = field(default_factory=dict)
    variance: float = 0.0
    rule: GradientFilter | None = None

    def moved(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """From the weights of the step before to these, by name; nothing if they are not the same parameters.

        A collective call where those are in shards: these are whole.
        """
        if not _alike(self.weights, weights):
            return {}
        return {name: now.detach() - _whole(self.weights[name]).to(now.device) for name, now in weights.items()}

    def passed(
        self,
        released: Mapping[str, Tensor],
        noise_std: float,
        weights: Mapping[str, Tensor],
        rule: GradientFilter,
    ) -> tuple[dict[str, Tensor], float]:
        """Take a release into the filter.

        Args:
            released: the noisy gradient.
            noise_std: of the noise on each of its coordinates, independent of that of other steps.
            weights: at which it was taken.
            rule: the numbers.

        Returns:
            m, and the standard deviation of the noise on each of its coordinates.
        """
        self.rule = rule
        goes_on = _alike(self.weights, weights) and _alike(self.gradient, released)
        self.weights = {name: now.detach().clone() for name, now in weights.items()}
        if goes_on:
            before = {name: _held_like(self.gradient[name], new) for name, new in released.items()}
            self.gradient = {name: torch.lerp(before[name], new, rule.gain) for name, new in released.items()}
            self.variance = (1 - rule.gain) ** 2 * self.variance + rule.gain**2 * noise_std**2
        else:
            self.gradient = {name: new.clone() for name, new in released.items()}
            self.variance = noise_std**2
        return {name: kept.clone() for name, kept in self.gradient.items()}, self.variance**0.5

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, whole. A collective call where parameters are in shards."""
        return {
            "weights": {name: _whole(kept) for name, kept in self.weights.items()},
            "gradient": {name: _whole(kept) for name, kept in self.gradient.items()},
            "variance": self.variance,
            "rule": None if self.rule is None else [self.rule.gain, self.rule.lookahead],
        }

    def load_state_dict(self, raw: object, rule: GradientFilter | None) -> str | None:
        """The inverse of :meth:`state_dict`, for a fit with ``rule``. What another filter carried, or none, empties it.

        Returns:
            A sentence for the user if the filter begins anew although the run goes on.

        Raises:
            ValueError: it is something else.
        """
        if raw is None:
            self._begin_anew()
            return None if rule is None else f"The checkpoint has no gradient filter: {rule} begins with this fit."
        if not isinstance(raw, dict) or raw.keys() != self.state_dict().keys():
            raise ValueError(
                f"{KEY} in the checkpoint is a {type(raw).__name__}: expected the state of a gradient filter. Resume from a "
                "checkpoint that is whole and unedited."
            )
        self.weights, self.gradient, self.variance = dict(raw["weights"]), dict(raw["gradient"]), float(raw["variance"])
        self.rule = None if raw["rule"] is None else GradientFilter(*raw["rule"])
        if self.rule is None or self.rule == rule:
            return None
        before = self.rule
        self._begin_anew()
        return f"The checkpoint's gradients were filtered by {before}: what that carried is left out, and " + (
            "nothing is filtered from here on." if rule is None else f"{rule} begins with this fit."
        )

    def _begin_anew(self) -> None:
        self.weights, self.gradient, self.variance, self.rule = {}, {}, 0.0, None


def _alike(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> bool:
    """Whether these are tensors of the same names and shapes, in whatever order."""
    return before.keys() == now.keys() and all(before[name].shape == one.shape for name, one in now.items())


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _held_like(tensor: Tensor, like: Tensor) -> Tensor:
    """As ``like`` is: of its type, on its device, and, if that is a shard, this rank's part."""
    tensor = tensor.to(like.device, like.dtype)
    if isinstance(like, DTensor) and not isinstance(tensor, DTensor):  # of a checkpoint
        everywhere = [Replicate() for _ in like.placements]
        tensor = DTensor.from_local(tensor, like.device_mesh, everywhere, run_check=False)
        return tensor.redistribute(placements=like.placements)
    return tensor
