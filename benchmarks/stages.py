"""Where the time of a book-keeping step goes, each part as a share of a step without privacy.

    uv run python benchmarks/stages.py wrn:16 wrn-ws:16 vit:64 lm:32

Processor time, so that other work on the machine changes it less; the median over rounds in which the step without
privacy takes its turn. A part's time is without that of the parts inside it.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from engine_models import TASKS, loss_of
from engines import ours, plain

from lightning_dp.engines.ghost import engine, projection
from lightning_dp.engines.ghost.contribution import Factored, Written
from lightning_dp.engines.ghost.rules import convolution, embedding, group_norm, layer_norm, linear
from lightning_dp.engines.ghost.standardisation import Recognised

RULES = (
    convolution.Convolution,
    linear.Linear,
    embedding.Embedding,
    group_norm.GroupNorm,
    layer_norm.LayerNorm,
)
PARTS: dict[str, list[tuple[Any, str]]] = {
    "forward, in layers with a rule": [(rule, "forward") for rule in RULES],
    "forward, elsewhere": [(engine.GhostEngine, "_run")],
    "backward, to activations": [(engine.GhostEngine, "_backward")],
    "gradients written out": [(rule, how) for rule in RULES for how in ("of_weight", "of_bias")],
    "way back to standardised weights": [(Recognised, "projection"), (projection.Projection, "contributions")],
    "norms": [(kind, "norms") for kind in (Written, Factored, projection._Projected)],
    "weighted sums": [(kind, "weighted_sum") for kind in (Written, Factored, projection._Projected)],
    "the rest": [(engine.GhostEngine, "_at_once")],
}
FORWARD = "for comparison: forward, without privacy"
ROUNDS = 7


class Timer:
    """Time by part, each without the parts inside."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            self._inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                taken = time.process_time() - started
                self.seconds[part] += taken - self._inside.pop()
                if self._inside:
                    self._inside[-1] += taken

        return timed


def shares(name: str, size: int, timer: Timer) -> dict[str, float]:
    """Part → its time ÷ that of a step without privacy."""
    torch.manual_seed(0)
    model, batch = TASKS[name].model(), TASKS[name].batch(size, 1)
    steps = {"plain": plain(model, *batch), "ghost": ours("ghost", model, *batch)}
    for step in (*steps.values(), *steps.values()):
        step()
    rounds: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        started = time.process_time()
        steps["plain"]()
        base = time.process_time() - started
        timer.seconds.clear()
        steps["ghost"]()
        rounds.append({part: seconds / base for part, seconds in timer.seconds.items()})
        started = time.process_time()
        loss_of(model, *batch)
        rounds[-1][FORWARD] = (time.process_time() - started) / base
    return {part: statistics.median(one.get(part, 0.0) for one in rounds) for part in (*PARTS, FORWARD)}


def main() -> None:
    """Print a table of the cases on the command line."""
    torch.set_num_threads(1)
    timer = Timer()
    for part, places in PARTS.items():
        for owner, method in places:
            setattr(owner, method, timer.around(part, getattr(owner, method)))
    cases = sys.argv[1:] or ["wrn:16", "wrn-ws:16", "vit:64", "lm:32"]
    found = {case: shares(case.split(":")[0], int(case.split(":")[1]), timer) for case in cases}
    print(f"| part, % of a step without privacy | {' | '.join(f'`{case}`' for case in cases)} |")
    print(f"|---|{'--:|' * len(cases)}")
    for case in found:
        found[case]["all"] = sum(found[case][part] for part in PARTS)
    for part in (*PARTS, "all", FORWARD):
        print(f"| {part} | {' | '.join(f'{100 * found[case][part]:.0f}' for case in cases)} |")
    print(f"load average {os.getloadavg()[0]:.1f}", file=sys.stderr)


if __name__ == "__main__":
    main()
