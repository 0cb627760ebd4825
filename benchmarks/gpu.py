"""Everything that wants a GPU, in one command: what is right there, how fast it is, and one run of the paper.

    uv run python benchmarks/gpu.py --budget 15 --results gpu.jsonl --write docs

The work is cut into slices, most valuable first: every engine beside the loop; a Trainer's run on the CPU and on the GPU from
one seed; time and memory beside a step without privacy, and beside Opacus; the micro-batch that fills the memory; where the
time goes; then WRN-16-4 at ε = 1, from checkpoint to checkpoint. A slice is a process of its own, of less than ten minutes.
What it finds is a line of JSON in ``--results``. Called again, it goes on where it stopped; what failed is tried once more.
Nothing is begun that would not end within the budget. ``--write`` puts what was found into docs/performance.md and
docs/reproduction.md, and the recipe's header. ``--list`` says what there is, and what is done.

CIFAR-10 is looked for in ``$LIGHTNING_DP_DATA`` or ``data/``. ``--toy`` runs it all at a size for a CPU (``--device cpu``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_models  # noqa: F401  (adds to TASKS)
import torch
from gpu_pages import write_pages
from gpu_slices import Found, Slice, compiled, correct, forms, hush, micro_batch, profile, ratio, same_weights
from gpu_training import train

LONGEST = 9.5
"""Minutes that a slice may take, with what it takes to begin."""

PEERS = ("opacus-hooks", "opacus-functorch", "opacus-ghost")
BESIDE_JAX = ("jax-plain", "jax-privacy")


def _ratio(case: str, minutes: float, how: str, *peers: str) -> Slice:
    return Slice(f"ratio:{case}:{how}", minutes, ratio(case, how, peers))


SLICES = [
    *(
        Slice(f"correct:{model}", 1, correct(model, 4))
        for model in ("wrn", "wrn-ws", "wrn-ws-last", "vit", "lm", "toy-lora")
    ),
    Slice("same weights:toy", 1, same_weights("toy", 4)),
    *(Slice(f"forms:{model}", 2, forms(model, 64)) for model in ("wrn", "vit", "lm")),
    _ratio("wrn-ws:256", 1.5, "high", *PEERS),
    Slice("micro-batch:wrn40-ws", 1, micro_batch("wrn40-ws", 32, 16_384)),
    _ratio("wrn-ws:256", 1.5, "bf16", *PEERS),
    _ratio("wrn-ws-last:256", 1.5, "high"),
    _ratio("wrn-ws-last:256", 1.5, "bf16"),
    Slice("profile:wrn-ws:256", 1, profile("wrn-ws:256")),
    _ratio("vit-b:32", 1.5, "bf16", *PEERS),
    _ratio("gpt2:8", 1.5, "bf16", *PEERS),
    Slice("profile:vit-b:32", 1, profile("vit-b:32")),
    Slice("profile:gpt2:8", 1, profile("gpt2:8")),
    _ratio("gpt2-lora:8", 1.5, "bf16", *PEERS),
    _ratio("wrn40-ws:128", 2, "high", *PEERS),
    _ratio("wrn-ws:16:16", 1.5, "high"),
    *(_ratio(case, 1.5, "high", *PEERS) for case in ("wrn:256", "vit-b:32", "gpt2:8", "gpt2-lora:8")),
    _ratio("wrn-ws:256", 1.5, "highest", *PEERS),
    Slice("compiled:256", 3, compiled(256)),
    _ratio("wrn-ws:64", 2, "highest", *BESIDE_JAX),
    Slice("train:recipes/cifar10/wrn_16_4_eps1.yaml", LONGEST, train("recipes/cifar10/wrn_16_4_eps1.yaml")),
]
TOYS = [
    Slice("correct:toy", 1, correct("toy", 2)),
    Slice("correct:toy-last", 1, correct("toy-last", 2)),
    Slice("same weights:toy", 1, same_weights("toy", 2, styles=2)),
    Slice("forms:toy", 1, forms("toy", 2, rounds=1)),
    Slice("ratio:toy:4:high", 1, ratio("toy:4", "high", PEERS[:1], rounds=1)),
    Slice("micro-batch:toy", 1, micro_batch("toy", 2, 32)),
    Slice("profile:toy:4", 1, profile("toy:4")),
    Slice(
        "train:recipes/digits/cnn_eps8.yaml", 1,
        train("recipes/digits/cnn_eps8.yaml", ("--trainer.max_steps", "12", "--trainer.val_check_interval", "4"), 0.0),
    ),
]  # fmt: skip

Run = Callable[[Slice, float], Found]


def work_off(
    slices: list[Slice], results: Path, where: str, minutes: float, run: Run, clock: Any = time.monotonic
) -> None:
    """Run what is not done, in order, as long as it ends within the budget.

    Args:
        slices: the most valuable first.
        results: a file of lines of JSON; one is added for each slice that was run.
        where: the device by name. What was found on another is done again.
        minutes: the budget.
        run: slice, seconds that it may take → what was found.
        clock: seconds.
    """
    start = clock()
    for one in slices:
        while not is_done(one, found := read(results), where):
            left = 60 * minutes - (clock() - start)
            turns_left = left >= 60 * min(one.minutes, LONGEST) or (one.minutes >= LONGEST and left >= 240)
            if not turns_left:
                print(f"{one.name}: not begun, {left / 60:.1f} minutes are left", flush=True)
                break
            began = clock()
            try:
                about = {"state": "done", **run(one, min(left, 60 * LONGEST, 120 * one.minutes))}
            except Exception as error:
                about = {"state": "failed", "error": f"{type(error).__name__}: {error}"[-2000:]}
            about |= {"slice": one.name, "where": where, "seconds": round(clock() - began, 1)}
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(about, ensure_ascii=False) + "\n")
            print(f"{one.name}: {about['state']} in {about['seconds']} s", flush=True)
            del found


def read(results: Path) -> list[Found]:
    """What was found so far; a last line that was cut short is left out."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def is_done(one: Slice, found: list[Found], where: str) -> bool:
    """Whether a slice needs no further turn: it is done, or has failed twice in a row."""
    states = [about["state"] for about in found if (about["slice"], about["where"]) == (one.name, where)]
    return states[-1:] == ["done"] or states[-2:] == ["failed", "failed"]


def in_a_process(device: str, toy: bool, folder: Path) -> Run:
    """Runs a slice in a process of its own: one that dies, or runs out of memory, takes nothing else along."""

    def run(one: Slice, seconds: float) -> Found:
        with tempfile.TemporaryDirectory() as temporary:
            into = Path(temporary) / "found.json"
            command = [sys.executable, __file__, "--device", device, "--slice", one.name, "--seconds", f"{seconds}"]
            command += ["--into", str(into), "--folder", str(folder), *["--toy"] * toy]
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
            if done.returncode or not into.is_file():
                raise RuntimeError(f"ended with {done.returncode}: {done.stderr[-1500:]}")
            found: Found = json.loads(into.read_text(encoding="utf-8"))
            return found

    return run


def name_of(device: str) -> str:
    """The device, and what works on it."""
    name = torch.cuda.get_device_name() if device == "cuda" else device
    return f"{name}, torch {torch.__version__}"


def main() -> None:
    """Work off the slices, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--budget", type=float, default=15.0, metavar="MINUTES", help="of all slices together (default 15)"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("gpu.jsonl"), help="file of lines of JSON (default gpu.jsonl)"
    )
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"), help="checkpoints and logs of what is trained")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu with --toy")
    parser.add_argument("--toy", action="store_true", help="small models, for a try on a CPU")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="slices whose names begin so")
    parser.add_argument("--write", type=Path, metavar="DOCS", help="the folder of the pages that get the rows")
    parser.add_argument("--list", action="store_true", help="say what there is and what is done")
    parser.add_argument("--slice", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    slices = [one for one in (TOYS if given.toy else SLICES)
              if not given.only or one.name.startswith(tuple(given.only))]  # fmt: skip
    if given.slice:
        hush()
        (one,) = (one for one in slices if one.name == given.slice)
        found = one.work(torch.device(given.device), given.seconds, given.folder.resolve())
        given.into.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
        return
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: expected a GPU that PyTorch sees; --device cpu --toy tries the command on a CPU.")
    where = name_of(given.device)
    if given.list:
        for one in slices:
            print(
                f"{'done' if is_done(one, read(given.results), where) else 'open'}  {one.minutes:4.1f} min  {one.name}"
            )
        return
    os.environ.setdefault("LIGHTNING_DP_DATA", str(Path("data").resolve()))
    work_off(slices, given.results, where, given.budget, in_a_process(given.device, given.toy, given.folder.resolve()))
    if given.write:
        write_pages(given.write, read(given.results), where)


if __name__ == "__main__":
    main()
