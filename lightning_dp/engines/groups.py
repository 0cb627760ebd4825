"""A micro-batch in groups of examples that answer alike, where the training step decides on their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.microbatch import take
from lightning_dp.engines.decisions import PartingError
from lightning_dp.engines.protocol import ClippedSum
from lightning_dp.engines.user_code import warn_user

AtOnce = Callable[[Any, int, int | None], ClippedSum]
"""``(batch, examples, how many of them count)`` → the sum of their clipped gradients."""

OneByOne = Callable[[Any, int], ClippedSum]
"""``(batch, examples)`` → the sum of their clipped gradients."""


class Groups:
    """Runs a micro-batch at once where its examples answer alike, and in groups where they do not.

    The sum over groups is the sum over examples, so this changes the time and nothing else. Once more than half of the
    examples would be on their own, they are run one by one instead, and that is said once.
    """

    def __init__(self) -> None:
        self.partings: list[PartingError] = []
        self._told = False

    def clipped_sum(
        self, at_once: AtOnce, one_by_one: OneByOne, batch: Any, examples: int, counted: int | None = None
    ) -> ClippedSum:
        """The clipped sum of ``batch``.

        Args:
            at_once: takes examples that answer alike, and raises :class:`PartingError` if they do not.
            one_by_one: takes any.
            batch: a micro-batch.
            examples: how many it holds.
            counted: how many of them count; the others, at the end, are padding, which goes no way of its own.
        """
        self.partings = []
        try:
            return at_once(batch, examples, counted)
        except PartingError as parting:
            self.partings.append(parting)
            pending = _within(parting.groups, counted)
        done: list[tuple[list[int], ClippedSum]] = []
        while pending:
            if len(done) + len(pending) > max(2, examples // 2):
                rest = [position for group in pending for position in group]
                done.append((rest, one_by_one(take(batch, rest), len(rest))))
                self._tell_once(self.partings[-1])
                break
            positions = pending.pop()
            try:
                done.append((positions, at_once(take(batch, positions), len(positions), None)))
            except PartingError as parting:
                self.partings.append(parting)
                pending += [[positions[index] for index in group] for group in parting.groups]
        return _together(done)

    def _tell_once(self, parting: PartingError) -> None:
        if not self._told:
            self._told = True
            warn_user(
                f"training_step {parting.what} ({parting.line}), and the examples of a micro-batch do so in many ways: "
                "expected few, so that those alike can run at once. They run one by one, which is slow and gives the same "
                "result. Do it with tensors, or in the dataset. (That the examples differ is private.)"
            )


def _within(groups: list[list[int]], counted: int | None) -> list[list[int]]:
    """The groups without padding."""
    kept = [[index for index in group if counted is None or index < counted] for group in groups]
    return [group for group in kept if group]


def check_one_structure(structures: list[Any]) -> None:
    """Raise unless the outputs of all examples have one structure.

    Raises:
        ValueError: they have several.
    """
    different = {str(structure) for structure in structures}
    if len(different) > 1:
        raise ValueError(
            f"outputs of {len(different)} different structures: expected training_step to log and return the same "
            "things for every example. Log unconditionally, or log in a hook such as on_train_batch_end."
        )


def joined(sums: list[ClippedSum]) -> ClippedSum:
    """The sums of examples that were run one by one, in their order, as one."""
    return _together([([position], one) for position, one in enumerate(sums)])


def _together(done: list[tuple[list[int], ClippedSum]]) -> ClippedSum:
    order = torch.tensor([position for positions, _ in done for position in positions]).argsort()
    sums = [one for _, one in done]
    flattened = [pytree.tree_flatten(one.outputs) for one in sums]
    check_one_structure([structure for _, structure in flattened])

    def in_order(rows: list[Any]) -> Any:
        return torch.cat(rows)[order.to(rows[0].device)] if isinstance(rows[0], Tensor) else rows[0]

    outputs = [in_order(list(column)) for column in zip(*(leaves for leaves, _ in flattened), strict=True)]
    return ClippedSum(
        {name: torch.stack([one.gradient[name] for one in sums]).sum(0) for name in sums[0].gradient},
        in_order([one.norms for one in sums]),
        in_order([one.losses for one in sums]),
        pytree.tree_unflatten(outputs, flattened[0][1]),
    )
