"""Random words of a cryptographic generator, and uniform numbers with as many bits as a decision needs."""

from __future__ import annotations

import hashlib
from decimal import Context, Decimal, localcontext
from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_dp.mechanism.randomness import RandomKey, Stream

Words = npt.NDArray[np.uint64]
WORD_BITS = 64
_CIPHER = 256  # a last counter, so that no other key is derived from the same place


class MissingSecureExtraError(ImportError):
    """The optional package that makes the key stream is not installed."""


def check_cryptography() -> None:
    """Raise :class:`MissingSecureExtraError` unless the package ``cryptography`` can be imported."""
    if find_spec("cryptography") is None:
        raise MissingSecureExtraError(
            "secure=True, but cryptography is not installed: expected the optional extra. Install it with "
            "pip install 'lightning-dp[secure]'."
        )


class Keystream:
    """The key stream of AES-256 in counter mode: 64-bit words that nobody without the key tells from uniform ones.

    The counter starts at 0, so a key must be used for one stream only. It has 128 bits and never comes round.

    Args:
        key: 32 bytes. **Secret.**

    Raises:
        MissingSecureExtraError: ``cryptography`` is not installed.

    Example:
        >>> stream = Keystream(bytes(32))
        >>> stream.words(2).tolist() == Keystream(bytes(32)).words(2).tolist()
        True

    Source: NIST SP 800-38A, section 6.5, as implemented by ``cryptography`` (OpenSSL).
    """

    def __init__(self, key: bytes) -> None:
        check_cryptography()
        ciphers: Any = import_module("cryptography.hazmat.primitives.ciphers")
        self._encryptor = ciphers.Cipher(ciphers.algorithms.AES(key), ciphers.modes.CTR(bytes(16))).encryptor()
        self._spare_key = hashlib.blake2b(key=key, digest_size=32, person=b"lightning_dp/sp").digest()
        self._spare: Keystream | None = None

    @classmethod
    def of(cls, key: RandomKey, stream: Stream, *counters: int) -> Keystream:
        """The key stream for one purpose at one step: it shares no word with any other."""
        return cls(key.derive(stream, *counters, _CIPHER, size=32))

    def words(self, count: int) -> Words:
        """The next ``count`` words, ``(count,)`` uint64."""
        return np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype="<u8").astype(np.uint64, copy=False)

    @property
    def spare(self) -> Keystream:
        """A key stream of its own for further bits, so that drawing them leaves this one where it is."""
        if self._spare is None:
            self._spare = Keystream(self._spare_key)
        return self._spare


class LazyUniform:
    """A real number uniform on [0, 1), known to 64 bits at first and to as many more as a comparison needs.

    Every comparison is exact: it is decided only when all numbers with the bits drawn so far give the same answer.
    """

    def __init__(self, word: int, stream: Keystream) -> None:
        self._numerator, self._bits, self._stream = int(word), WORD_BITS, stream

    def below(self, threshold: Fraction) -> bool:
        """Whether the number is below a rational ``threshold``."""
        while True:
            scaled = threshold * 2**self._bits
            if self._numerator + 1 <= scaled:
                return True
            if self._numerator >= scaled:
                return False
            self._extend()

    def below_exp(self, exponent: Fraction) -> bool:
        """Whether the number is below exp(-``exponent``), for a rational exponent of at least 0."""
        if exponent == 0:
            return True
        while True:
            low, high = self._bracket(exponent)
            if self._numerator + 1 <= low:
                return True
            if self._numerator >= high:
                return False
            self._extend()

    def _bracket(self, exponent: Fraction) -> tuple[Decimal, Decimal]:
        """Numbers below and above exp(-exponent)·2^bits; Decimal's exp is correctly rounded."""
        digits = 20 + self._bits // 2
        with localcontext(Context(prec=digits)):
            rounded = Decimal(exponent.numerator) / Decimal(exponent.denominator)
            value = (-rounded).exp() * (Decimal(2) ** self._bits)
            error = value * (rounded + 8) * Decimal(10) ** (2 - digits)
            return value - error, value + error

    def _extend(self) -> None:
        self._numerator = (self._numerator << WORD_BITS) | int(self._stream.words(1)[0])
        self._bits += WORD_BITS
