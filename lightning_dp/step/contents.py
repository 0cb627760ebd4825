"""What tensors and arrays hold, kept so that any write to one of them is found, whatever way it took."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from lightning_dp.engines.user_code import Line
from lightning_dp.errors import PreflightError
from lightning_dp.mechanism.memory import give_memory, has_memory
from lightning_dp.step.reach import Reach

PIECE = 2**20
"""So many numbers are digested at a time, which bounds the memory it takes."""

COPIED = 2**28
"""Up to so many numbers in main memory are copied, which is faster to compare than digests are to make."""

MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64
"""Odd, and far from any pattern of small numbers (Knuth 1998, volume 3, section 6.4)."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Array = np.ndarray[Any, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Contents:
    """What tensors and arrays held when it was taken.

    Compared are values, bit by bit, and neither versions nor addresses: a write through ``.data``, a NumPy view or another
    tensor of the same storage is found, and one that leaves all values as they were is none. In main memory a copy is kept;
    of what is on a device, and of very much, a digest of 64 bits. A single number that changes always changes it; of other
    changes one in about 2⁶⁴ does not.

    Attributes:
        tensors: by name.
        arrays: by name.
        copies: of those tensors of which there is one.
        digests: of the others.
        copied: of the arrays.
    """

    tensors: dict[str, Tensor]
    arrays: dict[str, Array] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    digests: dict[str, Tensor] = field(default_factory=dict)
    copied: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], arrays: Mapping[str, Array] | None = None) -> Contents:
        """The contents of these now, such as all that :func:`tensors_of` a module gives."""
        small = sum(tensor.numel() for tensor in tensors.values()) <= COPIED
        copies = {name: _here(tensor).clone() for name, tensor in tensors.items() if small and _can_be_copied(tensor)}
        others = [name for name in tensors if name not in copies]
        digests = dict(zip(others, _digests([tensors[name] for name in others]), strict=True))
        given = dict(arrays or {})
        return cls(dict(tensors), given, copies, digests, {name: array.copy() for name, array in given.items()})

    def again(self, names: Collection[str] | None = None) -> Contents:
        """What they hold now, or those of them with these names."""

        def wanted(given: Mapping[str, T]) -> dict[str, T]:
            return {name: one for name, one in given.items() if names is None or name in names}

        return Contents.of(wanted(self.tensors), wanted(self.arrays))

    def changed(self) -> list[str]:
        """The names of the tensors and arrays that hold something else now."""
        found = [name for name, copy in self.copies.items() if not _same_bits(self.tensors[name], copy)]
        now = _digests([self.tensors[name] for name in self.digests])
        rows = list(zip(self.digests, self.digests.values(), now, strict=True))
        found += [name for name, before, after in rows if before.device != after.device]
        for device in {before.device for _, before, _ in rows}:  # one wait for each
            here = [row for row in rows if row[1].device == row[2].device == device]
            if here:
                different = torch.stack([before for _, before, _ in here]) != torch.stack([after for *_, after in here])
                if different.any():
                    found += [name for (name, *_), differs in zip(here, different.tolist(), strict=True) if differs]
        return found + [name for name, before in self.copied.items() if not _same_array(self.arrays[name], before)]

    def put_back(self) -> None:
        """Write what there are copies of into the tensors and arrays that hold something else now."""
        with torch.no_grad():
            for name in self.changed():
                if name in self.copies and _alike(self.tensors[name], self.copies[name]):
                    give_memory(_here(self.tensors[name]))
                    _here(self.tensors[name]).copy_(self.copies[name])
                elif name in self.copies and not hasattr(self.tensors[name], "to_local"):
                    self.tensors[name].data = self.copies[name].clone()  # it was given memory of another kind
                elif name in self.copied and self.arrays[name].flags.writeable:
                    np.copyto(self.arrays[name], self.copied[name])

    @contextmanager
    def put_back_on_error(self) -> Iterator[None]:
        """While open, an error leaves what there are copies of as it was: whoever catches it may save the module."""
        try:
            yield
        except BaseException:
            self.put_back()
            raise


class WriteError(PreflightError):
    """The refusal of a training_step that writes into tensors or arrays within reach of its module.

    Args:
        message: says which, and what to do.
        names: of the tensors and arrays.
        line: where, if that is known.
    """

    def __init__(self, message: str, names: Sequence[str] = (), line: Line | None = None) -> None:
        super().__init__(message)
        self.names, self.line = list(names), line


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor within reach of a module, once and by name: parameters, buffers, and those kept anywhere else."""
    reach = Reach()
    reach.walk("", module)
    return reach.tensors


def check_nothing_written(module: nn.Module, before: Contents, line: Line | None = None) -> None:
    """Refuse a training_step that has changed a tensor or an array since ``before`` was taken.

    Args:
        module: the user's.
        before: what they held.
        line: where, if that is known.

    Raises:
        WriteError: see the message.
    """
    changed = before.changed()
    if changed:
        raise written(module, changed, line)


def written(module: nn.Module, names: Sequence[str], line: Line | None = None) -> WriteError:
    """The refusal of a training_step that writes into these tensors or arrays."""
    return WriteError(_text(module, names, line), names, line)


def _text(module: nn.Module, names: Sequence[str], line: Line | None) -> str:
    where = "" if line is None else f" ({line})"
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    if found := [name for name in names if name in parameters]:
        return (
            f"training_step writes into {', '.join(found[:5])}{where}: expected parameters, also frozen ones, that stay as "
            "they are while it runs. It runs once for each example: the write would take place as often, and whatever it took "
            "from an example would leave with the weights, without noise. Move updates of teachers and target networks, and "
            "weight clipping, to on_train_batch_end, which runs once for each step, on weights that are released (under manual "
            "optimization the end of training_step, after the last private step, will do). Start values that a layer takes "
            "from its first batch (ActNorm) before fit, from public data or from random numbers; leave max_norm out of "
            "embeddings, or scale the rows that are looked up."
        )
    if found := [name for name in names if name in buffers]:
        return (
            f"training_step changes the buffers {', '.join(found[:5])}{where}: expected buffers that stay as they are. What a "
            "buffer learns from private examples leaves with the checkpoint, without noise. Update it outside training_step "
            "from public values, as in on_train_batch_end, or switch the tracking off. (Of spectral norms, the one of "
            "torch.nn.utils.parametrizations is looked after.)"
        )
    own = [f"self.{name}" if " " not in name and _is_of(module, name) else name for name in names[:5]]
    return (
        f"training_step writes into the tensor {', '.join(own)}{where}: expected it to stay as it is. "
        "training_step runs once for each example, and no later example may depend on what one has left there. Make a new "
        "tensor in each training_step, use self.log or a torchmetrics object, or do it in on_train_batch_end from public "
        "values."
    )


def _is_of(module: nn.Module, name: str) -> bool:
    """Whether a name is of the module's, and not of a global that its code reads."""
    first = re.split(r"[.\[]", name)[0]
    return first in module.__dict__ or any(
        first in table for table in (module._buffers, module._parameters, module._modules)
    )


def _here(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    whole: Any = tensor.detach()
    part: Tensor = whole.to_local() if hasattr(whole, "to_local") else whole
    return part


def _alike(now: Tensor, before: Tensor) -> bool:
    now = _here(now)
    return (now.shape, now.dtype, now.device) == (before.shape, before.dtype, before.device)


def _can_be_copied(tensor: Tensor) -> bool:
    return _has_bits(tensor) and tensor.device.type == "cpu"


def _has_bits(tensor: Tensor) -> bool:
    kind = tensor.layout == torch.strided and not tensor.is_quantized and tensor.dtype.itemsize in {*_BITS, 16}
    return kind and has_memory(tensor)


def _bits(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.resolve_neg().view(_BITS[tensor.dtype.itemsize])


def _same_bits(now: Tensor, before: Tensor) -> bool:
    now = _here(now)
    if not _alike(now, before) or not _has_bits(now):
        return False
    return torch.equal(_bits(now), _bits(before))


def _same_array(now: Array, before: Array) -> bool:
    if now.shape != before.shape or now.dtype != before.dtype:
        return False
    if now.dtype.hasobject:
        return all(one is other for one, other in zip(now.ravel().tolist(), before.ravel().tolist(), strict=True))
    return bool(np.array_equal(now, before, equal_nan=now.dtype.kind in "fc"))


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
    tensor = _here(tensor)
    form = torch.full((1,), hash((tuple(tensor.shape), str(tensor.dtype))), device=tensor.device)
    if not _has_bits(tensor):
        return [form.add_(tensor._version)]
    return [form, *torch.split(_bits(tensor).reshape(-1), PIECE)]


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
