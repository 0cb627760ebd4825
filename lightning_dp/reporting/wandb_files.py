"""The record that W&B keeps of a run on this machine, offline or not: ``run-ID.wandb``."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

NAMES = "run-*.wandb"
_BLOCK, _HEADER = 32768, 7


@dataclass
class Recorded:
    """What a record holds.

    Attributes:
        config: what was given as hyperparameters.
        summary: the last values, and what was set by hand.
        history: each row that was logged.
    """

    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def recorded(file: Path) -> Recorded:
    """Read a record.

    Raises:
        ModuleNotFoundError: wandb, whose messages these are, is not installed.
        ValueError: the record is damaged.
    """
    messages = import_module("wandb.proto.wandb_internal_pb2")
    found = Recorded()
    for data in _records(file.read_bytes()):
        try:
            record = messages.Record.FromString(data)
        except Exception as error:  # of protobuf, which wandb brings
            raise ValueError(f"{type(error).__name__}: {error}") from error
        for update in (*record.config.update, *record.run.config.update):
            _put(found.config, update)
        for update in record.summary.update:
            _put(found.summary, update)
        if record.history.item:
            row: dict[str, Any] = {}
            for item in record.history.item:
                _put(row, item)
            found.history.append(row)
    return found


def _put(into: dict[str, Any], item: Any) -> None:
    keys = list(item.nested_key) or [item.key]
    for key in keys[:-1]:
        into = into.setdefault(key, {})
    into[keys[-1]] = json.loads(item.value_json)


def _records(content: bytes) -> Iterator[bytes]:
    """Of LevelDB's log format, after a header of seven bytes; one at the end that is not whole is left out."""
    if content[:4] != b":W&B":
        raise ValueError("it does not begin as such a record does")
    at, parts = _HEADER, list[bytes]()
    while at + _HEADER <= len(content):
        if _BLOCK - at % _BLOCK < _HEADER:  # what is left of a block and cannot hold a header is padding
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if kind not in (1, 2, 3, 4):
            raise ValueError(f"a part of kind {kind} at byte {at}")
        if at + _HEADER + length > len(content):
            return
        parts.append(content[at + _HEADER : at + _HEADER + length])
        at += _HEADER + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []
