"""In which of several forms a layer's share of the gradients is computed: by estimate, or the fastest that was measured.

All forms give the same gradients, to rounding: written out one after the other, all in one grouped convolution, as products of
patches, or never written out and known by inner products of positions, or by a kernel of our own (:mod:`.triton`). Which is
fastest depends on the device, the type and the shapes. An estimate is always there. Before the first step a run may time the
forms of the layers that it has met (:mod:`lightning_dp.look.autotune`), and takes the fastest of those that it has timed; a
step itself times nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

Key = tuple[Hashable, ...]
"""What a form is chosen for: the operation, the shapes of one example's input and output gradient, the type, the device."""

FormT = TypeVar("FormT")


@dataclass(frozen=True)
class Offer:
    """A call of a layer that could take several forms.

    Attributes:
        compute: ``(input, output gradient)`` of any number of examples → the contribution, in the form that is then in force.
        like: an input and an output gradient, of whose shapes, but for the first axis, type and device it was asked.
        estimated: the form that is taken where nothing was measured.
        offered: all of them.
    """

    compute: Callable[[Tensor, Tensor], Any]
    like: tuple[Tensor, Tensor]
    estimated: str
    offered: tuple[str, ...]


@dataclass
class Forms:
    """The choice of an engine.

    Attributes:
        taken: what was measured to be fastest; for all other calls the estimate holds.
        seen: the calls that were offered a choice, while :meth:`listening`.
    """

    taken: Mapping[Key, str] = field(default_factory=dict)
    seen: dict[Key, Offer] | None = None

    def choose(
        self,
        operation: Hashable,
        x: Tensor,
        g: Tensor,
        estimated: str,
        offered: Mapping[str, Callable[[Tensor, Tensor], FormT]],
        compute: Callable[[Tensor, Tensor], FormT],
    ) -> FormT:
        """The contribution in the form that is in force.

        Args:
            operation: with all that its result depends on beside ``x`` and ``g``.
            x: inputs, with a leading axis of examples.
            g: output gradients, likewise.
            estimated: name of the form that is taken where nothing was measured.
            offered: name → computes it.
            compute: asks all of this again for another ``x`` and ``g``.
        """
        if not self.taken and self.seen is None:  # nothing was measured
            return offered[estimated](x, g)
        key: Key = (operation, *x.shape[1:], *g.shape[1:], g.dtype, x.device.type)
        if self.seen is not None and key not in self.seen:
            self.seen[key] = Offer(compute, (x[:1].detach(), g[:1].detach()), estimated, tuple(offered))
        taken = self.taken.get(key, estimated)  # by rank 0, which may have had what this one has not
        return offered[taken if taken in offered else estimated](x, g)

    @contextmanager
    def listening(self) -> Iterator[dict[Key, Offer]]:
        """What is offered meanwhile. Nothing of it is kept."""
        self.seen = {}
        try:
            yield self.seen
        finally:
            self.seen = None
