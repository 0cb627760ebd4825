"""The clock by which the benchmarks time a step."""

from __future__ import annotations

import time

import torch

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
_chosen = "wall"


def choose_clock(name: str) -> None:
    """Time by the clock of that name in ``CLOCKS`` from now on."""
    global _chosen
    _chosen = name


def now(device: torch.device) -> float:
    """Seconds on the chosen clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return CLOCKS[_chosen]()
