"""What a private step would take on many GPUs: a model of time, with every number it assumes. Nothing here is measured.

    uv run python benchmarks/scaling_model.py

prints the tables of docs/scaling.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

EFFICIENT = 0.95
GPUS = (8, 64, 512)


@dataclass(frozen=True)
class Network:
    """What a step costs, in numbers of the network and the recipe.

    Attributes:
        forward: floating-point operations of one image's forward pass (a multiply-add is two), counted by
            ``torch.utils.flop_counter``.
        parameters: P, all of them trained.
        views: K.
        batch: B of the recipe.
        utilisation: part of the GPU's peak that convolutions of this size reach; assumed.
    """

    name: str
    forward: float
    parameters: float
    views: int
    batch: int
    utilisation: float


@dataclass(frozen=True)
class Machine:
    """A cluster of nodes with eight H100 each.

    Attributes:
        peak: dense bf16 operations a second of one GPU (NVIDIA's data sheet of the H100 SXM).
        memory: bytes a second to and from a GPU's memory, of the 3.35e12 of the data sheet about 0.7.
        inside: bytes a second in each direction between GPUs of a node (NVLink, data sheet).
        between: bytes a second in each direction that leave the node for each of its GPUs (a 400 Gb/s adapter each).
        latency: seconds for one message between nodes; assumed.
        fixed: seconds of Python, hooks, logging and synchronisation in a step, whatever its size; assumed.
        node: GPUs of a node.
    """

    peak: float = 989e12
    memory: float = 2.3e12
    inside: float = 450e9
    between: float = 50e9
    latency: float = 10e-6
    fixed: float = 0.02
    node: int = 8


NETWORKS = (
    Network("WRN-40-4", 2.597e9, 8_961_306, 32, 16_384, 0.15),
    Network("NFNet-F3, 320 px", 135.9e9, 254_924_200, 4, 65_536, 0.30),
)
CLIPPING = 1.5
"""Time of the clipped sum ÷ forward and backward without privacy (`ghost` took 1.2 to 1.8 on a CPU, docs/performance.md)."""
PASSES = 14
"""Passes over P floats after the sum: flatten, noise, divide, cast back, optimizer and moving average, reads and writes."""


def gradients(network: Network, machine: Machine, gpus: int, batch: float) -> float:
    """Seconds for the clipped sum: three forward passes' worth of operations for each view, and what clipping adds."""
    operations = 3 * network.forward * network.views * batch / gpus
    return CLIPPING * operations / (machine.peak * network.utilisation)


def reduction(network: Network, machine: Machine, gpus: int) -> float:
    """Seconds for one all-reduce of 4P bytes: in the node, between the nodes on all adapters at once, in the node."""
    size, nodes = 4 * network.parameters, max(1, gpus // machine.node)
    local = min(gpus, machine.node)
    inside = 2 * size * (local - 1) / local / machine.inside
    between = 2 * (size / local) * (nodes - 1) / nodes / machine.between
    return inside + between + 2 * math.log2(max(gpus, 2)) * machine.latency


def rest(network: Network, machine: Machine) -> float:
    """Seconds for noise, division, optimizer and average, and for what every step costs. Noise is one pass of them."""
    return 4 * network.parameters * PASSES / machine.memory + machine.fixed


def efficiency(network: Network, machine: Machine, gpus: int, batch: float) -> float:
    """The part of a step in which gradients are computed."""
    work = gradients(network, machine, gpus, batch)
    return work / (work + reduction(network, machine, gpus) + rest(network, machine))


def efficient_batch(network: Network, machine: Machine, gpus: int) -> int:
    """The smallest B at which :data:`EFFICIENT` of the step is gradients."""
    overhead = reduction(network, machine, gpus) + rest(network, machine)
    return math.ceil(overhead * EFFICIENT / (1 - EFFICIENT) / gradients(network, machine, gpus, 1))


def table() -> str:
    """The table of docs/scaling.md."""
    machine = Machine()
    lines = [
        "| network | GPUs | B | gradients | all-reduce | rest | efficiency | B for 0.95 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for network in NETWORKS:
        for gpus in GPUS:
            parts = (gradients(network, machine, gpus, network.batch), reduction(network, machine, gpus))
            seconds = " | ".join(f"{1000 * part:,.1f} ms" for part in (*parts, rest(network, machine)))
            share, needed = efficiency(network, machine, gpus, network.batch), efficient_batch(network, machine, gpus)
            lines.append(f"| {network.name} | {gpus} | {network.batch:,} | {seconds} | {share:.3f} | {needed:,} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
