"""The rows that ``benchmarks/gpu.py`` writes into docs/performance.md, docs/reproduction.md and a recipe's header."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

Found = dict[str, Any]
MARKS = ("<!-- gpu.py: begin -->", "<!-- gpu.py: end -->")


def write_pages(docs: Path, found: list[Found], where: str) -> None:
    """Put what was found on this device into the pages; of a slice that was run twice, the last time counts.

    Args:
        docs: the folder of ``performance.md`` and ``reproduction.md``; the recipes are in the folder beside it.
        found: lines of the results.
        where: the device by name.
    """
    last = {about["slice"]: about for about in found if about["where"] == where and about["state"] == "done"}
    page = docs / "performance.md"
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n{tables(last, found, where)}\n{MARKS[1]}{after}", encoding="utf-8")
    for about in last.values():
        if about["slice"].startswith("train:"):
            write_obtained(docs, about, where)


def tables(last: dict[str, Found], found: list[Found], where: str) -> str:
    """What is right, how fast it is, which micro-batch fits, where the time goes, and what did not run."""

    def of(kind: str) -> list[Found]:
        return [about for name, about in last.items() if name.startswith(f"{kind}:")]

    parts = [f"Measured on {where}."]
    if of("correct") or of("same weights"):
        parts += ["| what is compared | how | largest difference | holds |\n|---|---|--:|---|" + "".join(
            f"\n| {about['model']} | {row.get('engine', '')}{row.get('style', '')} "
            f"{row.get('precision', 'CPU and device, one seed')} "
            f"| {row['error'] if isinstance(row['error'], str) else format(row['error'], '.0e')} "
            f"| {'yes' if row.get('holds') else '**no**'} |"
            for about in of("correct") + of("same weights") for row in about["rows"])]  # fmt: skip
    if of("ratio"):
        parts += ["| model:examples(:views) | precision | engine | time ÷ no privacy | memory ÷ | ms an example | error |\n"
                  "|---|---|---|--:|--:|--:|--:|" + "".join(
            f"\n| {about['case']} | {about['precision']} | `{row['engine']}` | {_cells(row)} |"
            for about in of("ratio") for row in about["rows"])]  # fmt: skip
    if of("forms"):
        parts += ["| model | form | layers | time ÷ estimated forms | error | holds |\n|---|---|--:|--:|--:|---|" + "".join(
            f"\n| {about['model']} | `{row['form']}` | {row['layers']} | {row['ratio']:.2f} | {row['error']:.0e} "
            f"| {'yes' if row['holds'] else '**no**'} |"
            for about in of("forms") for row in about["rows"])]  # fmt: skip
    if of("micro-batch"):
        parts += ["| model | views | examples by rule of thumb | that fit | s to find it |\n|---|--:|--:|--:|--:|" + "".join(
            f"\n| {a['model']} | {a['views']} | {a['rule_of_thumb']} | {a['size']} | {a['seconds']:.1f} |"
            for a in of("micro-batch"))]  # fmt: skip
    for about in of("profile"):
        rows = "".join(f"\n| `{row['name']}` | {row['calls']} | {100 * row['part']:.0f} % |" for row in about["rows"])
        parts += [
            f"`{about['case']}`, a micro-batch with `ghost`: {about['launches']} kernels, {about['waits']} waits of the host.",
            f"| kernel | calls | time |\n|---|--:|--:|{rows}",
        ]
    for about in of("compiled"):
        rows = "".join(f"\n| {row['pass']} | {row['ratio']:.2f} |" for row in about["rows"])
        took = about["seconds to compile"]
        parts += [
            f"Three convolutions, {about['examples']} examples; compiling took {took:.0f} s.",
            f"| pass | time ÷ no privacy |\n|---|--:|{rows}",
        ]
    failed = {
        about["slice"]: about["error"] for about in found if about["where"] == where and about["state"] == "failed"
    }
    parts += [f"- `{name}` did not run: {error.splitlines()[-1]}" for name, error in failed.items() if name not in last]
    return "\n\n".join(parts)


def _cells(row: Found) -> str:
    if row["ratio"] is None:
        return f"– | – | – | {row['error']}"
    memory = "–" if row["peak_memory_ratio"] is None else f"{row['peak_memory_ratio']:.2f}"
    error = row["error"] if isinstance(row["error"], str) else f"{row['error']:.0e}"
    spread = f"{row['ratio']:.2f} ({row['ratio_min']:.2f}–{row['ratio_max']:.2f})"
    return f"{spread} | {memory} | {row['milliseconds_per_example']:.3f} | {error}"


def write_obtained(docs: Path, about: Found, where: str) -> None:
    """The accuracy of a run, in the row of docs/reproduction.md and in the recipe's header."""
    name = Path(about["recipe"]).stem
    text = f"{100 * about['accuracy']:.2f} %, ε = {about['epsilon']:.4f}, one run"
    page = docs / "reproduction.md"
    row = re.compile(rf"^(\| `{re.escape(name)}` \| .* \| )not run( \| [^|]* \|)$", flags=re.MULTILINE)
    rows, found = row.subn(rf"\g<1>{text}\g<2>", page.read_text(encoding="utf-8"))
    if not found:  # a toy, or there already
        return
    page.write_text(rows, encoding="utf-8")
    recipe = docs.parent / about["recipe"]
    head = recipe.read_text(encoding="utf-8")
    said = f"# obtained  val/accuracy {text}\n#           {where}; by: uv run python benchmarks/gpu.py"
    recipe.write_text(head.replace("# obtained  not run: needs a GPU", said, 1), encoding="utf-8")
