"""Start a network from weights that were trained on public data."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lightning_dp.models.extra import import_extra
from lightning_dp.models.installed_weights import PACKAGES, installed_weights
from lightning_dp.models.released_weights import LayoutError, from_haiku, is_released

FILES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors", ".npz")
PREFIXES = ("network.", "module.", "model.", "net.")


class WeightsError(ValueError):
    """Weights that do not fit a network; the message lists the names."""


def load_public_weights(network: nn.Module, source: str | Path, *, reset_classifier: bool = False) -> list[str]:
    """Load weights into ``network``, all of them or none.

    Every parameter and buffer of the network must be in the source under its own name, up to one of the prefixes
    ``network.``, ``module.``, ``model.`` and ``net.`` on either side, with its own shape. The weights must come from
    public data: what they know of the private examples is not covered by any later guarantee.

    Args:
        network: is changed in place.
        source: a file ending in .ckpt, .pt, .pth, .bin, .safetensors or .npz (a Lightning checkpoint, a bare state dict, or
            weights the paper's authors released, see :mod:`lightning_dp.models.released_weights`), the name of a pre-trained
            model of timm, such as ``dm_nfnet_f3.dm_in1k``, downloaded on first use, or ``efficientnet-lite0``, ``1`` or ``2``,
            which come with the extra ``public-weights``.
        reset_classifier: leave the last linear layer as it was initialised.

    Returns:
        The names of what was left as it was initialised.

    Raises:
        FileNotFoundError: there is no such file.
        MissingExtraError: the package that brings the weights is not installed.
        ChangedWeightsError: it has another file of weights than the one that is meant.
        WeightsError: names or shapes do not fit, the network pads otherwise than the one that released weights come from,
            or the source is neither a file nor a name timm knows.
    """
    read = _read(source)
    given = _unprefixed(_translated(network, source, read) if is_released(read) else read)
    own = network.state_dict()
    short = _unprefixed(own)
    left = (
        {f"{classifier_name(network)}.{kind}" for kind in ("weight", "bias")} & set(own) if reset_classifier else set()
    )
    wanted = {name: key for key, name in zip(short, own, strict=True) if name not in left}
    missing = [name for name, key in wanted.items() if key not in given]
    misshapen = [
        f"{name} {tuple(given[key].shape)} for {tuple(own[name].shape)}"
        for name, key in wanted.items()
        if key in given and given[key].shape != own[name].shape
    ]
    surplus = [key for key in given if key not in short]
    if missing or misshapen or surplus:
        raise WeightsError(
            f"init_from={str(source)!r} does not fit {type(network).__name__}: {_list('missing', missing)}"
            f"{_list('unexpected', surplus)}{_list('of another shape', misshapen)}expected every name once, with its shape. "
            "Build the network as the one the weights come from; if only the classifier differs, set "
            "reset_classifier=True."
        )
    network.load_state_dict({**own, **{name: given[key] for name, key in wanted.items()}})
    return sorted(left)


def classifier_name(network: nn.Module) -> str:
    """The name of the last linear layer of ``network``.

    Raises:
        WeightsError: there is none.

    Example:
        >>> classifier_name(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)))
        '1'
    """
    names: list[str] = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise WeightsError(
            f"network={type(network).__name__} has no linear layer: expected one, the classifier. Name the parameters to "
            "train by a pattern instead."
        )
    return names[-1]


def _read(source: str | Path) -> Mapping[str, Tensor]:
    path = installed_weights(str(source)) if str(source) in PACKAGES else Path(source)
    if path.suffix not in FILES:
        return _from_timm(str(source))
    if not path.is_file():
        raise FileNotFoundError(
            f"init_from={str(source)!r}: expected a file of weights trained on public data. Train or download it first "
            "(docs/models.md says where from); to evaluate a finished run, give --ckpt_path and init_from null."
        )
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # comes with timm

        tensors: dict[str, Tensor] = load_file(path)
        return tensors
    if path.suffix == ".npz":
        return _of_numpy_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise WeightsError(
            f"init_from={str(source)!r} cannot be read as weights: expected a checkpoint of tensors alone. "
            "Save it again with torch.save(network.state_dict(), path)."
        ) from error
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(
            f"init_from={str(source)!r} holds a {type(content).__name__}: expected a state dict, names to tensors. "
            "Save it with torch.save(network.state_dict(), path)."
        )
    return content


def _of_numpy_file(path: Path) -> Mapping[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise WeightsError(
            f"init_from={str(path)!r} cannot be read as arrays: expected a file of numpy.savez with arrays of numbers alone. "
            "Write it again with the script of docs/models.md."
        ) from error


def _translated(network: nn.Module, source: str | Path, arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        return from_haiku(network, arrays)
    except LayoutError as error:
        raise WeightsError(
            f"init_from={str(source)!r} holds weights the paper's authors released, and {error}"
        ) from error


def _from_timm(name: str) -> Mapping[str, Tensor]:
    timm = import_extra(
        "timm",
        "timm",
        f"init_from={name!r} is not a file name ({', '.join(FILES)}), so it is taken as a model of timm",
    )
    if not timm.is_model_pretrained(name):
        raise WeightsError(
            f"init_from={name!r}: expected a file ending in {', '.join(FILES)}, or a model that timm has weights for. "
            "timm.list_models(pretrained=True) lists those."
        )
    try:
        pretrained: nn.Module = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"init_from={name!r} could not be downloaded ({type(error).__name__}): expected a connection or a cached file. "
            "Download the weights elsewhere and give their file name."
        ) from error
    return pretrained.state_dict()


def _unprefixed(names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without the prefixes that all names share, so that a wrapper's name makes no difference."""
    result = dict(names)
    while True:
        prefix = next((p for p in PREFIXES if result and all(name.startswith(p) for name in result)), None)
        if prefix is None:
            return result
        result = {name.removeprefix(prefix): tensor for name, tensor in result.items()}


def _list(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{len(names)} {what} ({', '.join(names[:8])}{more}); " if names else ""
