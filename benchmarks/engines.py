"""Time the engines, and Opacus's, against a step without privacy.

    uv run python benchmarks/engines.py --json engines.json

What is timed is the clipped sum of a micro-batch: forward, backward, norms, clipping, sum; and for the step without
privacy forward and backward. Engines take turns, round by round, so that a busy machine slows all of them alike; the
table gives the median of the rounds' ratios, their least and greatest. Memory is the peak of what torch allocates
during a step, parameters included. The error is the largest difference from the engine ``loop`` in any coordinate, as a
part of the norm of the whole sum (float32).
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from engine_models import TASKS, loss_of
from torch import Tensor, nn
from torch.func import functional_call

from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.vmap import VmapEngine

CLIP_NORM = 1.0
Gradient = dict[str, Tensor]
Step = Callable[[], Gradient]
PACKAGES = ("lightning-dp", "torch", "opacus")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        model: name in ``engine_models.TASKS``.
        batch_size: examples in the micro-batch.
        views: augmented views of each.
        engine: ours by name, or ``opacus-…``.
        ratio: median of time ÷ time without privacy, over the rounds.
        ratio_min: least.
        ratio_max: greatest.
        milliseconds_per_example: median.
        peak_memory_ratio: peak memory ÷ that without privacy.
        error: largest difference from the loop ÷ norm of the sum, or why the engine did not run.
    """

    model: str
    batch_size: int
    views: int
    engine: str
    ratio: float | None
    ratio_min: float | None
    ratio_max: float | None
    milliseconds_per_example: float | None
    peak_memory_ratio: float | None
    error: float | str


def plain(model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    """Forward and backward without privacy."""
    parameters = dict(model.named_parameters())

    def step() -> Gradient:
        gradients = torch.autograd.grad(loss_of(model, inputs, targets), list(parameters.values()))
        return dict(zip(parameters, gradients, strict=True))

    return step


def ours(name: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    """One of this package's engines."""
    engine = {"ghost": GhostEngine(model), "vmap": VmapEngine(), "loop": LoopEngine()}[name]
    parameters = dict(model.named_parameters())

    def loss_function(given: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Any]:
        return loss_of(lambda x: functional_call(model, dict(given), (x,)), *batch), []

    return lambda: engine.clipped_sum(loss_function, parameters, (inputs, targets), len(inputs), CLIP_NORM).gradient


def opacus(mode: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    """Opacus's gradients by hooks or functorch with its clipping rule, or its ghost clipping with two backward passes."""
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    if inputs.shape[1] != 1:
        raise NotImplementedError("several views of an example")
    model = copy.deepcopy(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def finish(gradient: Callable[[Any], Tensor]) -> Gradient:
        found = {names[id(p)]: gradient(p) for p in model.parameters()}
        for p in model.parameters():
            p.grad = p.grad_sample = None
            p._norm_sample = None
        return found

    if mode == "ghost":
        wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=CLIP_NORM, loss_reduction="mean")

        def ghost_step() -> Gradient:
            losses = loss_of(wrapped, inputs, targets, reduction="none")
            losses.mean().backward(retain_graph=True)
            factors = wrapped.get_clipping_coef()
            for p in model.parameters():
                p.grad = None
            wrapped.disable_hooks()
            (factors * losses).sum().backward()
            wrapped.enable_hooks()
            return finish(lambda p: p.grad)

        return ghost_step
    sampled = GradSampleModule(model, loss_reduction="mean", force_functorch=mode == "functorch")

    def step() -> Gradient:
        loss_of(sampled, inputs, targets).backward()
        norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in model.parameters()]).norm(dim=0)
        factors = (CLIP_NORM / (norms + 1e-6)).clamp(max=1.0)
        return finish(lambda p: torch.einsum("i,i...", factors, p.grad_sample))

    return step


ENGINES: dict[str, Callable[..., Step]] = {
    "ghost": lambda *given: ours("ghost", *given),
    "vmap": lambda *given: ours("vmap", *given),
    "loop": lambda *given: ours("loop", *given),
    "opacus-hooks": lambda *given: opacus("hooks", *given),
    "opacus-functorch": lambda *given: opacus("functorch", *given),
    "opacus-ghost": lambda *given: opacus("ghost", *given),
}


def seconds(step: Step, device: torch.device) -> float:
    """Wall-clock time of one step."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def peak_memory(step: Step, device: torch.device) -> int:
    """Most bytes that torch holds at once during a step, beyond what it held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    results: Any = profile.profiler
    changes = [(e.start_ns(), e.nbytes()) for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes):
        held += change
        peak = max(peak, held)
    return peak


def measure(
    name: str, size: int, views: int, engines: list[str], rounds: int, device: torch.device, autocast: bool
) -> list[Row]:
    """The rows of one model and batch size."""
    torch.manual_seed(0)
    model = TASKS[name].model().to(device)
    inputs, targets = (t.to(device) for t in TASKS[name].batch(size, views))
    given = (model, inputs, targets)
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    steps: dict[str, Step] = {"plain": plain(*given)}
    failures: dict[str, str] = {}
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        expected = ours("loop", *given)()
        size_of_sum = float(torch.cat([g.flatten() for g in expected.values()]).norm())
        errors = {}
        for engine in engines:
            try:
                step = ENGINES[engine](*given)
                found = step()
            except Exception as error:
                failures[engine] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                continue
            errors[engine] = max(float((found[n] - g).abs().max()) for n, g in expected.items()) / size_of_sum
            steps[engine] = step
        fresh = {"plain": plain, **ENGINES}  # an engine that has kept no memory from an earlier step
        peaks = {engine: held + peak_memory(fresh[engine](*given), device) for engine in steps}
        seconds(steps["plain"], device)
        times: dict[str, list[float]] = {engine: [] for engine in steps}
        for _ in range(rounds):
            for engine, step in steps.items():
                times[engine].append(seconds(step, device))
    rows = []
    for engine in engines:
        if engine in failures:
            rows.append(Row(name, size, views, engine, None, None, None, None, None, failures[engine]))
            continue
        ratios = [t / base for t, base in zip(times[engine], times["plain"], strict=True)]
        per_example = 1e3 * statistics.median(times[engine]) / size
        memory = peaks[engine] / peaks["plain"]
        middle = statistics.median(ratios)
        rows.append(
            Row(name, size, views, engine, middle, min(ratios), max(ratios), per_example, memory, errors[engine])
        )
    return rows


def line(row: Row) -> str:
    """A row of the Markdown table."""
    cells = [row.model, f"{row.batch_size}", f"{row.views}", f"`{row.engine}`"]
    if row.ratio is None:
        cells += ["–", "–", "–", f"{row.error}"]
    else:
        cells += [
            f"{row.ratio:.2f} ({row.ratio_min:.2f}–{row.ratio_max:.2f})",
            f"{row.milliseconds_per_example:.2f}",
            f"{row.peak_memory_ratio:.2f}",
            f"{row.error:.0e}",
        ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure what the command line asks for, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["wrn:16", "wrn:64", "wrn:4:8", "wrn-ws:16", "wrn-ws:64", "vit:64", "lm:32"],
        help="model:batch_size or model:batch_size:views",
    )
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--rounds", type=int, default=5, help="how often each engine is timed (default 5)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (default 1)")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    print("| model | batch | views | engine | time ÷ without privacy | ms per example | memory ÷ | error |")
    print("|---|--:|--:|---|--:|--:|--:|--:|", flush=True)
    rows: list[Row] = []
    for case in arguments.cases:
        name, size, *views = case.split(":")
        measured = measure(
            name, int(size), int(*views or [1]), arguments.engines, arguments.rounds, device, arguments.bf16
        )
        rows += measured
        print("\n".join(line(row) for row in measured), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    where = platform.processor() or platform.machine() if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(
        f"\n{where}, {arguments.threads} thread(s), {arguments.rounds} rounds, Python {platform.python_version()}, "
        f"{versions}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
