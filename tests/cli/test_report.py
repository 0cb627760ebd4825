"""``lightning-dp report``: what runs wrote is what is drawn, and logs that are broken or do not match are named."""

from __future__ import annotations

import itertools
import json
import math
import re
from base64 import b64decode
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_dp import DifferentialPrivacy, ExponentialMovingAverage
from lightning_dp.cli.main import main
from lightning_dp.reporting import figures
from lightning_dp.reporting.facts import TASKS
from lightning_dp.reporting.runs import ReportError, read_runs
from tests.conftest import loader, regressor, trainer

PNG = b"\x89PNG\r\n\x1a\n"


def logs(folder: Path, epsilon: float | None = 2.9, last: float = 0.61, size: int = 50000, **changes: Any) -> Path:
    """The files that a run of three validations leaves behind."""
    folder.mkdir(parents=True)
    lines = ["epoch,step,dp/epsilon,val/accuracy"]
    lines += [f"0,{step},{'' if epsilon is None else epsilon * (step + 1) / 30}," for step in range(9, 30, 10)]
    lines += [f"0,{step},,{accuracy}" for step, accuracy in ((9, 0.4), (19, 0.5), (29, last))]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    (folder / "hparams.yaml").write_text("dp:\n  delta: 1.0e-05\n" if epsilon is not None else "{}\n")
    spent = {"epsilon": epsilon, "delta": 1e-5, "dataset_size": size, "target_epsilon": 3.0, "simulation": None}
    spent |= {"noise_multiplier": 2.0, "sampling_probability": 0.08, "steps": 30, "caveats": ["a <caveat>"], **changes}
    if epsilon is not None:
        (folder / "privacy.json").write_text(json.dumps(spent))
    return folder


def test_pictures_and_one_page_that_needs_no_other_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        logs(tmp_path / "a"),
        logs(tmp_path / "b" / "version_0", None),
        logs(tmp_path / "c", 400.0, simulation="SIMULATION"),
    ]
    words = [str(runs[0]), str(runs[1].parent), str(runs[2]), "--beside", "cifar10", "--out", str(tmp_path / "out")]
    main(["report", *words])
    pictures = {path.stem: path.read_bytes() for path in (tmp_path / "out").glob("*.png")}
    assert set(pictures) == {"accuracy", "budget", "validation"}
    assert all(content.startswith(PNG) for content in pictures.values())
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    embedded = [b64decode(found) for found in re.findall(r"data:image/png;base64,([^\"]+)", page)]
    assert sorted(embedded) == sorted(pictures.values())
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    assert "0.6100" in page
    assert "2.90" in page
    assert "∞ (no privacy)" in page
    assert "SIMULATION, not private" in page
    assert "a &lt;caveat&gt;" in page
    assert "arXiv 2204.13650" in page
    assert "index.html and 3 pictures" in capsys.readouterr().out


def test_what_is_drawn_is_what_was_logged(tmp_path: Path) -> None:
    (run,) = read_runs([logs(tmp_path / "a")], "val/accuracy")
    assert run.series["val/accuracy"] == [(10, 0.4), (20, 0.5), (30, 0.61)]
    assert run.series["dp/epsilon"][-1] == (30, pytest.approx(2.9))
    assert (run.epsilon, run.averaged, run.is_simulation) == (2.9, None, False)
    (tmp_path / "a" / "config.yaml").write_text("class_path: lightning_dp.ExponentialMovingAverage")
    assert read_runs([tmp_path / "a"], "val/accuracy")[0].averaged is True
    spent = {"epsilon": "inf", "delta": 1e-5, "dataset_size": 50000}  # as privacy.json says that there was no noise
    (tmp_path / "a" / "privacy.json").write_text(json.dumps(spent))
    assert read_runs([tmp_path / "a"], "val/accuracy")[0].epsilon == math.inf


TRACES: dict[str, Any] = {
    "dp/epsilon in the metrics": lambda folder: (folder / "hparams.yaml").unlink(),
    "the plan in hparams.yaml": lambda folder: (folder / "metrics.csv").write_text("step,val/accuracy\n9,0.4\n"),
    "nothing says": lambda folder: (
        (folder / "hparams.yaml").unlink(),
        (folder / "metrics.csv").write_text("step,val/accuracy\n9,0.4\n"),
    ),
    "the callback in config.yaml": lambda folder: (
        (folder / "hparams.yaml").unlink(),
        (folder / "metrics.csv").write_text("step,val/accuracy\n9,0.4\n"),
        (folder / "config.yaml").write_text("class_path: lightning_dp.DifferentialPrivacy"),
    ),
}


@pytest.mark.parametrize("trace", list(TRACES))
def test_a_run_whose_statement_is_missing_has_an_unknown_epsilon(trace: str, tmp_path: Path) -> None:
    folder = logs(tmp_path / "a")
    (folder / "privacy.json").unlink()
    TRACES[trace](folder)
    (run,) = read_runs([folder], "val/accuracy")
    assert math.isnan(run.epsilon)
    main(["report", str(folder), "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "ε not known: privacy.json is missing" in page
    assert "∞" not in page


def test_a_run_is_without_privacy_if_its_settings_show_it_or_it_is_said(tmp_path: Path) -> None:
    module = regressor()
    module.save_hyperparameters({"lr": 0.1})
    trainer(logger=CSVLogger(tmp_path, name="plain"), log_every_n_steps=1).fit(module, loader(), loader())
    (run,) = read_runs([tmp_path / "plain"], "val/loss")
    assert run.epsilon == math.inf
    trainer(logger=CSVLogger(tmp_path, name="bare"), log_every_n_steps=1).fit(regressor(), loader(), loader())
    assert math.isnan(read_runs([tmp_path / "bare"], "val/loss")[0].epsilon)
    assert read_runs([], "val/loss", [tmp_path / "bare"])[0].epsilon == math.inf
    words = [str(tmp_path / "plain"), "--without-privacy", str(tmp_path / "bare"), "--metric", "val/loss"]
    main(["report", *words, "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "index.html").read_text(encoding="utf-8").count("∞ (no privacy)") == 2
    with pytest.raises(ReportError, match=r"--without-privacy .*private: expected a run without privacy"):
        read_runs([], "val/accuracy", [logs(tmp_path / "private")])


def test_a_real_run_with_both_validations_is_drawn_from_what_it_wrote(tmp_path: Path) -> None:
    seen: list[tuple[int, float, float]] = []

    class Watch(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
            if not trainer.sanity_checking:
                found = trainer.callback_metrics
                seen.append((trainer.global_step, float(found["val/loss"]), float(found["val/loss_raw"])))

    private, average = DifferentialPrivacy(noise_multiplier=1.0), ExponentialMovingAverage(0.9, validate_raw=True)
    options = {"max_steps": 6, "val_check_interval": 2, "check_val_every_n_epoch": None, "log_every_n_steps": 1}
    fit = trainer(private, average, Watch(), logger=CSVLogger(tmp_path, name="tiny"), **options)
    fit.fit(regressor(), loader(), loader())
    (run,) = read_runs([tmp_path / "tiny"], "val/loss")
    assert [step for step, _ in run.series["val/loss"]] == [2, 4, 6] == [step for step, _, _ in seen]
    assert [value for _, value in run.series["val/loss"]] == pytest.approx([averaged for _, averaged, _ in seen])
    assert [value for _, value in run.series["val/loss_raw"]] == pytest.approx([raw for *_, raw in seen])
    assert [step for step, _ in run.series["dp/epsilon"]] == [1, 2, 3, 4, 5, 6]
    assert run.epsilon == private.statement().epsilon == pytest.approx(run.series["dp/epsilon"][-1][1])

    main(["report", str(tmp_path / "tiny"), "--metric", "val/loss", "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "<th>val/loss_raw, last</th><th>ε ≤</th>" in page
    assert f"<td>{seen[-1][1]:.4f}</td><td>{seen[-1][2]:.4f}</td>" in page


def drawn(draw: Any) -> Any:
    figure = Figure()
    draw(figure.add_subplot())
    return figure.axes[0]


def test_both_validations_are_two_lines_of_one_colour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_png", drawn)
    folder = logs(tmp_path / "a")
    rows = (folder / "metrics.csv").read_text().splitlines()
    both = [rows[0] + ",val/accuracy_raw", *(f"{row},{0.3 if index > 2 else ''}" for index, row in enumerate(rows[1:]))]
    (folder / "metrics.csv").write_text("\n".join(both) + "\n")
    averaged, raw = figures.validation_by_step(read_runs([folder], "val/accuracy"), "val/accuracy").lines
    assert (averaged.get_linestyle(), raw.get_linestyle()) == ("-", "--")
    assert averaged.get_color() == raw.get_color()
    assert list(raw.get_ydata()) == [0.3, 0.3, 0.3]
    assert [line.get_label().split("(")[1] for line in (averaged, raw)] == ["averaged weights)", "weights as trained)"]


@pytest.mark.parametrize("most", [1.5, 8.0, 60.0, 5000.0])
def test_the_numbers_on_the_axis_of_epsilon_do_not_overlap(
    most: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = read_runs([logs(tmp_path / "a", 1.0), logs(tmp_path / "b", most)], "val/accuracy")
    monkeypatch.setattr(figures, "_png", drawn)
    axes = figures.accuracy_against_epsilon(runs, "val/accuracy", ())
    axes.figure.set_size_inches(8, 5)
    FigureCanvasAgg(axes.figure).draw()
    shown = [tick.label1 for tick in (*axes.xaxis.get_major_ticks(), *axes.xaxis.get_minor_ticks())]
    boxes = sorted((label.get_window_extent().intervalx for label in shown if label.get_text()), key=min)
    boxes = [box for box in boxes if axes.bbox.x0 <= sum(box) / 2 <= axes.bbox.x1]
    assert boxes
    assert all(left[1] < right[0] for left, right in itertools.pairwise(boxes))


def test_logs_of_other_loggers_are_told_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run-1.wandb").touch()
    with pytest.raises(ReportError, match=r"has no metrics.csv.*Weights & Biases or TensorBoard.*logger=\[CSVLogger"):
        read_runs([tmp_path], "val/accuracy")


def broken(tmp_path: Path, how: str) -> list[Path]:
    good = logs(tmp_path / "good")
    if how == "empty":
        (tmp_path / "empty").mkdir()
        return [tmp_path / "empty"]
    if how == "two":
        logs(tmp_path / "two" / "version_0"), logs(tmp_path / "two" / "version_1")
        return [tmp_path / "two"]
    if how == "two statements":
        (good / "privacy-2.json").write_text((good / "privacy.json").read_text())
    if how == "torn statement":
        (good / "privacy.json").write_text('{"epsilon": 2.9, "del')
    if how == "torn metrics":
        (good / "metrics.csv").write_text("epoch,step,val/accuracy\n0,9,0.4\n0,1x,0.")
    if how == "no rows":
        (good / "metrics.csv").write_text("epoch,step,val/accuracy\n")
    return [good, logs(tmp_path / "other", size=1437)] if how == "other data" else [good]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("empty", r"empty has no metrics.csv: expected the folder of one run"),
        ("missing", r"nowhere has no metrics.csv"),
        ("two", r"two has 2 runs \(.*version_0, .*version_1\): expected the folder of one run"),
        ("two statements", r"good has 2 statements \(privacy.json, privacy-2.json\): expected one, that of the run"),
        ("torn statement", r"privacy.json is torn \(JSONDecodeError.*: expected the statement of a run"),
        ("torn metrics", r"metrics.csv is torn \(.*1x.*\): expected numbers"),
        ("no rows", r"metrics.csv: expected a column 'step' and at least one row"),
        ("other data", r"runs of different data sets \(.*good: 50000, .*other: 1437 training examples\)"),
    ],
)
def test_logs_that_cannot_be_drawn_are_named(how: str, message: str, tmp_path: Path) -> None:
    folders = [tmp_path / "nowhere"] if how == "missing" else broken(tmp_path, how)
    with pytest.raises(ReportError, match=message):
        read_runs(folders, "val/accuracy")


def test_an_unknown_column_and_a_missing_matplotlib_end_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(logs(tmp_path / "a"))
    with pytest.raises(SystemExit):
        main(["report", run, "--metric", "val/acc"])
    assert "metric='val/acc' is no column of" in (said := capsys.readouterr().err)
    assert "expected one of val/accuracy. Give --metric" in said

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(figures, "import_module", missing)
    with pytest.raises(SystemExit):
        main(["report", run])
    assert "pip install 'lightning-dp[report]'" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_published_accuracies_are_shares_and_name_their_source() -> None:
    for curves in TASKS.values():
        for curve in curves:
            assert curve.source.count("arXiv") == 1
            epsilons = [epsilon for epsilon, _ in curve.points]
            assert epsilons == sorted(set(epsilons))
            assert set(curve.unconfirmed) <= set(epsilons)
            assert all(0 < accuracy < 1 for _, accuracy in curve.points)
