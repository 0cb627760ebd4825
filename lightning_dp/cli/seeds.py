"""``lightning-dp fit --seeds K``: a recipe run K times, each in a process of its own, as mean ± deviation."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_dp.cli.recipe_files import expanded, fail
from lightning_dp.version import __version__

RESULT = "LIGHTNING_DP_RESULT"
"""The environment variable that names the file in which a run leaves its last metrics and its statement."""


def take_out(words: Sequence[str]) -> tuple[list[str], int | None, Path]:
    """A command line without ``--seeds`` and ``--seeds_file``, and what they say.

    Raises:
        SystemExit: ``--seeds`` is no number of at least 1, or ``fit`` is not what is run so often (exit code 2).

    Example:
        >>> take_out(["fit", "--recipe", "digits/cnn_eps8", "--seeds", "3"])[:2]
        (['fit', '--recipe', 'digits/cnn_eps8'], 3)
    """
    left: list[str] = []
    found = {"--seeds": "", "--seeds_file": "seeds.jsonl"}
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if option in found:
            found[option] = value if equals else next(rest, "none")
        else:
            left.append(word)
    if not found["--seeds"]:
        return left, None, Path(found["--seeds_file"])
    if not found["--seeds"].isdecimal() or int(found["--seeds"]) < 1:
        fail(f"--seeds {found['--seeds']}: expected how many runs to make, at least 1.")
    given = [word for word in left if word.split("=")[0] in ("--seed_everything", "--ckpt_path")]
    if left[0] != "fit" or given:
        fail(
            f"--seeds with {given[0] if given else left[0]}: expected fit from the beginning, with the seeds 0, 1, 2 ..."
        )
    return left, int(found["--seeds"]), Path(found["--seeds_file"])


def run(words: Sequence[str], seeds: int, file: Path) -> None:
    """Make the runs that ``file`` does not hold yet, one after the other, and print the table.

    Args:
        words: the command line, with ``fit`` first.
        seeds: K; the runs have ``--seed_everything`` 0 to K − 1.
        file: gets a line of JSON for each run. Those of the same command, files of the recipe and version are not made
            again, so what was interrupted goes on where it stopped.

    Raises:
        SystemExit: a run failed, with its exit code; what was finished before it is in ``file``.
    """
    key = _key(words)
    held = _held(file)
    for seed in range(seeds):
        if any(one["key"] == key and one["seed"] == seed for one in held):
            continue
        print(f"lightning-dp: seed {seed}, run {seed + 1} of {seeds}", flush=True)
        held.append({"key": key, "command": list(words), "seed": seed, **_one(words, seed)})
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(held[-1], ensure_ascii=False) + "\n")
    print(table([one for one in held if one["key"] == key and one["seed"] < seeds]))


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Mean ± sample standard deviation of each metric, what one run has spent, and what all of them have.

    Example:
        >>> print(table([{"metrics": {"val/accuracy": a}, "statement": None, "seconds": 2.0} for a in (0.5, 0.75)]))
        2 seeds, mean ± sample standard deviation (least to greatest):
          val/accuracy  0.6250 ± 0.1768 (0.5000 to 0.7500)
          seconds       2.0000 ± 0.0000 (2.0000 to 2.0000)
    """
    lines = [f"{len(runs)} seeds, mean ± sample standard deviation (least to greatest):"]
    columns = {name: [float(one["metrics"][name]) for one in runs] for name in runs[0]["metrics"]}
    columns["seconds"] = [one["seconds"] for one in runs]
    width = max(map(len, columns))
    for name, values in columns.items():
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        lines.append(
            f"  {name:<{width}}  {statistics.mean(values):.4f}{spread} ({min(values):.4f} to {max(values):.4f})"
        )
    statements = [one["statement"] for one in runs]
    if all(statements):
        lines.append(_spent(statements))
    return "\n".join(lines)


def is_waited_for() -> bool:
    """Whether a process that started this one waits for what it comes to."""
    return bool(os.environ.get(RESULT))


def left_by(metrics: dict[str, float], statement: dict[str, Any] | None) -> None:
    """Leave what a run has come to, where the process that started it looks."""
    text = json.dumps({"metrics": metrics, "statement": statement}, ensure_ascii=False)
    Path(os.environ[RESULT]).write_text(text, encoding="utf-8")


def _one(words: Sequence[str], seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "lightning_dp", *words, "--seed_everything", str(seed)]
        started = time.perf_counter()
        done = subprocess.run(command, env={**os.environ, RESULT: str(result)}, check=False)
        if done.returncode or not result.is_file():
            fail(
                f"--seeds: the run with seed {seed} ended with {done.returncode} and without a result. The same command "
                "goes on."
            )
        return {**json.loads(result.read_text(encoding="utf-8")), "seconds": round(time.perf_counter() - started, 1)}


def _key(words: Sequence[str]) -> str:
    """Names a command by its words, the text of its files, and the version."""
    text = hashlib.sha256(__version__.encode())
    for word in expanded(words):
        path = Path(word.partition("=")[2] or word)
        text.update(word.encode() + (path.read_bytes() if path.suffix in (".yaml", ".yml") and path.is_file() else b""))
    return text.hexdigest()[:16]


def _held(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (ValueError, UnicodeDecodeError) as error:
        fail(f"--seeds_file {file}: expected lines of JSON that --seeds has written ({error}).")


def _spent(statements: Sequence[dict[str, Any]]) -> str:
    from lightning_dp.accounting import epsilon_bound
    from lightning_dp.accounting.risk import round_up
    from lightning_dp.cli.search import phase_in

    delta = max(float(one["delta"]) for one in statements)
    one = f"Each run is (ε ≤ {round_up(max(float(one['epsilon']) for one in statements))}, δ = {delta:g})-DP by itself"
    if len(statements) == 1:
        return f"{one}."
    try:
        bound = epsilon_bound([phase_in(said) for said in statements], delta).epsilon
    except ValueError:
        both = "publishing several costs their composition, which lightning_dp.accounting.epsilon_bound computes"
    else:
        both = "on the same data publishing all of them, or the best, costs their composition: " + (
            f"ε ≤ {round_up(bound)} at the same δ" if math.isfinite(bound) else "no bound"
        )
    return f"{one}; {both}."
