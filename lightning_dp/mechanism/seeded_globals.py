"""The global random generators, of torch, NumPy and Python, seeded for one example at a time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch

_LOW = 0xFFFFFFFF


@cache
def has_cuda() -> bool:
    """Whether torch can use CUDA. It asks the driver every time, for a fifth of a millisecond; the answer stays the same."""
    return torch.cuda.is_available()


def seed_torch(seed: int) -> None:
    """Seed torch's generators in use, of the CPU and of all devices.

    As ``torch.manual_seed``, which formats the stack three times over for devices that nothing has run on yet.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for generator in torch.cuda.default_generators:
            generator.manual_seed(seed)
    elif torch.accelerator.is_available() and not has_cuda():
        torch.manual_seed(seed)


def seed_globals(seed: int, device: torch.device | None = None) -> None:
    """Seed what user code draws from: torch's generators (of the CPU and of ``device``), NumPy's legacy one and ``random``.

    Torch's CPU generator and NumPy's are the same algorithm and keep 32 bits of a seed; each gets another half of it, so that
    they do not draw the same numbers.

    Args:
        seed: 64 bits.
        device: where user code may draw beside the CPU; ``None`` for nowhere.
    """
    torch.default_generator.manual_seed(seed & _LOW)
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device is not None and device.type != "cpu":
        seed_torch(seed & _LOW)
    np.random.seed(seed >> 32)  # noqa: NPY002 (the generator that people's transforms draw from)
    random.seed(seed)


@contextmanager
def globals_put_back(device: torch.device | None = None) -> Iterator[None]:
    """Leave the generators of :func:`seed_globals` as they were found."""
    cuda = device if device is not None and device.type == "cuda" else None
    state, python, array = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 (likewise)
    on_device = None if cuda is None else torch.cuda.get_rng_state(cuda)
    try:
        yield
    finally:
        torch.set_rng_state(state)
        random.setstate(python)
        np.random.set_state(array)  # noqa: NPY002 (likewise)
        if on_device is not None and cuda is not None:
            torch.cuda.set_rng_state(on_device, cuda)


@contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """Torch's global generators, of the CPU and of CUDA devices in use, seeded, and then as they were found.

    Args:
        seed: 64 bits.
    """
    on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    generators = [torch.default_generator, *(torch.cuda.default_generators if on_cuda else ())]
    states = [generator.get_state() for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed & _LOW if generator is torch.default_generator else seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
