"""Norm-free residual networks from timm, with the changes De et al. (2022) made for differential privacy."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.models.extra import import_extra

PREFIXES = ("nf_resnet", "nf_seresnet", "nf_ecaresnet", "nf_regnet", "nfnet", "eca_nfnet", "dm_nfnet", "test_nfnet")


class NormFreeNet(nn.Module):
    """A norm-free network of timm (NF-ResNet, NFNet) with its residual branches open from the start.

    What differs from timm's defaults:

    - the scalar gain at the end of every residual branch ("skip gain") starts from ``skip_gain``, **one** instead of
      zero: under DP-SGD a branch that starts closed opens too slowly. It changes nothing about weights that are loaded
      afterwards.
    - ``dropout`` and ``stochastic_depth`` are 0, as for fine-tuning. Where branches are dropped, those that are kept
      are not scaled up, as in the authors' code.
    - for ``nf_resnet*``, as in the authors' code: activations are scaled where they are computed (γ = 1.7139588594436646
      for ReLU) rather than in the weights, padding is SAME, and shortcuts downsample by a 1x1 convolution with stride
      instead of average pooling. timm's own pre-trained ``nf_resnet50`` weights were trained without skip gains and
      with the pooling; ``faithful=False`` gives timm's form of the network, into which they fit.

    ``nf_resnet50`` has 25,557,048 parameters: timm's 25,557,032 and 16 skip gains. Stochastic depth draws for each view.

    Args:
        name: model of timm, such as ``nf_resnet50``, ``dm_nfnet_f0``, ``dm_nfnet_f1`` or ``dm_nfnet_f3``.
        num_classes: outputs of the linear layer.
        stochastic_depth: share of examples for which the last residual branch is dropped (rising linearly from 0).
        dropout: share of features dropped before the linear layer.
        skip_gain: initial value of the skip gains.
        faithful: for ``nf_resnet*``, follow the authors' code where timm differs.
        in_channels: channels of the images.

    Raises:
        MissingExtraError: timm is not installed.
        ValueError: ``name`` is not a norm-free model of timm.

    Example:
        >>> sum(p.numel() for p in NormFreeNet("nf_resnet50", num_classes=1000).parameters())
        25557048

    Source: A. Brock, S. De and S. L. Smith 2021 (arXiv 2101.08692) for NF-ResNets; A. Brock, S. De, S. L. Smith and
    K. Simonyan 2021 (arXiv 2102.06171) for NFNets; De et al. 2022 (arXiv 2204.13650) for the changes.
    """

    def __init__(
        self,
        name: str,
        num_classes: int = 1000,
        stochastic_depth: float = 0.0,
        dropout: float = 0.0,
        skip_gain: float = 1.0,
        faithful: bool = True,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        timm = import_extra("timm", "timm", f"NormFreeNet(name={name!r}) comes from timm")
        if not (name.startswith(PREFIXES) and timm.is_model(name)):
            raise ValueError(
                f"name={name!r}: expected a norm-free model of timm, such as nf_resnet50 or dm_nfnet_f3. "
                "timm.list_models('*nf*net*') lists them; other models have batch norm, which differential privacy forbids."
            )
        for argument, value in (("stochastic_depth", stochastic_depth), ("dropout", dropout)):
            if not 0 <= value < 1:
                raise ValueError(f"{argument}={value}: expected a share in [0, 1), such as 0.1.")
        nf_resnet = faithful and name.startswith("nf_resnet")
        options = {"skipinit": True, "gamma_in_act": True, "same_padding": True} if nf_resnet else {}
        self.net: nn.Module = timm.create_model(
            name,
            pretrained=False,
            num_classes=num_classes,
            in_chans=in_channels,
            drop_rate=dropout,
            drop_path_rate=stochastic_depth,
            **options,
        )
        if nf_resnet:
            _scale_without_writing_in_place(self.net)
        for block in self.net.modules():
            if isinstance(getattr(block, "skipinit_gain", None), nn.Parameter):
                nn.init.constant_(block.skipinit_gain, skip_gain)
            if hasattr(block, "scale_by_keep"):
                block.scale_by_keep = False
            if nf_resnet and hasattr(block, "downsample") and block.downsample is not None:
                _convolve_with_stride(block.downsample)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images ``(batch, in_channels, height, width)`` to logits ``(batch, num_classes)``."""
        logits: Tensor = self.net(images)
        return logits


class ScaledReLU(nn.Module):
    """ReLU times a constant, so that the output for standard normal input has unit variance.

    Source: A. Brock, S. De and S. L. Smith 2021 (arXiv 2101.08692), whose γ is sqrt(2 / (1 − 1/π)) = 1.7129; the
    constant is the one in the authors' code, which was estimated from samples.
    """

    gamma = 1.7139588594436646

    @override
    def forward(self, features: Tensor) -> Tensor:
        return self.gamma * torch.relu(features)


def _scale_without_writing_in_place(network: nn.Module) -> None:
    """Put :class:`ScaledReLU` in the place of timm's scaled activation, which overwrites what ReLU's gradient needs."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if getattr(child, "gamma", None) is not None and hasattr(child, "act_fn"):
                setattr(module, name, ScaledReLU())


def _convolve_with_stride(shortcut: object) -> None:
    """Let a shortcut's 1x1 convolution step over the image instead of pooling before it."""
    pool = getattr(shortcut, "pool", None)
    if isinstance(pool, nn.AvgPool2d):
        convolution = getattr(shortcut, "conv")  # noqa: B009  # an nn.Module's attribute that type checkers cannot see
        convolution.stride = (pool.stride, pool.stride) if isinstance(pool.stride, int) else tuple(pool.stride)
        shortcut.pool = nn.Identity()  # type: ignore[attr-defined]  # as above
