"""What the tensors of a module hold, in numbers small enough to keep, so that any write to one of them is found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_dp.engines.user_code import Line
from lightning_dp.errors import PreflightError

PIECE = 2**20
"""So many numbers are digested at a time, which bounds the memory it takes."""

MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64
"""Odd, and far from any pattern of small numbers (Knuth 1998, volume 3, section 6.4)."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Contents:
    """What the parameters, buffers and tensors kept in attributes of a module held when it was taken.

    Compared are values, bit by bit, and neither versions nor addresses: a write through ``.data``, a NumPy view or another
    tensor of the same storage is found, and one that leaves all values as they were is none.

    Attributes:
        tensors: by name.
        digests: of each tensor 64 bits. A single number that changes always changes them; of other changes one in about 2⁶⁴
            does not.
    """

    tensors: dict[str, Tensor]
    digests: list[Tensor]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Contents:
        """The contents of these tensors now, such as :func:`tensors_of` a module."""
        return cls(dict(tensors), _digests(list(tensors.values())))

    def changed(self) -> list[str]:
        """The names of the tensors that hold something else now."""
        now = _digests(list(self.tensors.values()))
        rows = list(zip(self.tensors, self.digests, now, strict=True))
        found = [name for name, before, after in rows if before.device != after.device]
        for device in {before.device for _, before, _ in rows}:  # one wait for each
            here = [row for row in rows if row[1].device == row[2].device == device]
            if here:
                different = torch.stack([before for _, before, _ in here]) != torch.stack([after for *_, after in here])
                found += [name for (name, *_), differs in zip(here, different.tolist(), strict=True) if differs]
        return found


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a module holds, once and by name: parameters, buffers, and attributes that are tensors."""
    found: dict[int, tuple[str, Tensor]] = {}
    for path, one in module.named_modules():
        for name, value in [*one._parameters.items(), *one._buffers.items(), *one.__dict__.items()]:
            for place, tensor in _inside(name, value):
                found.setdefault(id(tensor), (f"{path}.{place}" if path else place, tensor))
    return dict(found.values())


def check_nothing_written(module: nn.Module, before: Contents, line: Line | None = None) -> None:
    """Refuse a training_step that has changed a tensor of its module since ``before`` was taken.

    Args:
        module: the user's.
        before: its contents.
        line: where, if that is known.

    Raises:
        PreflightError: see the message.
    """
    changed = before.changed()
    if changed:
        raise written(module, changed, line)


def written(module: nn.Module, names: Sequence[str], line: Line | None = None) -> PreflightError:
    """The refusal of a training_step that writes into these tensors of its module."""
    where = "" if line is None else f" ({line})"
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    if found := [name for name in names if name in parameters]:
        return PreflightError(
            f"training_step writes into {', '.join(found[:5])}{where}: expected parameters, also frozen ones, that stay as "
            "they are while it runs. It runs once for each example: the write would take place as often, and whatever it took "
            "from an example would leave with the weights, without noise. Move updates of teachers and target networks, and "
            "weight clipping, to on_train_batch_end, which runs once for each step, on weights that are released (under manual "
            "optimization the end of training_step, after the last private step, will do)."
        )
    if found := [name for name in names if name in buffers]:
        return PreflightError(
            f"training_step changes the buffers {', '.join(found[:5])}{where}: expected buffers that stay as they are. What a "
            "buffer learns from private examples leaves with the checkpoint, without noise. Update it outside training_step "
            "from public values, as in on_train_batch_end, or switch the tracking off. (Of spectral norms, the one of "
            "torch.nn.utils.parametrizations is looked after.)"
        )
    return PreflightError(
        f"training_step writes into the tensor self.{', self.'.join(names[:5])}{where}: expected it to stay as it is. "
        "training_step runs once for each example, and no later example may depend on what one has left there. Make a new "
        "tensor in each training_step, use self.log or a torchmetrics object, or do it in on_train_batch_end from public "
        "values."
    )


def _inside(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if not is_lazy(value) and not value.is_meta:
            yield name, value
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            if isinstance(item, Tensor):
                yield f"{name}[{index}]", item


def _digests(tensors: list[Tensor]) -> list[Tensor]:
    """64 bits of each tensor's content, as tensors ``()`` on its device."""
    totals: dict[int, Tensor] = {}
    with torch.no_grad():
        pieces = [(index, piece) for index, tensor in enumerate(tensors) for piece in _pieces(tensor)]
        for group in _together(pieces):
            lengths = [len(bits) for _, bits in group]
            weights = _weights(group[0][1].device)
            flat = torch.cat([bits.to(torch.int64) for _, bits in group])
            flat.mul_(torch.cat([weights[:length] for length in lengths]))
            sums = flat.cumsum(0)[torch.tensor(lengths, device=flat.device).cumsum(0) - 1]
            for (index, _), part in zip(group, sums.diff(prepend=sums.new_zeros(1)).unbind(), strict=True):
                totals[index] = totals[index] * MULTIPLIER + part if index in totals else part
    return [totals[index] for index in range(len(tensors))]


def _pieces(tensor: Tensor) -> list[Tensor]:
    """The bits of a tensor as vectors of integers, the first of which tells of its shape and type."""
    if hasattr(tensor, "to_local"):  # of a tensor in shards, the part that is here
        tensor = tensor.to_local()
    tensor = tensor.detach()
    form = torch.full((1,), hash((tuple(tensor.shape), str(tensor.dtype))), device=tensor.device)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.dtype.itemsize not in {*_BITS, 16}:
        return [form.add_(tensor._version)]
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    bits = tensor.resolve_neg().reshape(-1).view(_BITS[tensor.dtype.itemsize])
    return [form, *torch.split(bits, PIECE)]


def _together(pieces: list[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    """Pieces in groups of about :data:`PIECE` numbers on one device."""
    for device in {bits.device for _, bits in pieces}:
        group: list[tuple[int, Tensor]] = []
        length = 0
        for index, bits in pieces:
            if bits.device == device and len(bits):
                if group and length + len(bits) > PIECE:
                    yield group
                    group, length = [], 0
                group.append((index, bits))
                length += len(bits)
        yield group


@cache
def _weights(device: torch.device) -> Tensor:
    """An odd number for each place, so that what has moved is found too."""
    return torch.arange(PIECE, device=device).mul_(MULTIPLIER).mul_(2).add_(1)
