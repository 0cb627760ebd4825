"""The command for a GPU, at toy size on the CPU: what it would run there, in which order, and what it makes of it."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Timer

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu")


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_slices_are_run_in_order_once_and_within_the_budget(gpu: Any, tmp_path: Path) -> None:
    clock, ran, results = Clock(), list[tuple[str, float]](), tmp_path / "results.jsonl"
    takes = {"a": 60, "b": 30, "c": 300, "d": 10, "t": 500}
    fails = {"b"}
    turns = iter([{"state": "again"}, {"state": "again"}, {}])

    def run(one: Any, seconds: float) -> dict[str, Any]:
        ran.append((one.name, seconds))
        clock.seconds += takes[one.name]
        if one.name in fails:
            raise MemoryError("too large\nfor this device")
        return next(turns) if one.name == "t" else {"found": one.name}

    slices = [
        gpu.Slice(name, minutes, lambda *_: {})
        for name, minutes in (("a", 1), ("b", 1), ("c", 5), ("d", 1), ("t", 9.5))
    ]
    gpu.work_off(slices, results, "one device", 6, run, clock)
    assert [name for name, _ in ran] == ["a", "b", "b", "d"]  # b once more, c would not end in time, and d still does
    assert ran[0][1] == 120.0
    ran.clear()
    with results.open("a") as file:
        file.write('{"slice": "c", "state": "do')  # the machine was taken away
        file.write("\n")
    gpu.work_off(slices, results, "one device", 25, run, clock)
    assert [name for name, _ in ran] == ["c", "t", "t"]  # t asks for turns as long as there is time
    ran.clear()
    gpu.work_off(slices, results, "one device", 30, run, clock)
    assert [name for name, _ in ran] == ["t"]
    gpu.work_off(slices, results, "one device", 60, run, clock)
    assert [name for name, _ in ran] == ["t"]  # all is done
    ran.clear()
    gpu.work_off(slices[:1], results, "another device", 60, run, clock)
    assert [name for name, _ in ran] == ["a"]
    assert all(seconds <= 570 for _, seconds in ran)


def test_what_a_gpu_would_run_is_there_at_toy_size(gpu: Any, tmp_path: Path) -> None:
    """Every kind of slice has a toy; what these find goes into the pages."""
    kinds = {one.name.split(":")[0] for one in gpu.SLICES}
    assert kinds - {"compiled"} == {one.name.split(":")[0] for one in gpu.TOYS}  # compiling takes too long for a test
    assert all(one.minutes <= gpu.LONGEST for one in gpu.SLICES)
    docs, results = tmp_path / "docs", tmp_path / "results.jsonl"
    shutil.copytree(ROOT / "docs", docs, ignore=shutil.ignore_patterns("*.png"))
    work = {one.name: one for one in gpu.TOYS if not one.name.startswith("train")}
    gpu.work_off(list(work.values()), results, "a toy", 60, lambda one, seconds: one.work(CPU, seconds, tmp_path))
    found = {about["slice"]: about for about in gpu.read(results)}
    assert {about["state"] for about in found.values()} == {"done"}, found
    rows = found["correct:toy"]["rows"]
    assert {(row["engine"], row["precision"]) for row in rows} == {
        (engine, how) for engine in ("ghost", "vmap") for how in ("highest", "high", "bf16")
    }
    assert all(row["holds"] for row in rows)
    assert all(row["holds"] for row in found["same weights:toy"]["rows"])
    of_forms = {row["form"]: row for row in found["forms:toy"]["rows"]}
    assert {"estimated", "slices", "groups", "patches"} <= set(of_forms)
    assert all(row["holds"] and row["ratio"] > 0 for row in of_forms.values())
    assert found["micro-batch:toy"]["size"] > 0
    gpu.write_pages(docs, gpu.read(results), "a toy")
    page = (docs / "performance.md").read_text(encoding="utf-8")
    assert "Measured on a toy." in page
    assert "| toy:4 | high | `ghost` |" in page
    assert "| toy:4 | high | `opacus-hooks` |" in page
    gpu.write_pages(docs, gpu.read(results), "a toy")
    assert (docs / "performance.md").read_text(encoding="utf-8") == page


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
def test_a_recipe_is_trained_in_turns(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after a turn and gone on with, it takes the steps that were planned, and ε is that of all of them.

    A step takes a second by the clock of this test.
    """
    elapsed, original = [0.0], Timer.on_train_batch_end

    def a_second(self: Timer, *given: Any, **options: Any) -> None:
        elapsed[0] += 1
        original(self, *given, **options)

    monkeypatch.setattr(Timer, "on_train_batch_end", a_second)
    monkeypatch.setattr(Timer, "time_elapsed", lambda self, stage="train": elapsed[0])
    (one,) = (one for one in gpu.TOYS if one.name.startswith("train"))
    first = one.work(CPU, 5.0, tmp_path)
    assert (first["state"], first["steps"], first["of"]) == ("again", 5, 12)
    last = one.work(CPU, 1000.0, tmp_path)
    assert (last["steps"], last["turn"][0]) == (12, 5)
    assert 0 < last["accuracy"] <= 1
    assert 7 < last["epsilon"] <= 8


def test_the_run_of_the_paper_is_written_where_it_is_looked_up(gpu: Any, tmp_path: Path) -> None:
    recipe = "recipes/cifar10/wrn_16_4_eps1.yaml"
    (tmp_path / recipe).parent.mkdir(parents=True)
    shutil.copy(ROOT / recipe, tmp_path / recipe)
    (tmp_path / "docs").mkdir()
    for page in ("performance.md", "reproduction.md"):
        shutil.copy(ROOT / "docs" / page, tmp_path / "docs" / page)
    about = {
        "slice": f"train:{recipe}", "state": "done", "where": "a GPU", "recipe": recipe, "accuracy": 0.571,
        "epsilon": 0.99991,
    }  # fmt: skip
    gpu.write_pages(tmp_path / "docs", [about], "a GPU")
    assert "| 57.10 %, ε = 0.9999, one run | 5.7e7 |" in (tmp_path / "docs/reproduction.md").read_text(encoding="utf-8")
    head = (tmp_path / recipe).read_text(encoding="utf-8")
    assert "# obtained  val/accuracy 57.10 %, ε = 0.9999, one run\n#           a GPU; by: uv run" in head
    assert "not run" not in head
