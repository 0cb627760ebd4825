"""Norm-free residual networks from timm, with the changes De et al. (2022) made for differential privacy."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.models.extra import import_extra
from lightning_dp.models.norm_free_layers import follow_the_authors

PREFIXES = ("nf_resnet", "nf_seresnet", "nf_ecaresnet", "nf_regnet", "nfnet", "eca_nfnet", "dm_nfnet", "test_nfnet")


class NormFreeNet(nn.Module):
    """A norm-free network of timm (NF-ResNet, NFNet) with its residual branches open from the start.

    What differs from timm's defaults:

    - the scalar gain at the end of every residual branch ("skip gain") starts from ``skip_gain``, **one** instead of
      zero: under DP-SGD a branch that starts closed opens too slowly. It changes nothing about weights that are loaded
      afterwards.
    - ``dropout`` and ``stochastic_depth`` are 0, as for fine-tuning. Where branches are dropped, those that are kept
      are not scaled up, as in the authors' code.
    - for ``nf_resnet*`` and ``dm_nfnet*``, as in the authors' code: weights are divided by the root of
      max(var · fan_in, 1e-4) (timm: var + 1e-5), GELU is its tanh form, the stem's maximum is padded as SAME, and block i of n
      is dropped with probability ``stochastic_depth`` · i / n, i from 0, so the last one with 0.09375 for 0.1 and n = 16.
    - for ``nf_resnet*`` also: activations are scaled where they are computed (γ = 1.7139588594436646 for ReLU) rather than
      in the weights, convolutions pad as SAME, and shortcuts downsample by a 1x1 convolution with stride instead of average
      pooling. timm's own pre-trained ``nf_resnet50`` weights were trained without skip gains and with the pooling;
      ``faithful=False`` gives timm's form of the network, into which they fit. The weights of ``dm_nfnet*`` fit both forms,
      and come from the authors'.

    ``nf_resnet50`` has 25,557,048 parameters: timm's 25,557,032 and 16 skip gains. Stochastic depth draws for each view.

    Args:
        name: model of timm, such as ``nf_resnet50``, ``dm_nfnet_f0``, ``dm_nfnet_f1`` or ``dm_nfnet_f3``.
        num_classes: outputs of the linear layer.
        stochastic_depth: share of examples for which residual branches are dropped, rising linearly from 0 at the first.
        dropout: share of features dropped before the linear layer.
        skip_gain: initial value of the skip gains.
        faithful: for ``nf_resnet*`` and ``dm_nfnet*``, follow the authors' code where timm differs.
        in_channels: channels of the images.
        average_shortcuts: for ``nf_resnet*`` as the authors compute it, average 2x2 pixels before a shortcut's convolution
            instead of letting it step, as Sander et al. 2023 (arXiv 2210.03403) do.

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
        average_shortcuts: bool = False,
    ) -> None:
        super().__init__()
        self.name, self.faithful = name, faithful
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
        if nf_resnet or (faithful and name.startswith("dm_nfnet")):
            follow_the_authors(self.net, stochastic_depth, strided_shortcuts=nf_resnet and not average_shortcuts)
        for block in self.net.modules():
            if isinstance(getattr(block, "skipinit_gain", None), nn.Parameter):
                nn.init.constant_(block.skipinit_gain, skip_gain)
            if hasattr(block, "scale_by_keep"):
                block.scale_by_keep = False

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images ``(batch, in_channels, height, width)`` to logits ``(batch, num_classes)``."""
        logits: Tensor = self.net(images)
        return logits
