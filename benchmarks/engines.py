"""Time the engines, and Opacus's, against a step without privacy.

    uv run python benchmarks/engines.py --json engines.json --write docs/performance.md

What is timed is the clipped sum of a micro-batch: forward, backward, norms, clipping, sum; and for the step without
privacy what Lightning runs: gradients set to None, forward, backward. Engines take turns, round by round, so that a busy
machine slows all of them alike; the table gives the median of the rounds' ratios, their least and greatest. Memory is
the peak of what torch allocates during a step, parameters and what an engine keeps for the next step included. The error is
the largest difference from the engine ``loop`` in any coordinate, as a part of the norm of the whole sum (float32).

``trainer`` is the whole private step of a Trainer with ``ghost``, in several micro-batches, and its ratio is to that engine
alone. ``jax-privacy`` and ``jax-plain`` need packages that the project does not use, see ``jax_step.py``.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import logging
import os
import platform
import statistics
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from clock import CLOCKS, choose_clock, now
from engine_models import TASKS, loss_of
from jax_step import InJax
from torch import Tensor, nn
from torch.func import functional_call
from trainer_step import MICRO_BATCHES, trainer_over_engine

from lightning_dp.engines.select import make_engine

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
        engine: ours by name, ``opacus-…``, or ``trainer``.
        over: what the ratio is to: ``plain``, the step without privacy, or ``ghost``, for ``trainer``.
        ratio: median of time ÷ time of that, over the rounds.
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
    over: str
    ratio: float | None
    ratio_min: float | None
    ratio_max: float | None
    milliseconds_per_example: float | None
    peak_memory_ratio: float | None
    error: float | str


def plain(model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    """What Lightning runs without privacy: gradients set to None, forward, backward."""

    def step() -> Gradient:
        model.zero_grad(set_to_none=True)
        loss_of(model, inputs, targets).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    return step


def ours(name: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> Step:
    """One of this package's engines."""
    engine = make_engine(name, model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

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
    trained = [p for p in model.parameters() if p.requires_grad]

    def finish(gradient: Callable[[Any], Tensor]) -> Gradient:
        found = {names[id(p)]: gradient(p) for p in trained}
        for p in trained:
            p.grad = p.grad_sample = None
            p._norm_sample = None
        return found

    if mode == "ghost":
        wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=CLIP_NORM, loss_reduction="mean")

        def ghost_step() -> Gradient:
            losses = loss_of(wrapped, inputs, targets, reduction="none")
            losses.mean().backward(retain_graph=True)
            factors = wrapped.get_clipping_coef()
            for p in trained:
                p.grad = None
            wrapped.disable_hooks()
            (factors * losses).sum().backward()
            wrapped.enable_hooks()
            return finish(lambda p: p.grad)

        return ghost_step
    sampled = GradSampleModule(model, loss_reduction="mean", force_functorch=mode == "functorch")

    def step() -> Gradient:
        loss_of(sampled, inputs, targets).backward()
        norms = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in trained]).norm(dim=0)
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
    "jax-plain": lambda *given: InJax(*given, CLIP_NORM).plain,
    "jax-privacy": lambda *given: InJax(*given, CLIP_NORM).private,
}
OURS_AND_OPACUS = [name for name in ENGINES if not name.startswith("jax")]
"""What the project's own environment can run; the rest needs packages of its own, see ``jax_step.py``."""

NAMES = [*ENGINES, "trainer"]
UNCLIPPED = "jax-plain"


def seconds(step: Step, device: torch.device) -> float:
    """Time of one step, by the clock that was chosen."""
    started = now(device)
    step()
    return now(device) - started


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
    held = sum(p.numel() * p.element_size() for p in model.parameters())

    def step_of(engine: str) -> Step:
        step = {"plain": plain, **ENGINES}[engine](model, inputs, targets)

        def cast() -> Gradient:  # a context of its own each time: it keeps the weights it has cast
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                return step()

        return cast

    steps: dict[str, Step] = {"plain": step_of("plain")}
    failures: dict[str, str] = {}
    expected = step_of("loop")()
    size_of_sum = float(torch.cat([g.flatten() for g in expected.values()]).norm())
    errors: dict[str, float | str] = {}
    for engine in (one for one in engines if one in ENGINES):
        try:
            step = step_of(engine)
            found = step()
        except Exception as error:
            failures[engine] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        error = max(float((found[n] - g).abs().max()) for n, g in expected.items()) / size_of_sum
        errors[engine] = "its own plain step" if engine == UNCLIPPED else error
        steps[engine] = step
    peaks = {}
    for engine in (
        one for one in steps if not one.startswith("jax")
    ):  # each anew, so that what it keeps for its next step is counted
        model.zero_grad(set_to_none=True)
        peaks[engine] = held + peak_memory(step_of(engine), device)
    seconds(steps["plain"], device)
    times: dict[str, list[float]] = {engine: [] for engine in steps}
    for _ in range(rounds):
        for engine, step in steps.items():
            times[engine].append(seconds(step, device))
    rows = []
    for engine in engines:
        case = (name, size, views, engine)
        if engine == "trainer":
            rows.append(of_trainer(name, size, views, rounds, device))
        elif engine in failures:
            rows.append(Row(*case, "plain", None, None, None, None, None, failures[engine]))
        else:
            memory = peaks[engine] / peaks["plain"] if engine in peaks else None
            rows.append(Row(*case, "plain", *figures(times[engine], times["plain"], size), memory, errors[engine]))
    return rows


def of_trainer(name: str, size: int, views: int, rounds: int, device: torch.device) -> Row:
    """The row of a Trainer's whole step; one without a ratio where there is none."""
    case = (name, size, views, "trainer", "ghost")
    try:
        whole, alone = trainer_over_engine(name, size, views, "ghost", rounds, device)
    except NotImplementedError as error:
        return Row(*case, None, None, None, None, None, f"not measured with {error}")
    return Row(*case, *figures(whole, alone, MICRO_BATCHES * size), None, "its own draws")


def figures(times: list[float], base: list[float], size: int) -> tuple[float, float, float, float]:
    """Median, least and greatest ratio of the rounds, and milliseconds per example."""
    ratios = [t / b for t, b in zip(times, base, strict=True)]
    return statistics.median(ratios), min(ratios), max(ratios), 1e3 * statistics.median(times) / size


def line(row: Row) -> str:
    """A row of the Markdown table."""
    cells = [row.model, f"{row.batch_size}", f"{row.views}", f"`{row.engine}`"]
    if row.ratio is None:
        cells += ["–", "–", "–", f"{row.error}"]
    else:
        note = "" if row.over == "plain" else f" of `{row.over}`"
        cells += [
            f"{row.ratio:.2f} ({row.ratio_min:.2f}–{row.ratio_max:.2f}){note}",
            f"{row.milliseconds_per_example:.2f}",
            "–" if row.peak_memory_ratio is None else f"{row.peak_memory_ratio:.2f}",
            row.error if isinstance(row.error, str) else f"{row.error:.0e}",
        ]
    return "| " + " | ".join(cells) + " |"


HEAD = """| model | batch | views | engine | time ÷ without privacy | ms per example | memory ÷ | error |
|---|--:|--:|---|--:|--:|--:|--:|"""
MARKS = ("<!-- engines.py: begin -->", "<!-- engines.py: end -->")


def write_into(page: Path, table: str, about: str) -> None:
    """Put the table and what it was measured with between the page's two marks."""
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n{table}\n\n{about}\n{MARKS[1]}{after}", encoding="utf-8")


def load() -> str:
    """How busy the machine is."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def main() -> None:
    """Measure what the command line asks for, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases",
        nargs="+",
        default=["wrn:16", "wrn:64", "wrn:4:8", "wrn-ws:16", "wrn-ws:64", "vit:64", "lm:32"],
        help="model:batch_size or model:batch_size:views",
    )
    parser.add_argument("--engines", nargs="+", default=[*OURS_AND_OPACUS, "trainer"], choices=NAMES)
    parser.add_argument("--rounds", type=int, default=5, help="how often each engine is timed (default 5)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast (not the row of the Trainer)")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU (default 1)")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=CLOCKS,
        help="processor: seconds that the process computed, which other work on a busy CPU changes less (default wall)",
    )
    parser.add_argument("--json", type=Path, help="where to write the rows")
    parser.add_argument("--write", type=Path, help="a page with the two marks, between which the table goes")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(arguments.threads)
    choose_clock(arguments.clock)
    device, loads = torch.device(arguments.device), [load()]
    print(HEAD, flush=True)
    rows: list[Row] = []
    for case in arguments.cases:
        name, size, *views = case.split(":")
        measured = measure(
            name, int(size), int(*views or [1]), arguments.engines, arguments.rounds, device, arguments.bf16
        )
        rows += measured
        loads.append(load())
        print("\n".join(line(row) for row in measured), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    where = processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    about = (
        f"{where}, {os.cpu_count()} cores, {arguments.threads} thread(s), {arguments.clock} clock, {arguments.rounds} rounds, "
        f"load average before each case {', '.join(loads)}; Python {platform.python_version()}, {versions}."
    )
    print(f"\n{about}", file=sys.stderr)
    if arguments.write:
        write_into(arguments.write, "\n".join([HEAD, *map(line, rows)]), about)


def processor() -> str:
    """What the machine calls its processor."""
    found = Path("/proc/cpuinfo")
    names = [one for one in found.read_text().splitlines() if one.startswith("model name")] if found.exists() else []
    return names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
