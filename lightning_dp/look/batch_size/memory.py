"""How much memory there is, and how much a piece of work takes at most."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_dp.ranks.world import World

SHARE = {"cpu": 0.5, "cuda": 0.8}
"""The part of the free memory that micro-batches may take: the rest is for data workers, the optimizer and chance."""

CPU_CAP = 2**32
"""Bytes that micro-batches take at most on a CPU, however much is free: nothing gets faster beyond."""

UNKNOWN = 2**30
"""What is taken to be free where the system does not say."""


HELD_LATER = 5
"""Tensors as large as the gradient that come once steps are taken: sums, noise, and two of the optimizer's state."""


def measures_by_default(world: World) -> bool:
    """Whether ``physical_batch_size=None`` is measured here: on CUDA, where memory is large and gaps between kernels cost."""
    return world.device.type == "cuda" and world.gather == "step"


def room_for_micro_batches(world: World) -> int:
    """Bytes that one rank's micro-batch may take on its device, beside what is held already."""
    device = world.device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(SHARE["cuda"] * (free + cached))
    if device.type != "cpu":
        return UNKNOWN
    return min(CPU_CAP, int(SHARE["cpu"] * available_memory() / world.neighbours))  # shared by those on this machine


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of main memory that this process can still get: the system's, or its container's if that is less.

    Args:
        root: where ``proc`` and ``sys`` are (Linux; elsewhere the operating system's count of free pages is used).
    """
    meminfo = _read(root / "proc/meminfo").splitlines()
    found = [int(line.split()[1]) * 1024 for line in meminfo if line.startswith("MemAvailable:")]
    limit, used = (_read(root / "sys/fs/cgroup" / name).strip() for name in ("memory.max", "memory.current"))
    if limit.isdigit() and used.isdigit():
        found.append(max(0, int(limit) - int(used)))
    if not found and "SC_AVPHYS_PAGES" in os.sysconf_names:
        found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(found, default=UNKNOWN)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that torch holds at a time during ``work``, beyond what it held before.

    On CUDA it is counted by torch's allocator, on a CPU by the profiler. What kernels keep for themselves is not in it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held = peak = 0
    results = profile.profiler.kineto_results
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
