"""Count what a micro-batch does, beside a step without privacy: calls, floating-point operations, bytes, and host waits.

    uv run python benchmarks/counts.py --write docs/performance.md
    uv run python benchmarks/counts.py --cases lm:4 --engines ghost --top 20

Counts are the same on every machine and at any load, so a test holds them (``tests/engines/test_counts.py``).

- *calls* are calls of ATen that are no views: each is at least one kernel, and on the host some microseconds.
- *FLOPs* are those of matrix products, convolutions and attention, as ``torch.utils.flop_counter`` counts them.
- *bytes* are those of all tensors that a call reads or writes. A tensor that is expanded counts as what lies in memory.
- *waits* are calls whose result the host has to see: on an accelerator it waits there until everything before is done.

A step without privacy is what Lightning runs: gradients set to ``None``, forward, backward. The rows ``trainer`` are a whole
step of a Trainer of two micro-batches, beside a Trainer's step without privacy on the same examples at once.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from engine_models import TASKS
from engines import ours, plain
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from lightning_dp.engines.select import ENGINES
from lightning_dp.mechanism.put_off import put_off

CASES = ("wrn:4", "wrn-ws:4", "wrn40-ws:4", "vit:4", "lm:4")
WAITS = ("_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero", "_unique2", "unique_dim")
"""Names of calls whose result, or the shape of whose result, the host has to know."""
_FREE = ("_unsafe_view",)
"""Calls that are views in all but name."""


@dataclass
class Counts:
    """What was called while a :class:`Counting` was open.

    Attributes:
        calls: name of the call → how often.
        bytes: read and written.
        flops: of products.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    flops: int = 0

    @property
    def total(self) -> int:
        """All calls."""
        return self.calls.total()

    @property
    def waits(self) -> int:
        """Calls after which the host waits for an accelerator."""
        return sum(count for name, count in self.calls.items() if name.split(".")[0] in WAITS)


class Counting(TorchDispatchMode):
    """Counts every call of ATen in its thread while it is open, those of the backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call, and note it."""
        found = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if func.is_view or torch.Tag.inplace_view in func.tags or packet.__name__ in _FREE:
            return found
        self.counts.calls[str(func).removeprefix("aten.")] += 1
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)]
        self.counts.bytes += sum(map(_in_memory, tensors))
        self.counts.flops += _flops(packet, args, kwargs or {}, found)
        return found


def _in_memory(tensor: Tensor) -> int:
    """Bytes that a tensor takes, once where it is expanded."""
    numbers = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        numbers *= size if stride else min(size, 1)
    return numbers * tensor.element_size()


def _flops(packet: Any, args: Any, kwargs: Any, found: Any) -> int:
    if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:  # the table has the others only
        return int(sdpa_flop_count(*(t.shape for t in args[:3])))
    return int(flop_registry[packet](*args, **kwargs, out_val=found)) if packet in flop_registry else 0


def counted(step: Any) -> Counts:
    """What one call of ``step`` does once it has settled: it is called twice before."""
    step()
    step()
    with Counting() as counting:
        step()
    return counting.counts


def of_engines(name: str, size: int, engines: list[str], device: str = "cpu") -> dict[str, Counts]:
    """The counts of a micro-batch, by engine, and of the step without privacy as ``"plain"``.

    Args:
        name: name in ``engine_models.TASKS``.
        size: examples in the micro-batch.
        engines: which of this package's.
        device: where; on ``"meta"`` nothing is computed, and what would wait is an error.
    """
    torch.manual_seed(0)
    model = TASKS[name].model().to(device)
    inputs, targets = (t.to(device) for t in TASKS[name].batch(size, 1))
    found = {"plain": counted(plain(model, inputs, targets))}
    model.zero_grad(set_to_none=True)
    for engine in engines:
        step = ours(engine, model, inputs, targets)
        with put_off():  # as in a step: answers are looked at once the next micro-batch is queued
            found[engine] = counted(step)
    return found


def of_trainer(name: str, size: int) -> dict[str, Counts]:
    """The counts of a Trainer's whole step: of two micro-batches of that size with ``ghost``, and without privacy."""
    from trainer_step import counted_steps

    return counted_steps(name, size, Counting)


def python_calls(name: str, size: int, steps: int = 12) -> dict[str, int]:
    """Calls of Python functions, in C too, in a step of a Trainer, ``"private"`` and ``"plain"``: the fewest of some.

    Comparisons of engines, and what is done once an epoch, are in some steps only.

    Args:
        name: name in ``engine_models.TASKS``.
        size: the (expected) batch size, which is one micro-batch.
        steps: how many are looked at.
    """
    from trainer_step import trained

    found = {}
    for kind in ("plain", "private"):
        calls: list[int] = []

        def note(frame: Any, event: str, argument: Any, calls: list[int] = calls) -> None:
            calls[-1] += event in ("call", "c_call")

        def after_a_step(*_: Any, calls: list[int] = calls, note: Any = note) -> None:
            sys.setprofile(None)
            calls.append(0)
            sys.setprofile(note)

        try:
            trained(name, size, kind == "private", steps, after_a_step)
        finally:
            sys.setprofile(None)
        found[kind] = min(calls[1:-1])
    return found


MARKS = ("<!-- counts.py: begin -->", "<!-- counts.py: end -->")
HEAD = """| model, examples | engine | calls | ÷ plain | FLOPs ÷ | bytes ÷ | waits |
|---|---|--:|--:|--:|--:|--:|"""


def line(case: str, engine: str, one: Counts, base: Counts) -> str:
    """A row of the Markdown table."""
    ratios = one.total / base.total, one.flops / base.flops, one.bytes / base.bytes
    cells = [f"`{case}`", f"`{engine}`", f"{one.total}", *(f"{ratio:.2f}" for ratio in ratios), f"{one.waits}"]
    return "| " + " | ".join(cells) + " |"


def write_into(page: Path, table: str) -> None:
    """Put the table between the page's two marks."""
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    page.write_text(f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")


def main() -> None:
    """Count what the command line asks for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="model:examples")
    parser.add_argument("--engines", nargs="+", default=["ghost", "vmap", "trainer"], choices=[*ENGINES, "trainer"])
    parser.add_argument(
        "--device", default="cpu", help="cpu, or meta, which computes nothing and where a wait is an error"
    )
    parser.add_argument("--top", type=int, default=0, metavar="N", help="also each row's N most frequent calls")
    parser.add_argument("--write", type=Path, help="a page with the two marks, between which the table goes")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(HEAD, flush=True)
    rows: list[str] = []
    for case in arguments.cases:
        name, size = case.split(":")
        engines = [engine for engine in arguments.engines if engine != "trainer"]
        found = of_engines(name, int(size), engines, arguments.device)
        counts = [(engine, one, found["plain"]) for engine, one in found.items()]
        if "trainer" in arguments.engines:
            whole = of_trainer(name, int(size))
            counts.append(("trainer", whole["private"], whole["plain"]))
        for engine, one, base in counts:
            rows.append(line(case, engine, one, base))
            print(rows[-1], flush=True)
            if arguments.top:
                print(", ".join(f"{call} {n}" for call, n in one.calls.most_common(arguments.top)), file=sys.stderr)
    if arguments.write:
        write_into(arguments.write, "\n".join([HEAD, *rows]))


if __name__ == "__main__":
    main()
