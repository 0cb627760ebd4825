"""What a run says on the screen: one panel before its first step, and one when it has ended."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.live import Live

from lightning_dp import DifferentialPrivacy
from lightning_dp.record import panel
from tests.conftest import Regressor, loader, trainer

ROWS = {"batch": "B = 4 of [bold]16[/]", "engine": "loop: a reason\nIt is slow.", "risk": ""}


def test_every_fact_of_the_plan_is_in_one_record_and_every_result_in_another(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    private = DifferentialPrivacy(epsilon=3.0, delta=1e-3, clip_norm=0.5)
    with caplog.at_level("INFO"):
        trainer(private, max_steps=3, default_root_dir=tmp_path).fit(Regressor(), loader())
    before, after = (text for text in caplog.messages if text.startswith("Differential privacy"))
    plan = private.plan
    assert plan is not None
    for fact in (
        "ε ≤ 3 at δ = 0.001",
        "add/remove one example",
        f"σ = {plan.noise_multiplier:.4g}, secret",
        "C = 0.5",
        f"B = {plan.expected_batch_size:g} expected",
        f"N = {plan.dataset_size}",
        f"q = {plan.sampling_probability:.4g}",
        "micro-batches of up to",
    ):
        assert fact in before
    assert re.search(r"^  steps +3$", before, re.MULTILINE)
    assert re.search(r"^  engine +ghost$", before, re.MULTILINE)
    statement = private.statement()
    assert str(statement) in after
    assert statement.in_words
    assert statement.in_words in after
    (record,) = tmp_path.rglob("privacy.json")
    assert str(record) in after
    assert not any(text.startswith("lightning_dp: e") for text in caplog.messages)


def test_a_record_that_was_not_written_is_not_named(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level("INFO"):
        private = DifferentialPrivacy(noise_multiplier=1.0)
        trainer(private, max_steps=1, fast_dev_run=True, default_root_dir=tmp_path).fit(Regressor(), loader())
    assert "training has ended" in caplog.text
    assert "privacy.json" not in caplog.text


def test_a_frame_says_what_the_lines_say() -> None:
    """And takes no bracket for markup; only spaces and the frame are added."""
    for columns in (60, 100):
        framed = panel.framed("Title", {name: fact for name, fact in ROWS.items() if fact}, columns)
        assert max(map(len, framed.splitlines())) <= columns
        assert "\x1b" not in framed
        words = [word for word in framed.split() if word.strip("│╭╮╰╯─")]
        assert words == panel.plain("Title", ROWS).split()


def test_who_silences_lightning_silences_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="lightning.pytorch"):
        panel.show("Title", ROWS)
    assert "Title" not in caplog.text


def test_a_frame_that_cannot_be_drawn_is_left_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    def too_old(*_: object) -> str:
        raise ImportError("rich")

    handler, log = logging.StreamHandler(Terminal()), panel.rank_zero_module.log
    monkeypatch.setenv("COLUMNS", "100")
    log.addHandler(handler)
    try:
        with caplog.at_level("INFO"):
            panel.show("Title", ROWS)
            monkeypatch.setattr(panel, "framed", too_old)
            panel.show("Title", ROWS)
    finally:
        log.removeHandler(handler)
    first, second = caplog.messages
    assert "│ engine" in first
    assert second == panel.plain("Title", {name: fact for name, fact in ROWS.items() if fact})


def test_it_is_written_above_a_bar_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler that was made before the bar gets its stream back."""
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    handler, log = logging.StreamHandler(stream), panel.rank_zero_module.log
    log.addHandler(handler)
    monkeypatch.setattr(log, "propagate", False)
    try:
        terminal = io.StringIO()
        console = Console(file=terminal, force_terminal=True, width=80)
        with Live("bar", console=console, auto_refresh=False):
            monkeypatch.setattr(log, "level", logging.INFO)
            panel.show("Title", ROWS)
            drawn = terminal.getvalue()
        assert "Title" in drawn
        assert "Title" not in stream.getvalue()
        assert handler.stream is stream
    finally:
        log.removeHandler(handler)


def test_the_first_command_of_the_readme_ends_well_in_a_terminal(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    found = re.search(r"uv run (lightning-dp fit .*)$", (root / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    few = ["max_steps=4", "val_check_interval=2", f"logger.init_args.save_dir={tmp_path}"]
    _, *arguments = found[1].split()
    command = [sys.executable, "-m", "lightning_dp", *arguments, *(f"--trainer.{one}" for one in few)]
    screen, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "50"}
    with subprocess.Popen(
        command, cwd=root, stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    ) as running:
        os.close(terminal)
        seen = b""
        try:
            while piece := os.read(screen, 65536):
                seen += piece
        except OSError:  # how Linux says that the terminal was closed
            pass
        finally:
            os.close(screen)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen.decode())
    assert running.returncode == 0, text
    assert "Traceback" not in text
    assert "Exception" not in text
    assert "Warning" not in text
    assert "val/accuracy_raw" in text
    first, last = text.index("Differential privacy: ε ≤ 8"), text.index("Differential privacy: training has ended")
    assert "│ engine" in text[first:last]
    assert "│ record" in text[last:]
    folded = re.sub(r"[\s│]", "", text[last:])  # the temporary folder's name is long
    assert "privacy.json" in folded
    assert "Lastvalidation,after4steps:val/accuracy=" in folded
