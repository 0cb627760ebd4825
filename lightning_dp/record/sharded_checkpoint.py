"""A sharded checkpoint is looked through before torch reads it, since reading it unpickles, and that can run code.

``torch.distributed.checkpoint`` unpickles the file ``.metadata`` and every entry that is no tensor, whatever
``weights_only`` says. Here both are read without calling anything that they name.
"""

from __future__ import annotations

import io
import os
import pickle
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

METADATA, REST = ".metadata", "meta.pt"
_MOST_METADATA = 2**28
_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"} | {name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype)},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
}  # fmt: skip


class UnsafeCheckpointError(ValueError):
    """Reading the checkpoint would run code, or read other files than its own."""


def is_sharded(path: Path) -> bool:
    """Whether ``path`` is the folder that Lightning writes for a sharded checkpoint."""
    return path.is_dir() and (path / REST).exists()


def check_sharded_checkpoint(folder: Path) -> None:
    """Refuse a sharded checkpoint of which anything but tensors and plain values would be unpickled.

    Args:
        folder: as Lightning's ``save_distributed_checkpoint=True`` writes it.

    Raises:
        UnsafeCheckpointError: it names other objects than those that torch writes into it, or files outside ``folder``.
        OSError: a file cannot be read.
    """
    other = next(folder.glob(f"*?{METADATA}"), None)
    if other is not None:  # torch would read it if it cannot make sense of the first
        raise UnsafeCheckpointError(f"{other}: expected one index for all ranks, {METADATA}.")
    metadata = _inert(_content(folder / METADATA, _MOST_METADATA))
    parts = metadata.state.get("state_dict_metadata")
    places = metadata.state.get("storage_data")
    if not isinstance(parts, Mapping) or not isinstance(places, Mapping):
        raise UnsafeCheckpointError(f"{folder / METADATA}: expected the index of a sharded checkpoint.")
    for index, place in places.items():
        name = index.state.get("fqn") if isinstance(index, _Inert) else None
        if not isinstance(place, _Inert) or not isinstance(name, str):
            raise UnsafeCheckpointError(f"{folder / METADATA}: expected a place in a file for every entry.")
        kind = parts.get(name)
        tensor = isinstance(kind, _Inert) and kind.name == "TensorStorageMetadata"  # torch reads these as weights only
        _check_place(folder, name, place.state, tensor=tensor)
    if not stat.S_ISREG((folder / REST).stat().st_mode):
        raise UnsafeCheckpointError(f"{folder / REST}: expected a plain file.")
    torch.load(folder / REST, map_location="cpu", weights_only=True)


def _check_place(folder: Path, name: str, place: Mapping[str, Any], *, tensor: bool) -> None:
    file, offset, length = (place.get(part) for part in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or Path(file).name != file:
        raise UnsafeCheckpointError(f"{name} is in {str(file)[:200]!r}: expected a file of {folder} itself.")
    if not stat.S_ISREG((folder / file).stat().st_mode):
        raise UnsafeCheckpointError(f"{folder / file}: expected a plain file.")
    if tensor:
        return
    if (
        type(offset) is not int
        or type(length) is not int
        or offset < 0
        or length < 0
        or place.get("transform_descriptors")
    ):
        raise UnsafeCheckpointError(f"{name} in {folder / METADATA}: expected an offset and a length, in plain bytes.")
    with (folder / file).open("rb") as content:
        content.seek(offset)
        torch.load(io.BytesIO(content.read(length)), map_location="cpu", weights_only=True)


def _content(file: Path, most: int) -> bytes:
    """What a plain file holds. A device or a pipe is not waited for."""
    descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as opened:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > most:
            raise UnsafeCheckpointError(f"{file}: expected a plain file of at most {most} bytes.")
        return opened.read()


class _Inert:
    """Stands for an object of a known class while the file is looked through: it keeps what it is given and does nothing."""

    name = ""

    def __init__(self, *given: Any) -> None:
        self.state: dict[str, Any] = {"given": given}

    def __new__(cls, *_: Any) -> _Inert:
        made = super().__new__(cls)
        made.state = {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = dict(state) if isinstance(state, dict) else {"given": state}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module, ()):
            raise UnsafeCheckpointError(f"{METADATA} names {module}.{name}"[:200])
        return dict if name == "OrderedDict" else type(name, (_Inert,), {"name": name})


def _inert(content: bytes) -> _Inert:
    found = _Reader(io.BytesIO(content)).load()
    if not isinstance(found, _Inert) or found.name != "Metadata":
        raise UnsafeCheckpointError(f"{METADATA} holds no index of a sharded checkpoint")
    return found
