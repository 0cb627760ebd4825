"""A network without its last layer, fixed: what comes before the layer that is trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_dp.models.efficientnet_lite import EfficientNetLite
from lightning_dp.models.pooled_layers import PooledLayers
from lightning_dp.models.public_weights import classifier_name, load_public_weights


class FrozenBody(nn.Module):
    """``network`` up to its last linear layer, in eval mode and without anything to train.

    With :class:`~lightning_dp.data.FixedFeatures` its outputs are computed once for each image, and training
    ``torch.nn.Linear`` on them is training the last layer of ``network`` on the images.

    Args:
        network: of images, ending in a linear layer that is used once. Its other layers must be public: they are not trained,
            and nothing protects what they were trained on.
        init_from: public weights of it, see :func:`lightning_dp.models.public_weights.load_public_weights`; those of the last
            layer may be missing.
        size: edge in pixels to which images are resized first (bicubic), such as that of the images the weights were
            trained on; ``None`` for as they are.
        mirror: give the mean of the features of each image and of its mirror image. It takes twice as long.
        layers: names of modules in ``network`` whose features are taken instead of what the last layer was given, see
            :class:`~lightning_dp.models.PooledLayers`: the last blocks of a network say more about other images than its
            end, which knows its own classes.
        in_bfloat16: compute in that type, on a processor that is faster in it. Features are then those of float32 to a few per
            cent, and another processor's differ by as much.

    Raises:
        ValueError: ``size`` is not above 0, or ``layers`` names none or what is not there.
        WeightsError: ``network`` has no linear layer, or the weights do not fit.

    Example:
        >>> import torch
        >>> body = FrozenBody(nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)))
        >>> body(torch.zeros(2, 3, 2, 2)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        network: nn.Module,
        init_from: str | Path | None = None,
        size: int | None = None,
        mirror: bool = False,
        in_bfloat16: bool = False,
        layers: list[str] | None = None,
    ) -> None:
        super().__init__()
        if size is not None and size < 1:
            raise ValueError(f"size={size}: expected at least 1 pixel, or None for images as they are.")
        name = classifier_name(network)
        if init_from is not None:
            load_public_weights(network, init_from, reset_classifier=True)
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, nn.Identity())
        if isinstance(network, EfficientNetLite):
            network.fold()
        taken = network if layers is None else PooledLayers(network, layers)
        self.network = taken.requires_grad_(False).eval().to(torch.bfloat16 if in_bfloat16 else None)
        self.size, self.mirror, self.in_bfloat16 = size, mirror, in_bfloat16

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map images to what the last layer was given, or to its mean over an image and its mirror image."""
        if self.size is not None:
            images = F.interpolate(images, size=(self.size, self.size), mode="bicubic", antialias=True)
        given = images.to(torch.bfloat16) if self.in_bfloat16 else images
        features: Tensor = self.network(given).to(images.dtype)
        return (features + self.network(given.flip(-1)).to(images.dtype)) / 2 if self.mirror else features

    @override
    def extra_repr(self) -> str:
        """What a printed network says of it."""
        return f"size={self.size}, mirror={self.mirror}, bfloat16={self.in_bfloat16}"

    @override
    def train(self, mode: bool = True) -> FrozenBody:
        """It stays in eval mode, whatever is asked for."""
        return super().train(False)
