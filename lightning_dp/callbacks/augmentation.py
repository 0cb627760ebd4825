"""Augmentation multiplicity: a callback that shows training_step K views of every example."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_dp.batches.mixing import MixViews
from lightning_dp.batches.transforms import Compose, Crop, Flip, ViewTransform
from lightning_dp.batches.views import Views
from lightning_dp.lightning_internals import Callback
from lightning_dp.mechanism.instead import Instead
from lightning_dp.strategy import is_private
from lightning_dp.validate import whole


class AugmentationMultiplicity(Callback):
    """Train on K random views of every example, made on the device from the batch; validation sees the batch itself.

    Together with :class:`~lightning_dp.DifferentialPrivacy` an example's gradient is that of the loss over its K views,
    and is clipped once: more views make it less noisy at the same ε. Without it, training_step is given the views of a
    batch as one batch K times as large, so K = 1 is ordinary augmentation.

    The views are made of what training_step would be given: after ``on_after_batch_transfer``, where the data modules
    of this package normalise. training_step must average its loss over the batch (as ``F.cross_entropy`` does); under
    differential privacy it is called with a batch of the K views of *one* example, and its accuracy counts views.
    Memory grows with K × the micro-batch (``physical_batch_size``), never with K × the logical batch. With
    ``DifferentialPrivacy(seed=...)`` a view depends on seed, step and dataset index alone.

    Args:
        k: K, views per example. 0 leaves the batch alone.
        transform: what makes a view, see :mod:`lightning_dp.batches.transforms`; several are applied in turn. ``None``
            for what the paper does on CIFAR: pad by 4 symmetrically, crop the original size, mirror every second view.
            It must treat each image on its own: one that mixes images, such as MixUp, voids the guarantee.
        images: key or position of the images in the batch; ``None`` for the only tensor of four dimensions.
        mix: what makes further views out of the K of an example, such as :class:`~lightning_dp.batches.mixing.MixSelf`; several
            are put one after the other. Each sees the K views of one example alone.

    Raises:
        ValueError: ``k`` is below 0, or 0 with ``mix``, or there are two of these callbacks.
        ViewError: in training, if it is not clear which tensor of the batch holds the images.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[AugmentationMultiplicity(k=16)], logger=False)

    Source: De et al. 2022 (arXiv 2204.13650), section 3.4; S. Fort et al. 2021 (arXiv 2105.13343) and E. Hoffer et al.
    2019 (arXiv 1901.09335) for several views without privacy.
    """

    def __init__(
        self,
        k: int = 16,
        transform: ViewTransform | Sequence[ViewTransform] | None = None,
        images: str | int | None = None,
        mix: MixViews | Sequence[MixViews] = (),
    ) -> None:
        if whole("k", k) < 0:
            raise ValueError(f"k={k}: expected at least 0 views per example (0 for no augmentation), such as 16.")
        if transform is None:
            transform = [Crop(), Flip()]
        self.k = k
        self.transform = transform if isinstance(transform, ViewTransform) else Compose(transform)
        self.images: str | int | tuple[str | int, ...] | None = images
        self.mix = (mix,) if isinstance(mix, MixViews) else tuple(mix)
        if self.mix and not k:
            raise ValueError(
                f"k=0 with mix={type(self.mix[0]).__name__}: expected at least 1 view to mix, such as k=16."
            )

    @property
    def views(self) -> Views | None:
        """How views are made, or ``None`` if none are."""
        return Views(self.k, self.transform, self.images, self.mix) if self.k else None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        views_of(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        views = self.views
        if views is None or is_private(trainer.strategy):
            return  # the private step makes the views itself, for each micro-batch
        step = pl_module.training_step
        generator = torch.Generator().manual_seed((torch.initial_seed() + trainer.global_rank) % 2**63)

        @functools.wraps(step)
        def with_views(batch: Any, *rest: Any, **named: Any) -> Any:
            examples = next(len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim)
            uniforms = torch.rand(examples, views.k, views.transform.draws, generator=generator)
            for_mixing = torch.rand(examples, views.draws, generator=generator) if views.mix else None
            return step(views.fold(views.expand(batch, examples, uniforms, for_mixing)), *rest, **named)

        pl_module.__dict__["training_step"] = Instead(pl_module, "training_step", with_views)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.__dict__.pop("training_step", None)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        pl_module.__dict__.pop("training_step", None)


def views_of(trainer: pl.Trainer) -> Views | None:
    """The views the Trainer's callbacks ask for, or ``None``.

    Raises:
        ValueError: two callbacks ask for views.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set where type checkers do not see it
    found = [callback for callback in callbacks if isinstance(callback, AugmentationMultiplicity)]
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} AugmentationMultiplicity callbacks: expected at most one. Give one of them all transforms."
        )
    return found[0].views if found else None
