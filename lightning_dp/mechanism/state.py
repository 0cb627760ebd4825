"""What a mechanism carries from one step to the next, beside the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class MechanismState:
    """What noise and clipping carry from step to step: nothing where every step's noise is drawn anew and C is fixed.

    It goes through each release, which returns the next one, and its values are saved in checkpoints. All of these are public:
    the same on every rank, and computed from nothing but what has been released.

    Args:
        values: name → a plain value: a number, a string, or a list or dict of these.
        past: what this process has in memory of earlier noise and could compute again. **Secret**: it is never saved.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    past: object = field(default=None, compare=False, repr=False)

    def but(self, **changes: Any) -> MechanismState:
        """The same with other values under these names."""
        return replace(self, values={**self.values, **changes})

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return dict(self.values)

    @classmethod
    def read(cls, raw: object) -> MechanismState:
        """The inverse of :meth:`state_dict`; ``None``, as in checkpoints that have none, is the empty state.

        Raises:
            ValueError: it is no dict.
        """
        if raw is None:
            return cls()
        if not isinstance(raw, dict):
            raise ValueError(f"the mechanism's state is a {type(raw).__name__}: expected a dict.")
        return cls(dict(raw))


NOTHING = MechanismState()
