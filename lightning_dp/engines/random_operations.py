"""Torch's random operations, calculated for many examples at once: what each example gets is a function of its key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_dp.mechanism.row_bits import DIGITS, row_hits, row_integers, row_normals, row_uniforms

Arguments = Mapping[str, Any]
"""What an operation is called with, by the names of its schema."""

Values = Callable[[Tensor, tuple[int, ...], torch.dtype, Arguments], Any]
"""``(keys (B,), shape, type, arguments)`` → what is drawn."""


def arguments_of(func: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What an operation is called with, by the names of its schema, with its defaults."""
    schema = func._schema.arguments
    given = {one.name: one.default_value for one in schema if one.has_default_value()}
    return given | {one.name: value for one, value in zip(schema, args, strict=False)} | dict(kwargs)


def draws_nothing(func: Any, given: Arguments) -> bool:
    """Whether an operation that may draw does not, because nothing is to be dropped or it only uses what was drawn."""
    name = func.name()
    if "backward" in name or "_fused_sdp_choice" in name or "no_dropout" in name:
        return True
    if given.get("train", True) is False or given.get("training", True) is False:
        return True
    return any(given.get(rate, 1.0) == 0.0 for rate in ("dropout_p", "dropout"))


def calculated(func: Any, given: Arguments, keys_on: Callable[[torch.device], Tensor], examples: int) -> Any:
    """What ``func`` gives, with numbers of each example's own; ``NotImplemented`` if that is not known.

    Args:
        func: an operation of torch.
        given: of :func:`arguments_of`.
        keys_on: draws the key of each example for this operation, ``(B,)``, on the device.
        examples: B, whose parts of the result are equally many rows of its first axis each, in turn.
    """
    values = _VALUES.get(_name(func))
    tensors = [given[name] for name in ("self", "input", "mean", "std") if isinstance(given.get(name), Tensor)]
    if values is None or given.get("out") is not None:
        return NotImplemented
    shape = tuple(given["size"]) if given.get("size") is not None else _joint_shape(tensors)
    dtype = given.get("dtype")
    if not isinstance(dtype, torch.dtype):
        usual = torch.int64 if values is _integer else torch.get_default_dtype()
        dtype = tensors[0].dtype if tensors else usual
    known = dtype in (_REAL if values in (_uniform, _normal, _exponential) else _REAL | _WHOLE)
    if not known or (examples > 1 and (not shape or shape[0] % examples)) or (values is _integer and _is_open(given)):
        return NotImplemented
    device = tensors[0].device if tensors else torch.device(given.get("device") or "cpu")
    found = values(keys_on(device), shape, dtype, given)
    return given["self"].copy_(found) if func._schema.arguments[0].is_write else found


def row_by_row(
    func: Any, args: Any, kwargs: Mapping[str, Any], examples: int, draw: Callable[[int, Any, Mapping[str, Any]], Any]
) -> Any:
    """What ``func`` gives, drawn for one example after the other; ``NotImplemented`` if it cannot be taken in parts.

    Args:
        func: an operation of torch.
        args: what it is called with; each tensor with as many axes as the first has equally many rows of each example.
        kwargs: likewise.
        examples: B.
        draw: calls ``func`` for the example of this number with its part of the arguments.
    """
    first = args[0] if args else None
    if _name(func) not in _IN_PARTS or not isinstance(first, Tensor) or first.ndim == 0 or len(first) % examples:
        return NotImplemented
    each = len(first) // examples

    def part(value: Any, row: int) -> Any:
        alike = isinstance(value, Tensor) and value.ndim == first.ndim and len(value) == len(first)
        return value[row * each : (row + 1) * each] if alike else value

    found = [draw(row, [part(value, row) for value in args], kwargs) for row in range(examples)]
    return first if func._schema.arguments[0].is_write else torch.cat(found)


def _name(func: Any) -> str:
    return str(func.name().split("::")[-1].split(".")[0])


def _joint_shape(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple(torch.broadcast_shapes(*(one.shape for one in tensors)))  # type: ignore[no-untyped-call]  # by torch


def _is_open(given: Arguments) -> bool:
    """Whether whole numbers are to be drawn whose range a type or a tensor decides."""
    return isinstance(given.get("high"), Tensor) or (given.get("high") is None and given.get("to") is None)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _bernoulli(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype, given: Arguments) -> Tensor:
    chance = given["self"] if given.get("p") is None else given["p"]
    if isinstance(chance, float) and dtype != torch.float64:
        return row_hits(keys, shape, dtype, chance)
    hit: Tensor = row_uniforms(keys, shape, _wide(dtype)) < chance
    return hit.to(dtype)


def _dropout(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype, given: Arguments) -> tuple[Tensor, Tensor]:
    keep = 1.0 - given["p"]
    mask = row_hits(keys, shape, torch.bool, keep)
    return given["input"] * mask * (1.0 / keep if keep else 0.0), mask


def _uniform(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype, given: Arguments) -> Tensor:
    low, high = given.get("from", 0.0), given.get("to", 1.0)
    found = row_uniforms(keys, shape, dtype)
    return found if (low, high) == (0.0, 1.0) else found.mul_(high - low).add_(low)


def _normal(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype, given: Arguments) -> Tensor:
    mean, std = given.get("mean", 0.0), given.get("std", 1.0)
    found = row_normals(keys, shape, dtype)
    standard = not isinstance(mean, Tensor) and not isinstance(std, Tensor) and (mean, std) == (0.0, 1.0)
    return found if standard else found.mul_(std).add_(mean)


def _exponential(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype, given: Arguments) -> Tensor:
    found = row_uniforms(keys, shape, _wide(dtype), inside=True)
    return found.log_().div_(-given["lambd"]).to(dtype)


def _integer(keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype, given: Arguments) -> Tensor:
    high = given["to"] if given.get("high") is None else given["high"]
    low = given.get("low", given.get("from"))
    return row_integers(keys, shape, low or 0, high).to(dtype)


_VALUES: dict[str, Values] = {
    "bernoulli": _bernoulli, "bernoulli_": _bernoulli, "native_dropout": _dropout,
    "rand": _uniform, "rand_like": _uniform, "uniform": _uniform, "uniform_": _uniform,
    "randn": _normal, "randn_like": _normal, "normal": _normal, "normal_": _normal, "normal_functional": _normal,
    "exponential": _exponential, "exponential_": _exponential,
    "randint": _integer, "randint_like": _integer, "random": _integer, "random_": _integer,
}  # fmt: skip

_IN_PARTS = {
    "multinomial",
    "poisson",
    "binomial",
    "_standard_gamma",
    "_sample_dirichlet",
    "cauchy_",
    "geometric_",
    "log_normal_",
}

_REAL = frozenset(DIGITS)
_WHOLE = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
