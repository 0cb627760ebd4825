"""Parameters that somebody else keeps, in shards for instance, and brings together for one layer at a time."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor


class Keeper(Protocol):
    """Keeps parameters, trainable and frozen, that the engine is not given, and takes what the engine finds for them."""

    @property
    def names(self) -> Collection[str]:
        """Of the parameters. Each is the ``weight`` or ``bias`` of layers with a rule, and used nowhere else."""
        ...

    def one_pass(self) -> AbstractContextManager[None]:
        """Around one forward pass, backward pass and sum."""
        ...

    def bring(self, name: str) -> Tensor:
        """The parameter's values. The keeper does not hold them: they are gone when the caller lets go."""
        ...

    def add(self, name: str, total: Tensor | None) -> None:
        """Take the pass's sum of clipped gradients of a trainable parameter, ``None`` for zero, in a fixed order."""
        ...
