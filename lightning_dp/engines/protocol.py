"""What a step asks of an engine: a micro-batch in, the sum of its clipped per-example gradients out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.engines.decisions import PartingError
from lightning_dp.engines.forms import Forms
from lightning_dp.engines.keeper import Keeper
from lightning_dp.plan.clipping import Clipping

LossFunction = Callable[[Mapping[str, Tensor], Any], tuple[Tensor, Any]]
"""``(parameters by name, a batch of one) -> (scalar loss, outputs)``. Outputs are any nest of tensors."""


@dataclass
class ClippedSum:
    """An engine's answer for one micro-batch of B examples. All of it is **private**.

    Attributes:
        gradient: parameter name → sum over the B examples of their clipped gradients, in the accumulation type; and the sum of
            what adapts C, if something does (:mod:`lightning_dp.mechanism.adaptive`).
        norms: gradient norms before clipping over all parameters, ``(B,)``; not finite where a gradient was not.
        losses: per-example losses, ``(B,)``.
        outputs: the loss function's outputs, every tensor with a leading axis of B.
    """

    gradient: dict[str, Tensor]
    norms: Tensor
    losses: Tensor
    outputs: Any


class Engine(Protocol):
    """A way to compute clipped sums. Engines differ in speed and memory, never in the result.

    Whoever needs to know what an engine can do reads these attributes. An engine inherits the class and sets those that are
    not as usual.

    Attributes:
        name: as the user gives it.
        is_reference: whether it is the backward pass of training without privacy. There is nothing to compare it with, what
            it cannot run is an error of the training step's own, and what is compiled runs compiled. Every other engine is
            compared with it, see :mod:`lightning_dp.engines.agreement`.
        grows_with_rows: whether more examples at once need more memory.
        brings_layers: whether it can do with parameters that a keeper brings layer by layer.
        keeper: keeps some parameters, brings each when its layer runs, and takes its sums instead of :class:`ClippedSum`;
            ``None`` if the module's parameters are whole.
        forms: in which of several forms each layer's share is computed; ``None`` where there is one way only.
        sum_dtype: the type of the sums; ``None`` for the accumulation type of each parameter.
    """

    name: str
    is_reference: bool = False
    grows_with_rows: bool = True
    brings_layers: ClassVar[bool] = False
    keeper: Keeper | None = None
    forms: Forms | None = None
    sum_dtype: torch.dtype | None = None

    @property
    def partings(self) -> list[PartingError]:
        """Where the examples of the last micro-batch answered differently, see :mod:`lightning_dp.engines.decisions`."""
        return []

    @property
    def handled(self) -> dict[str, str]:
        """Trainable parameter → how its gradient was found in the last pass, where there are several ways."""
        return {}

    def bringable(self) -> set[str]:
        """Names of the parameters that need not be there while other layers than theirs run."""
        return set()

    def clipped_sum(
        self,
        loss_function: LossFunction,
        parameters: Mapping[str, Tensor],
        batch: Any,
        examples: int,
        clipping: Clipping | float,
        *,
        counted: int | None = None,
    ) -> ClippedSum:
        """Clip each of the ``examples`` per-example gradients in ``batch`` and add them up.

        Args:
            loss_function: the loss of a batch of one.
            parameters: the trainable parameters, by name.
            batch: any nest whose tensors have ``examples`` rows.
            examples: B ≥ 1, how many examples ``batch`` holds.
            clipping: how; a number C for flat clipping to that norm.
            counted: how many of the examples count, ``None`` for all. The others, at the end, are padding: they add
                exactly nothing to the sum, and norms, losses and outputs are those of the first ``counted``.

        Raises:
            BatchAxisError: a tensor of ``batch`` does not have one row per example.
        """
        ...


def first_rows(outputs: Any, counted: int | None) -> Any:
    """The outputs of the first ``counted`` examples: every tensor without its rows of padding."""
    if counted is None:
        return outputs
    return pytree.tree_map(lambda leaf: leaf[:counted] if isinstance(leaf, Tensor) else leaf, outputs)


def scalar_loss(loss: Any) -> Tensor:
    """Check that a batch of one gave one number.

    Raises:
        TypeError: the loss is not a tensor.
        ValueError: the loss is not a single number.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"loss of type {type(loss).__name__}: expected a tensor with one element. "
            "Let training_step return the loss, or a dict with the loss under the key 'loss'."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"loss of shape {tuple(loss.shape)}: expected a single number. Reduce it (for instance with .mean()) "
            "before training_step returns it."
        )
    return loss.reshape(())
