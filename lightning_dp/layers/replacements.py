"""Layers that mix the examples of a batch, replaced by layers that do not."""

from __future__ import annotations

import itertools
import math
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.engines.agreement import inert
from lightning_dp.errors import PreflightError
from lightning_dp.layers.batch_norm import mixes_examples
from lightning_dp.layers.standardised_weights import is_standardised, standardise_weight_of

Norm = Literal["group", "layer"]
MOST_GROUPS, FEWEST_CHANNELS = 32, 4
"""Wu and He use 32 groups; a group of less than four channels has little to take a variance of on a 1 × 1 map."""

M = TypeVar("M", bound=nn.Module)


def make_trainable_privately(
    module: M, norm: Norm = "group", groups: int | None = None, *, weight_standardisation: bool = False
) -> M:
    """Replace every layer whose output for one example depends on the others, in place, and give the module back.

    BatchNorm becomes GroupNorm (``"layer"``: with one group), made by Opacus's fixer. Scale and shift are kept, and where
    the layer has seen data its running statistics are folded into them: for an example whose own statistics are those of
    the data, the new layer gives what the old one gave in eval mode. Pre-trained weights therefore remain a good start,
    though not as good as with BatchNorm. Dropout and activation that a layer has
    inside, as timm's have, stay inside the new one. InstanceNorm stops tracking statistics. Frozen layers in eval mode do no
    harm and stay.

    Call it before the optimizer is made (in ``__init__`` of the LightningModule, or on it before ``fit``). Names of
    parameters stay, buffers of running statistics go, so load checkpoints of the old module before. What the module has
    learnt so far must be public: the folded statistics are not protected.

    With ``weight_standardisation`` convolutions use Ŵ = (w − mean(w)) · gain / ‖w − mean(w)‖, for each output channel, as
    the networks of De et al. (2022) do together with GroupNorm. The gain is a parameter of its own (it counts in the clip
    norm) and starts from ‖w − mean(w)‖: of pre-trained weights everything is kept but each channel's mean. They give
    other outputs without it, so this is for training from scratch; after pre-training, expect to train longer. It is a
    ``torch.nn.utils.parametrize``: the weight's parameter is called ``parametrizations.weight.original`` from then on, the
    gain ``parametrizations.weight.0.gain``; ``parametrize.remove_parametrizations(layer, "weight")`` makes a plain
    convolution of it again after training; and torch pickles no such module, it saves its ``state_dict``, so ``ddp_spawn``
    is out. To leave a convolution as it is (the last one of a segmentation network), give the function the other parts
    of the module. A layer that already standardises its weight gives what it gave.

    Args:
        module: any module, a LightningModule or a part of one.
        norm: ``"group"`` or ``"layer"``.
        groups: how many groups, dividing the channels of every layer; ``None`` for up to 32 with at least 4 channels each.
            BatchNorm1d always gets one group: on features without an axis of time, a group of one has no variance.
        weight_standardisation: whether the weights of the module's trainable convolutions are standardised on every use.
            Transposed ones stay as they are, and so do those with one weight per channel, of which nothing would be left.

    Returns:
        ``module``, or what replaces it if it is itself such a layer.

    Raises:
        ValueError: ``norm`` or ``groups`` is not possible.
        PreflightError: a layer is of a class of its own, whose further duties nobody knows, or is not initialised yet; or
            a convolution's weight, which is to be standardised, is already computed from other parameters.

    Example:
        >>> make_trainable_privately(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)))[1]
        GroupNorm(4, 16, eps=1e-05, affine=True)

    Source: Yuxin Wu and Kaiming He 2018, *Group Normalization* (arXiv 1803.08494); Opacus's ModuleValidator; S. Qiao et
    al. 2019 (arXiv 1903.10520), A. Brock, S. De and S. L. Smith 2021 (arXiv 2101.08692), equation 5, and S. De et al. 2022
    (arXiv 2204.13650) for weight standardisation.
    """
    if norm not in get_args(Norm):
        raise ValueError(f"norm={norm!r}: expected one of {', '.join(get_args(Norm))}.")
    if groups is not None and groups < 1:
        raise ValueError(f"groups={groups}: expected at least 1, or None for a number that suits each layer.")
    replacements: dict[nn.Module, nn.Module] = {}
    convolutions = _to_standardise(module) if weight_standardisation else []
    for name, layer in module.named_modules():
        if mixes_examples(layer):
            replacements[layer] = _replacement(name, layer, 1 if norm == "layer" else groups)
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):  # not named_children: a shared layer has several names
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])
    for convolution in convolutions:
        standardise_weight_of(convolution)
    root: Any = replacements.get(module, module)
    return root  # type: ignore[no-any-return]  # a module of another class only where the root was itself replaced


def _to_standardise(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for name, layer in module.named_modules():
        if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            continue
        if is_standardised(layer):
            continue
        weight = layer._parameters.get("weight")
        if weight is None or isinstance(weight, nn.UninitializedParameter):
            raise PreflightError(
                f"weight_standardisation=True, yet {name or 'the module'} has no plain weight: expected one that is there and "
                "not computed from other parameters (spectral or weight norm, a lazy layer). Take that off first, run a "
                "lazy layer on a batch, or give make_trainable_privately the other parts of the module."
            )
        if weight.requires_grad and weight[0].numel() > 1:
            found.append(layer)
    return found


def _replacement(name: str, layer: nn.Module, groups: int | None) -> nn.Module:
    from opacus.validators import ModuleValidator  # takes a second, and only those who ask for it need it

    stock = next((one for one in _STOCK if isinstance(layer, one)), type(layer))
    lazy = isinstance(layer, nn.modules.lazy.LazyModuleMixin)
    if (
        stock not in ModuleValidator.FIXERS
        or lazy
        or (type(layer) is not stock and not _is_followed_by_its_parts(layer))
    ):
        raise PreflightError(
            f"{name or 'the module'} is a {type(layer).__module__}.{type(layer).__name__}: expected one of torch's own "
            "BatchNorm or InstanceNorm layers, initialised, or a BatchNorm and then its own parts (dropout, activation) in "
            "turn. What else such a layer does would be lost with it. Build the "
            "model with GroupNorm (many take norm_layer=...), run a lazy one on a batch first, or freeze it: .eval() and "
            ".requires_grad_(False)."
        )
    if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
        fixed: nn.Module = ModuleValidator.FIXERS[stock](layer)
        return fixed
    channels = layer.num_features
    if stock is nn.BatchNorm1d:
        groups = 1
    if groups is None:
        groups = math.gcd(MOST_GROUPS, channels)
        while groups > 1 and channels // groups < FEWEST_CHANNELS:
            groups //= 2
    if channels % groups:
        raise ValueError(
            f"groups={groups} for the {channels} channels of {name}: expected a divisor. Give groups=None."
        )
    new: nn.GroupNorm = ModuleValidator.FIXERS[stock](layer, num_groups=groups)
    new.eps = layer.eps
    if layer.affine:
        _fold(layer, new)
    new.to(layer.weight.device if layer.affine else None).train(layer.training)
    if layer._modules:
        new.__class__ = GroupNormThenParts
        new._modules.update(layer._modules)
    return new


_STOCK: dict[type[nn.Module], int] = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}


class GroupNormThenParts(nn.GroupNorm):
    """A GroupNorm in the place of a BatchNorm that had parts, such as an activation, which are applied after it."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Normalise, then each part in turn."""
        output = super().forward(input)
        for part in self.children():
            output = part(output)
        return output


@torch.no_grad()
def _is_followed_by_its_parts(layer: Any) -> bool:
    """Whether a BatchNorm of another class normalises and then applies its parts in turn, as far as numbers tell."""
    stock = next((one for one in _STOCK if isinstance(layer, one)), None)
    if stock is None or layer.num_features == 0:
        return False
    generator = torch.Generator().manual_seed(0)
    inputs = 3 * torch.randn(4, layer.num_features, *[5] * _STOCK[stock], generator=generator)
    inputs = inputs.to(next(itertools.chain(layer.parameters(), layer.buffers()), inputs))
    with inert(layer):
        try:
            given = layer(inputs.clone())
            expected = stock.forward(layer, inputs.clone())
            for part in layer.children():
                expected = part(expected)
        except Exception:  # it wants something else
            return False
    return isinstance(given, Tensor) and given.shape == expected.shape and torch.allclose(given, expected)


@torch.no_grad()
def _fold(old: Any, new: nn.GroupNorm) -> None:
    """γ and β of ``new`` with which it gives what ``old`` gives in eval mode, to an example with the data's statistics."""
    scale, shift = old.weight.clone(), old.bias.clone()
    if old.track_running_stats and old.num_batches_tracked:
        mean, variance = old.running_mean, old.running_var
        by_group = mean.view(new.num_groups, -1)
        centre = by_group.mean(1, keepdim=True)
        spread = (variance.view_as(by_group) + (by_group - centre).square()).mean(1, keepdim=True)
        deviation = (variance + old.eps).rsqrt()
        shift += scale * (centre.expand_as(by_group).flatten() - mean) * deviation
        scale *= (spread + old.eps).sqrt().expand_as(by_group).flatten() * deviation
    for parameter, value, before in ((new.weight, scale, old.weight), (new.bias, shift, old.bias)):
        parameter.data = value.detach()
        parameter.requires_grad = before.requires_grad
