"""What layers within a network give, made into one vector for each image."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override


class PooledLayers(nn.Module):
    """The outputs of some layers of a network, one vector for each image.

    The output of each layer is averaged over its positions, and the vector that is left is centred and scaled to variance 1
    over its channels, as a layer normalisation without parameters does, so that no layer outweighs another. Those of all
    layers are put one behind the other. An image's vector depends on that image alone and has the same length for every
    image, if the network takes each image by itself.

    Args:
        network: of images; evaluated as it is.
        layers: names of its modules, as in ``network.named_modules()``. Each must be used once, and give a tensor of shape
            ``(n, channels, height, width)``, ``(n, tokens, channels)`` or ``(n, channels)``.

    Raises:
        ValueError: ``layers`` is empty, or names a module that ``network`` does not have; in :meth:`forward`, a layer was not
            used once, or gives something else.

    Example:
        >>> body = PooledLayers(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3)), layers=["1", "2"])
        >>> body(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, network: nn.Module, layers: list[str]) -> None:
        super().__init__()
        names = [name for name, _ in network.named_modules() if name]
        if not layers or not set(layers) <= set(names):
            missing = [name for name in layers if name not in names]
            raise ValueError(f"layers={layers}: {missing or 'none'} are no modules of the network, which has {names}.")
        self.network, self.layers = network, list(layers)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map ``(n, channels, height, width)`` to ``(n, d)``, d being the sum of the layers' channels."""
        found: dict[str, Tensor] = {}
        handles = [
            self.network.get_submodule(name).register_forward_hook(partial(_keep, found, name)) for name in self.layers
        ]
        try:
            self.network(images)
        finally:
            for handle in handles:
                handle.remove()
        unused = [name for name in self.layers if name not in found]
        if unused:
            raise ValueError(f"layers={self.layers}: the network does not use {unused}.")
        return torch.cat([found[name] for name in self.layers], dim=1)

    @override
    def extra_repr(self) -> str:
        """What a printed network says of it."""
        return f"layers={self.layers}"


def _keep(found: dict[str, Tensor], name: str, layer: nn.Module, inputs: Any, output: Any) -> None:
    """A forward hook: the vector of each image. What is written over the output afterwards does not reach it."""
    if name in found:
        raise ValueError(f"layer {name!r} is used more than once: expected once.")
    over = {4: (2, 3), 3: (1,), 2: ()}.get(output.dim()) if isinstance(output, Tensor) else None
    if over is None:
        what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"layer {name!r} gives {what}: expected a tensor (n, channels, height, width), (n, tokens, channels) or "
            "(n, channels)."
        )
    pooled = output.mean(dim=over) if over else output.clone()
    found[name] = F.layer_norm(pooled, pooled.shape[1:])
