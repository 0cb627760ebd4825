"""Random numbers for many examples at once, each a function of its example's key and its own position alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - 2**64
_FIRST, _SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64

BLOCK, BLOCK_ON_DEVICE = 2**16, 2**25
"""So many words of 64 bits are made at once: what stays in a CPU's cache, and what keeps another device busy."""

DIGITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
"""Binary digits of a number in [0, 1) that each type holds exactly."""

_HALF, _WORD = 32, 64


def mixed(z: Tensor) -> Tensor:
    """The output of SplitMix64 for each state, in place: any int64 tensor, taken as unsigned.

    Source: G. L. Steele, D. Lea and C. H. Flood 2014, *Fast splittable pseudorandom number generators*, figure 16.
    """
    shifted = torch.empty_like(z)
    for by, factor in ((30, _FIRST), (27, _SECOND), (31, None)):
        z.bitwise_xor_(torch.bitwise_right_shift(z, by, out=shifted).bitwise_and_((1 << (_WORD - by)) - 1))
        if factor is not None:
            z.mul_(factor)
    return z


def keys_of_draw(seeds: Tensor, draw: int) -> Tensor:
    """A key for each example and this draw of its, ``(B,)``.

    Args:
        seeds: 64 bits for each example that were mixed before, ``(B,)`` int64.
        draw: 63 bits, the same for all examples.
    """
    return mixed(seeds + draw)


def row_bits(keys: Tensor, words: int, start: int = 0) -> Tensor:
    """Words of 64 bits for each example, ``(B, words)`` int64: SplitMix64 with the example's key as its seed.

    Args:
        keys: of :func:`keys_of_draw`.
        words: how many.
        start: the first of them.
    """
    return mixed(keys[:, None] + _counters(start, words, keys.device))


@lru_cache(maxsize=16)
def _counters(start: int, words: int, device: torch.device) -> Tensor:
    return torch.arange(start + 1, start + words + 1, device=device).mul_(_GAMMA)


def row_uniforms(keys: Tensor, shape: Sequence[int], dtype: torch.dtype, *, inside: bool = False) -> Tensor:
    """Numbers in [0, 1) in the given shape, whose first axis is of the examples, or of equally many rows of each in turn.

    Args:
        keys: of :func:`keys_of_draw`, ``(B,)``.
        shape: its first number is a multiple of B.
        dtype: a floating-point type, whose digits are all drawn.
        inside: in (0, 1): half a step above, where the type has room for that.

    Example:
        >>> keys = keys_of_draw(torch.tensor([3, 8]), draw=7)
        >>> both = row_uniforms(keys, (2, 5), torch.float32)
        >>> bool((both[1:] == row_uniforms(keys[1:], (1, 5), torch.float32)).all())
        True
    """
    digits = DIGITS[dtype]
    found = _filled(keys, shape, dtype, digits, lambda bits: bits)
    return (found.add_(0.5) if inside and digits < DIGITS[torch.float64] else found).mul_(2.0**-digits)


def row_normals(keys: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, likewise: the quantiles of uniform ones."""
    wide = dtype if dtype == torch.float64 else torch.float32
    digits = DIGITS[wide]
    found = _filled(keys, shape, wide, digits, lambda bits: bits.sub_(2 ** (digits - 1)))
    return found.add_(0.5).mul_(2.0 ** (1 - digits)).erfinv_().mul_(2.0**0.5).to(dtype)


def row_hits(keys: Tensor, shape: Sequence[int], dtype: torch.dtype, chance: float) -> Tensor:
    """Ones with probability ``chance`` and zeros, likewise, of any type."""
    digits = DIGITS[torch.float32]
    threshold = round(chance * 2**digits)
    return _filled(keys, shape, dtype, digits, lambda bits: bits < threshold)


def row_integers(keys: Tensor, shape: Sequence[int], low: int, high: int) -> Tensor:
    """Whole numbers in [low, high), likewise, int64. Each is as likely as the others but for (high − low)/2⁶³."""
    return _filled(keys, shape, torch.int64, _WORD - 1, lambda bits: bits.remainder_(high - low)).add_(low)


def _filled(
    keys: Tensor, shape: Sequence[int], dtype: torch.dtype, digits: int, of_bits: Callable[[Tensor], Tensor]
) -> Tensor:
    """A tensor of what ``of_bits`` makes of so many random binary digits at each position."""
    size = prod(shape) // len(keys)
    each = 2 if digits < _HALF else 1
    words = -(-size // each)
    found = torch.empty(len(keys), each * words, dtype=dtype, device=keys.device)
    width = _WORD // each
    for rows, first, last in _blocks(len(keys), words, BLOCK if keys.device.type == "cpu" else BLOCK_ON_DEVICE):
        bits = row_bits(keys[rows], last - first, first)
        bits = bits.view(torch.int32) if each > 1 else bits
        bits.bitwise_right_shift_(width - digits).bitwise_and_((1 << digits) - 1)
        found[rows, each * first : each * last] = of_bits(bits)
    return found[:, :size].reshape(tuple(shape))


def _blocks(rows: int, words: int, most: int) -> Iterator[tuple[slice, int, int]]:
    """Blocks of at most so many words: several examples' all, or stretches of one example's."""
    if words > most:
        for row in range(rows):
            for start in range(0, words, most):
                yield slice(row, row + 1), start, min(start + most, words)
        return
    several = max(1, most // max(1, words))
    for row in range(0, rows, several):
        yield slice(row, row + several), 0, words
