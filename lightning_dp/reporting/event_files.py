"""TensorBoard's event files: the scalars in them.

The format is that of TFRecord, around protocol buffers of which four fields are read. It is read here and not by
TensorBoard, which brings a dozen packages and which whoever logs through tensorboardX does not have.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

NAMES = "events.out.tfevents.*"
_FRAME, _CRC = struct.Struct("<Q"), struct.Struct("<I")
_NUMBERS = {1: ("f", 5, 4), 2: ("d", 6, 8)}
"""Of a tensor's types: letter in ``struct``, field of the values, bytes of each."""
_SMALL = 2**16
Value = int | bytes


def scalars(file: Path) -> Iterator[tuple[str, int, float]]:
    """Tag, step and value of every scalar, in the order in which they were written.

    A record at the end that is not whole yet is left out: the run is still writing it, or was killed.

    Args:
        file: of ``SummaryWriter``, of TensorBoard or tensorboardX.

    Raises:
        ValueError: a record is damaged.
    """
    for event in _records(file.read_bytes()):
        step = 0
        for number, value in _fields(event):
            if number == 2 and isinstance(value, int):
                step = value
            elif number == 5 and isinstance(value, bytes):
                for _, entry in _fields(value):
                    found = _scalar(entry) if isinstance(entry, bytes) else None
                    if found is not None:
                        yield found[0], step, found[1]


def _scalar(entry: bytes) -> tuple[str, float] | None:
    """Tag and number of one value of a summary, ``None`` for pictures, texts and histograms."""
    tag, number = "", None
    for field, value in _fields(entry):
        if field == 1 and isinstance(value, bytes):
            tag = value.decode("utf-8")
        elif field == 2 and isinstance(value, bytes):
            (number,) = struct.unpack("<f", value)
        elif field == 8 and isinstance(value, bytes):
            number = _one_number(value)
    return None if number is None else (tag, number)


def _one_number(tensor: bytes) -> float | None:
    fields = dict(_fields(tensor))
    kind = fields.get(1)
    if kind not in _NUMBERS or not isinstance(kind, int):
        return None
    letter, place, size = _NUMBERS[kind]
    content = fields.get(4) or fields.get(place)
    if not isinstance(content, bytes) or len(content) != size:
        return None
    (number,) = struct.unpack(f"<{letter}", content)
    return float(number)


def _records(content: bytes) -> Iterator[bytes]:
    at = 0
    while at + 12 <= len(content):
        (length,) = _FRAME.unpack_from(content, at)
        _check(content[at : at + 8], content[at + 8 : at + 12], at)
        if at + 16 + length > len(content):
            return
        data = content[at + 12 : at + 12 + length]
        if length < _SMALL:  # what is longer is no scalar
            _check(data, content[at + 12 + length : at + 16 + length], at)
            yield data
        at += 16 + length


def _check(data: bytes, written: bytes, at: int) -> None:
    crc = _crc32c(data)
    masked = (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
    if _CRC.unpack(written)[0] != masked:
        raise ValueError(f"the record at byte {at} has another checksum than it says")


def _fields(message: bytes) -> Iterator[tuple[int, Value]]:
    """Number and value of each field of a protocol buffer; numbers of fixed width as their bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == 2:
            length, at = _varint(message, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of wire type {kind}")
        if at + length > len(message):
            raise ValueError("a field that goes beyond its message")
        yield number, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(message):
            raise ValueError("a number that goes beyond its message")
        byte = message[at]
        value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
        if byte < 128:
            return value, at


def _table() -> tuple[int, ...]:
    found = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        found.append(byte)
    return tuple(found)


_TABLE = _table()


def _crc32c(data: bytes) -> int:
    """The Castagnoli polynomial's.

    Example:
        >>> hex(_crc32c(b"123456789"))
        '0xe3069283'
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF
