"""A ``self.log`` that training_step makes for each example, and that Lightning gets once for all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_dp.lightning_internals import logged_again


@dataclass(frozen=True)
class OfMetric:
    """A tensor of a metric's result: the place of the call among the pass's, and of the tensor in the result."""

    call: int
    leaf: int


@dataclass
class LogCall:
    """A ``self.log`` inside training_step.

    ``source`` is the place of what is logged in a metric's result, if it is one; ``number`` says that a Python number was.
    """

    path: str
    name: str
    value: Any
    options: dict[str, Any]
    source: OfMetric | None = None
    number: bool = False


@dataclass
class MetricByPath:
    """A metric object that was logged, by its place in the module (so that ranks can share the call)."""

    path: str


class LogCalls:
    """Gives Lightning what is logged, in the shorter way where it was logged just so before.

    Args:
        module: the user's.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self._ways: dict[str, dict[str, Any]] = {}

    def give(self, call: LogCall, examples: int) -> None:
        """Make one ``self.log`` for a whole step of ``examples`` examples."""
        owner: Any = self._module.get_submodule(call.path)
        value: Any = self._module.get_submodule(call.value.path) if isinstance(call.value, MetricByPath) else call.value
        way = {**call.options, "batch_size": None}
        alike = not call.path and isinstance(value, Tensor) and _same_objects(way, self._ways.get(call.name))
        if not (alike and logged_again(owner, call.name, value, examples)):
            owner.log(call.name, value, **{**way, "batch_size": examples})
            self._ways[call.name] = way


def _same_objects(one: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    return other is not None and one.keys() == other.keys() and all(one[key] is other[key] for key in one)
