"""Torch's global random generators, borrowed for a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def forked_rng(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's global generators seeded for this step's random layers, and put back afterwards."""
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
