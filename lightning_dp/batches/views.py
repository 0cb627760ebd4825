"""micro-batch → K augmented views of each of its examples, and back to an ordinary batch for the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.microbatch import BatchAxisError, check_batch_axis, is_list_of_values
from lightning_dp.batches.mixing import MixViews
from lightning_dp.batches.transforms import ViewTransform
from lightning_dp.mechanism.counters import splitmix64
from lightning_dp.mechanism.memory import queued_to

IMAGE_DIMENSIONS = 4


class ViewError(BatchAxisError):
    """A batch of which no augmented views can be made."""


@dataclass(frozen=True)
class Views:
    """How the views of a batch are made.

    Guarantee:
        The views of an example are a function of that example and of numbers that depend on no data, so the gradient of
        the loss averaged over them is a per-example gradient like any other: clipping it *after* the average bounds the
        example's contribution by C at any K, and ε does not depend on K. (This holds if ``transform`` treats each row
        on its own; one that mixes rows, such as MixUp, makes an example part of several, and nothing bounds that. What is
        in ``mix`` does by construction.)

    Attributes:
        k: how many views ``transform`` makes of an example, at least 1.
        transform: what makes a view.
        images: key or position of the images in the batch, or a tuple of them for one inside of another; ``None`` for the
            only tensor of four dimensions.
        mix: what makes further views of these.
    """

    k: int
    transform: ViewTransform
    images: str | int | tuple[str | int, ...] | None = None
    mix: tuple[MixViews, ...] = ()

    @property
    def total(self) -> int:
        """K, the views of an example that training_step is given."""
        return self.k + sum(mix.views for mix in self.mix)

    def drawn(self, batch: Any, indices: npt.NDArray[np.int64], seed: int) -> Any:
        """:meth:`expand` with the numbers of :func:`view_uniforms`: a view depends on seed and dataset index alone."""
        uniforms = view_uniforms(seed, indices, self.k, self.transform.draws)
        return self.expand(batch, len(indices), uniforms, view_uniforms(~seed % 2**64, indices, 1, self.draws)[:, 0])

    @property
    def draws(self) -> int:
        """How many uniform numbers the mixing of one example's views needs."""
        return sum(mix.draws for mix in self.mix)

    def expand(self, batch: Any, examples: int, uniforms: Tensor, for_mixing: Tensor | None = None) -> Any:
        """Give every tensor a second axis of K views: ``(B, ...)`` becomes ``(B, K, ...)``.

        Args:
            batch: any nest whose tensors have ``examples`` rows, see
                :func:`~lightning_dp.batches.microbatch.check_batch_axis`.
            examples: B.
            uniforms: ``(B, self.k, transform.draws)`` numbers in [0, 1).
            for_mixing: ``(B, self.draws)`` of them, on the CPU; not needed without ``mix``.

        Returns:
            The batch with the images replaced by their views and all other tensors seen K times (without a copy).

        Raises:
            BatchAxisError: it is not clear which part belongs to which example.
            ViewError: it is not clear which tensor holds the images.
        """
        check_batch_axis(batch, examples)
        leaves, structure = pytree.tree_flatten_with_path(batch, is_leaf=is_list_of_values)
        chosen = self._position(leaves)
        expanded = [
            self._views(leaf, queued_to(uniforms, leaf.device), for_mixing)
            if position == chosen
            else leaf.unsqueeze(1).expand(-1, self.total, *leaf.shape[1:])
            if isinstance(leaf, Tensor)
            else leaf
            for position, (_, leaf) in enumerate(leaves)
        ]
        return pytree.tree_unflatten(expanded, structure)

    def fold(self, batch: Any) -> Any:
        """Merge examples and views: ``(B, K, ...)`` becomes ``(B·K, ...)``, a batch as any training_step takes it.

        Lists of one value per example become lists of one value per view.
        """

        def flat(leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return leaf.flatten(0, 1)
            return type(leaf)(value for value in leaf for _ in range(self.total)) if is_list_of_values(leaf) else leaf

        return pytree.tree_map(flat, batch, is_leaf=is_list_of_values)

    def _views(self, images: Tensor, uniforms: Tensor, for_mixing: Tensor | None) -> Tensor:
        views = self.transform(images.repeat_interleave(self.k, 0), uniforms.flatten(0, 1))
        if len(views) != len(images) * self.k:
            raise ViewError(
                f"transform={type(self.transform).__name__} made {len(views)} images of {len(images) * self.k}: expected "
                "one of each. A transform that mixes or drops rows has no sensitivity that clipping could bound."
            )
        views = views.reshape(len(images), self.k, *views.shape[1:])
        if not self.mix or for_mixing is None:
            return views
        shares = torch.split(for_mixing, [mix.draws for mix in self.mix], dim=1)
        return torch.cat([views, *(mix(views, share) for mix, share in zip(self.mix, shares, strict=True))], 1)

    def _position(self, leaves: list[tuple[Any, Any]]) -> int:
        def is_image(path: Any, leaf: Any) -> bool:
            if not isinstance(leaf, Tensor):
                return False
            if self.images is None:
                return leaf.ndim == IMAGE_DIMENSIONS
            inside = self.images if isinstance(self.images, tuple) else (self.images,)
            names = [(getattr(one, "key", None), getattr(one, "idx", None)) for one in path[: len(inside)]]
            return len(names) == len(inside) and all(one in name for one, name in zip(inside, names, strict=True))

        found = [position for position, (path, leaf) in enumerate(leaves) if is_image(path, leaf)]
        if len(found) != 1:
            tensors = ", ".join(
                f"batch{pytree.keystr(path)} {tuple(leaf.shape)}" for path, leaf in leaves if isinstance(leaf, Tensor)
            )
            raise ViewError(
                f"images={self.images!r} fits {len(found)} of the batch's tensors ({tensors}): expected exactly one. Name "
                "the key or position of the images, as in AugmentationMultiplicity(images=0)."
            )
        return found[0]


def view_uniforms(seed: int, indices: npt.NDArray[np.int64], k: int, draws: int) -> Tensor:
    """Numbers in [0, 1) for the views of a step, each a function of (seed, dataset index, view, draw) alone.

    So a view is the same whatever the micro-batch, the engine and the number of ranks. They are the outputs
    of :func:`~lightning_dp.mechanism.counters.splitmix64` at these counters, to 24 bits: independent for every purpose of
    augmentation, and in no way secret.

    Args:
        seed: 64 bits, another for each step.
        indices: dataset indices of the examples, ``(B,)``.
        k: views per example.
        draws: numbers per view.

    Returns:
        ``(B, k, draws)`` float32 on the CPU.

    Example:
        >>> both = view_uniforms(7, np.array([3, 8]), 2, 3)
        >>> bool((both[1:] == view_uniforms(7, np.array([8]), 2, 3)).all())
        True
    """
    per_example = k * draws
    counters = indices.astype(np.uint64)[:, None] * np.uint64(per_example) + np.arange(
        1, per_example + 1, dtype=np.uint64
    )
    numbers = (splitmix64(seed, counters.astype(np.uint64)) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
    return torch.from_numpy(numbers.reshape(len(indices), k, draws))
