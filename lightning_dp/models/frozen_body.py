"""A network without its last layer, fixed: what comes before the layer that is trained."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from typing_extensions import override

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

    Raises:
        WeightsError: ``network`` has no linear layer, or the weights do not fit.

    Example:
        >>> import torch
        >>> body = FrozenBody(nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)))
        >>> body(torch.zeros(2, 3, 2, 2)).shape
        torch.Size([2, 5])
    """

    def __init__(self, network: nn.Module, init_from: str | Path | None = None) -> None:
        super().__init__()
        name = classifier_name(network)
        if init_from is not None:
            load_public_weights(network, init_from, reset_classifier=True)
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, nn.Identity())
        self.network = network.requires_grad_(False).eval()

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map images to what the last layer was given."""
        features: Tensor = self.network(images)
        return features

    @override
    def train(self, mode: bool = True) -> FrozenBody:
        """It stays in eval mode, whatever is asked for."""
        return super().train(False)
