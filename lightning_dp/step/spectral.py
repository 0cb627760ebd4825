"""Spectral norm: its power iteration goes on once for each step, from the weights alone, and rests inside a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm


class SpectralNorms:
    """The spectral norms (``torch.nn.utils.parametrizations.spectral_norm``) of a module while it trains privately.

    In train mode each forward pass improves two buffers by one power iteration on the weight. Under differential privacy
    training_step runs once for each example, and its buffers must not change. So the iteration is done here, once before
    each step, as one forward pass on the whole batch would; examples see buffers that rest. It reads weights, which were
    released with noise, and nothing else.

    Args:
        module: the user's, complete.

    Attributes:
        found: the layers, the names of their weights, and the spectral norms.

    Source: Miyato, Kataoka, Koyama and Yoshida 2018 (arXiv 1802.05957), algorithm 1.
    """

    def __init__(self, module: nn.Module) -> None:
        self.found: list[tuple[nn.Module, str, nn.Module]] = []
        for layer in module.modules():
            if not parametrize.is_parametrized(layer):
                continue
            assert isinstance(layer.parametrizations, nn.ModuleDict)
            for name, chain in layer.parametrizations.items():
                assert isinstance(chain, nn.ModuleList)
                self.found += [(layer, name, one) for one in chain if isinstance(one, _SpectralNorm)]

    def advance(self) -> None:
        """One power iteration of each, on the weights as they are."""
        with torch.no_grad():
            for layer, name, one in self.found:
                if one.training:
                    getattr(layer, name)

    @contextmanager
    def resting(self) -> Iterator[None]:
        """While open, no forward pass moves them."""
        modes = [(one, one.training) for _, _, one in self.found]
        try:
            for one, _ in modes:
                one.training = False
            yield
        finally:
            for one, training in modes:
                one.training = training
