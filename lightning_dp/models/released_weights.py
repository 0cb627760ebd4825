"""Weights that the paper's authors released, in Haiku's names and layout, for the networks here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import product

from torch import Tensor, nn

from lightning_dp.models.norm_free import NormFreeNet
from lightning_dp.models.wide_resnet import WideResNet

PARAMETERS = {"w": "weight", "b": "bias", "bias": "bias", "gain": "gain", "scale": "weight", "offset": "bias"}
"""Haiku's names of a layer's arrays → torch's."""

GROUP = re.compile(r"wide_?res_?net(_\d+)?|nf_?net(_\d+)?", re.IGNORECASE)


class LayoutError(ValueError):
    """A network that pads or computes otherwise than the one the weights were trained in, although they would fit."""


def is_released(names: Mapping[str, object]) -> bool:
    """Whether these are Haiku's names: parts separated by slashes."""
    return bool(names) and all("/" in name for name in names)


def from_haiku(network: nn.Module, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same arrays under the network's own names, turned as torch keeps them; a name that is not known stays as it is.

    A convolution's ``w`` is (height, width, in, out) in Haiku and (out, in, height, width) here, a linear layer's (in, out)
    and (out, in). In names such as ``wide_res_net/~norm_fn/Block_1_norm_0_0/scale`` the name of the network makes no
    difference, nor do parts that begin with ``~``, which say in which method a module was made.

    Args:
        network: a :class:`WideResNet` with ``same_padding=True``, or a :class:`NormFreeNet` of ``dm_nfnet_f*`` as the authors
            compute it (``faithful=True``).
        arrays: as the released files hold them, keys joined by slashes.

    Raises:
        LayoutError: the network is another one than the weights were trained in.

    Source: the code of De et al. 2022 (arXiv 2204.13650), in which module names are given.
    """
    names = haiku_names(network)
    own = network.state_dict()
    found = {}
    for name, array in arrays.items():
        parts = [part for part in name.split("/") if not part.startswith("~")]
        parts = parts[1:] if len(parts) > 1 and GROUP.fullmatch(parts[0]) else parts
        ours = names.get("/".join(parts))
        if ours is None:
            found[name] = array
            continue
        turned = {4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim)
        tensor = array if turned is None else array.permute(turned)
        alike = [size for size in tensor.shape if size > 1] == [size for size in own[ours].shape if size > 1]
        found[ours] = (tensor.reshape(own[ours].shape) if alike else tensor).contiguous()
    return found


def haiku_names(network: nn.Module) -> dict[str, str]:
    """The authors' name of each parameter, without what does not matter, and the name here.

    Raises:
        LayoutError: the network has no released weights, or is not computed as the one they were trained in.

    Example:
        >>> haiku_names(WideResNet(10, 1, same_padding=True))["Block_2Conv_0_0/w"]
        'stages.1.0.residual.1.1.weight'
    """
    if isinstance(network, WideResNet):
        if not network.same_padding:
            raise LayoutError(
                "same_padding=False: expected same_padding=True, with which these weights were trained. With padding=1 all "
                "names and shapes fit, and the logits are others."
            )
        return dict(_arrays(network, _of_wide_resnet(network)))
    if isinstance(network, NormFreeNet) and network.name.startswith("dm_nfnet"):
        if not network.faithful:
            raise LayoutError("faithful=False: expected faithful=True, with which these weights were trained.")
        modules, gains = _of_nfnet(network)
        return {**dict(_arrays(network, modules)), **gains}
    raise LayoutError(
        f"network={type(network).__name__}: expected a WideResNet or a NormFreeNet of dm_nfnet_f0, f1 or f3, which the authors "
        "released weights of."
    )


def _arrays(network: nn.Module, modules: Mapping[str, str]) -> list[tuple[str, str]]:
    """Their names and ours of all the parameters of ``modules``, theirs → ours."""
    pairs = []
    for theirs, ours in modules.items():
        module = network.get_submodule(ours)
        known = {name for name, _ in module.named_parameters(recurse=False)}
        if isinstance(module, nn.GroupNorm):
            kinds = ["scale", "offset"]
        else:
            kinds = ["w", "gain", "bias"] if "gain" in known else ["w", "b"]
        pairs += [(f"{theirs}/{kind}", f"{ours}.{PARAMETERS[kind]}") for kind in kinds]
    return pairs


def _of_wide_resnet(network: WideResNet) -> dict[str, str]:
    modules = {"First_conv": "first_conv", "Final_norm": "final.1", "Softmax": "classifier"}
    blocks = len(network.get_submodule("stages.0"))  # type: ignore[arg-type]  # an nn.Sequential
    for g in (1, 2, 3):
        modules[f"Block_{g}_skip_norm"] = f"stages.{g - 1}.0.shortcut.0.1"
        modules[f"Block_{g}_skip_conv"] = f"stages.{g - 1}.0.shortcut.1"
        for i, j in product(range(blocks), (0, 1)):
            residual = f"stages.{g - 1}.{i}.residual"
            padded = ".1" if g > 1 and i == j == 0 else ""
            modules[f"Block_{g}_norm_{i}_{j}"] = f"{residual}.{2 * j}.1"
            modules[f"Block_{g}Conv_{i}_{j}"] = f"{residual}.{2 * j + 1}{padded}"
    return modules


def _of_nfnet(network: NormFreeNet) -> tuple[dict[str, str], dict[str, str]]:
    """Layers, and the skip gains, which belong to a block and to no layer."""
    modules = {f"stem_conv{i}": f"net.stem.conv{i + 1}" for i in range(4)}
    modules |= {"final_conv": "net.final_conv", "linear": "net.head.fc"}
    gains = {}
    layers = {
        "conv0": "conv1", "conv1": "conv2", "conv1b": "conv2b", "conv2": "conv3", "conv_shortcut": "downsample.conv",
        "squeeze_excite/linear": "attn_last.fc1", "squeeze_excite/linear_1": "attn_last.fc2",
    }  # fmt: skip
    here = [name.removesuffix(".conv2b") for name, _ in network.named_modules() if name.endswith(".conv2b")]
    for place, block in enumerate(here):
        theirs = f"nf_block_{place}" if place else "nf_block"
        inside = {name for name, _ in network.get_submodule(block).named_modules()}
        modules |= {f"{theirs}/{a}": f"{block}.{b}" for a, b in layers.items() if b in inside}
        gains[f"{theirs}/skip_gain"] = f"{block}.skipinit_gain"
    return modules, gains
