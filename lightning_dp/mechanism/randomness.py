"""One key, separate counter-based streams: who draws what, at which step, without any generator state to save."""

from __future__ import annotations

import hashlib
import secrets
from enum import Enum
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from lightning_dp.mechanism.counters import splitmix64

KEY_BYTES = 32


class Stream(Enum):
    """What random numbers are for. Streams of one key never share a number."""

    SAMPLING = "sampling"
    NOISE = "noise"
    VIEWS = "views"
    DROPOUT = "dropout"
    UNITS = "units"
    READING = "reading"
    HOOKS = "hooks"
    COMPARISONS = "comparisons"
    DIGEST = "digest"
    GROUPS = "groups"


class RandomKey:
    """A 256-bit key from which every stream of every step is derived by keyed BLAKE2b.

    The key is **secret** in the default mode: it is never printed, logged, pickled or saved. Knowing it, anybody
    could subtract the noise.

    Args:
        material: 32 bytes.
        mode: ``"secret"`` (operating-system entropy) or ``"reproducible"`` (derived from a seed somebody knows).

    Example:
        >>> key = RandomKey.from_seed(0)
        >>> int(key.generator(Stream.SAMPLING, 0).integers(10)) == int(key.generator(Stream.SAMPLING, 0).integers(10))
        True
        >>> RandomKey.fresh()
        RandomKey(secret)
    """

    def __init__(self, material: bytes, mode: Literal["secret", "reproducible"]) -> None:
        if len(material) != KEY_BYTES:
            raise ValueError(f"material of {len(material)} bytes: expected {KEY_BYTES}, as from RandomKey.fresh().")
        self._material = material
        self.mode: Literal["secret", "reproducible"] = mode

    @classmethod
    def fresh(cls) -> RandomKey:
        """A key of 256 bits of the operating system's entropy; no seeding of any library influences it."""
        return cls(secrets.token_bytes(KEY_BYTES), "secret")

    @classmethod
    def from_seed(cls, seed: int, changed: str = "") -> RandomKey:
        """A key anybody can rebuild from ``seed``: for tests and debugging, not for releases.

        Args:
            seed: any whole number.
            changed: what makes a resumed run another mechanism than the run it continues. With the same noise in both, two
                noisy gradients of one step would be two equations, which give the gradient and the noise.
        """
        text = f"{int(seed)}:{changed}" if changed else str(int(seed))
        material = hashlib.blake2b(text.encode(), digest_size=KEY_BYTES, person=b"lightning_dp/sd").digest()
        return cls(material, "reproducible")

    def reveal(self) -> bytes:
        """The raw key, for the one purpose of sharing it among the ranks of a run."""
        return self._material

    def digest(self) -> str:
        """A name of the key that may be saved: it tells two keys apart, and nothing of them can be computed from it."""
        return self.derive(Stream.DIGEST, size=16).hex()

    def derive(self, stream: Stream, *counters: int, size: int = 32) -> bytes:
        """``size`` (at most 64) pseudorandom bytes for this stream at these counters (step, then rank or part)."""
        message = ":".join([stream.value, *(str(int(counter)) for counter in counters)]).encode()
        return hashlib.blake2b(message, key=self._material, digest_size=size, person=b"lightning_dp").digest()

    def generator(self, stream: Stream, *counters: int, block: int = 0) -> np.random.Generator:
        """A NumPy generator (Philox 4×64, Salmon et al. 2011) with a 128-bit key of its own.

        Args:
            stream: what the numbers are for.
            counters: step, then rank or part.
            block: which of 2⁶⁴ disjoint stretches of 2¹⁹² draws, each, of that key's sequence to start in.
        """
        key = int.from_bytes(self.derive(stream, *counters, size=16), "big")
        return np.random.Generator(np.random.Philox(key=key, counter=block << 192))

    def torch_seed(self, stream: Stream, *counters: int) -> int:
        """63 bits to seed a ``torch.Generator``. Note that PyTorch's CPU generator keeps only 32 bits of a seed."""
        return int.from_bytes(self.derive(stream, *counters, size=8), "big") >> 1

    def seeds(self, stream: Stream, step: int, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """64 bits for each example of a step, ``(n,)``: a function of the key, the step and the example's index alone.

        They seed what user code draws from, and say nothing about the key: they come from 64 bits that were derived of it.

        Args:
            stream: what the numbers are for.
            step: number of the step.
            indices: dataset indices, ``(n,)``.
        """
        start = int.from_bytes(self.derive(stream, step, size=8), "big")
        return splitmix64(start, indices.astype(np.uint64) + np.uint64(1))

    def seed_of_step(self, stream: Stream, step: int) -> int:
        """64 bits for what is drawn for a whole step, whoever is in it; none of :meth:`seeds` is the same."""
        return int(self.seeds(stream, step, np.array([-1]))[0])

    def __repr__(self) -> str:
        return f"RandomKey({self.mode})"

    def __reduce__(self) -> NoReturn:
        raise TypeError("A RandomKey is never pickled: it would put the noise's secret into a file.")

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, RandomKey) and secrets.compare_digest(self._material, other._material)

    __hash__ = None  # type: ignore[assignment]  # a key must not end up in a dict or a set
