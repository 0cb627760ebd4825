"""A ``collate_fn`` that can be told to collate every example by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_dp.batches.microbatch import Apart, Element


class Collate:
    """The user's ``collate_fn``; with ``each``, applied to every example alone.

    Then nothing has to be known about the batch to keep examples apart: what training_step gets for an example was made
    from that example and no other.

    Args:
        collate_fn: from records to a batch.

    Attributes:
        each: whether every example is collated by itself.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn, self.each = collate_fn, False

    def __call__(self, records: list[Any]) -> Any:
        """A batch of these records; with ``each`` an :class:`~lightning_dp.batches.microbatch.Apart` of batches of one."""
        if not self.each:
            return self.collate_fn(records)
        return Apart([Element(self.collate_fn([record])) for record in records])
