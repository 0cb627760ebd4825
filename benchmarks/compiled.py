"""What torch.compile makes of a per-example pass, beside the engines as they are: ``python benchmarks/compiled.py``.

Time of the clipped sum of a micro-batch of a small convolutional network ÷ a forward and backward pass without privacy.
The passes take turns, and the median of the rounds' ratios is printed. On a CPU the time is that of the processor, so that
what else runs on the machine counts less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F

from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.vmap import VmapEngine
from lightning_dp.mechanism.clip import clip_and_sum


def network() -> nn.Module:
    """Three convolutions of 32 to 64 channels with GroupNorm, on images of 32 × 32."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(8, 32), nn.GELU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GroupNorm(8, 64), nn.GELU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.GroupNorm(8, 64), nn.GELU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def passes(examples: int, device: torch.device) -> tuple[dict[str, Callable[[], Any]], float]:
    """The passes by name, and how long the compiler took."""
    torch.manual_seed(0)
    net = network().to(device)
    images, labels = torch.randn(examples, 3, 32, 32, device=device), torch.randint(10, (examples,), device=device)
    parameters = dict(net.named_parameters())
    detached = {name: parameter.detach() for name, parameter in parameters.items()}

    def of_batch(given: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, Any]:
        return F.cross_entropy(functional_call(net, dict(given), (batch[0],)), batch[1]), []

    def of_one(given: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, given, (image.unsqueeze(0),)), label.unsqueeze(0))

    compiled = torch.compile(vmap(grad_and_value(of_one), in_dims=(None, 0, 0)))
    start = time.perf_counter()
    compiled(detached, images, labels)
    took = time.perf_counter() - start

    def plain() -> None:
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()

    run = (of_batch, parameters, (images, labels), examples, 1.0)
    ghost, by_vmap = GhostEngine(net), VmapEngine()
    return {
        "plain": plain,
        "ghost": lambda: ghost.clipped_sum(*run),
        "vmap": lambda: by_vmap.clipped_sum(*run),
        "vmap, compiled": lambda: clip_and_sum(compiled(detached, images, labels)[0], 1.0),
    }, took


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(given.device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    steps, took = passes(given.examples, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(given.rounds + 1):
        for name, step in steps.items():
            start = clock()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first warms up
                times[name].append(clock() - start)
    print(f"PyTorch {torch.__version__}, {device}, {given.examples} examples, compiled in {took:.0f} s")
    print("| pass | time ÷ without privacy |\n|---|--:|")
    for name, own in times.items():
        ratios = sorted(a / b for a, b in zip(own, times["plain"], strict=True))
        print(f"| {name} | {statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}) |")


if __name__ == "__main__":
    main()
