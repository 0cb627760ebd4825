"""``lightning-dp report``: what runs wrote is what is drawn, and logs that are broken or do not match are named."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import zlib
from base64 import b64decode, b85decode
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import CSVLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_dp import DifferentialPrivacy, ExponentialMovingAverage
from lightning_dp.cli.main import main
from lightning_dp.reporting import figures, page, wandb_files
from lightning_dp.reporting.facts import TASKS
from lightning_dp.reporting.logs import ReportError
from lightning_dp.reporting.runs import read_runs
from tests.conftest import loader, regressor, trainer

EVENTS = {
    "tensorboard": (
        "c-r$|fPjCKJmzwGe|L(lJABJgiZ`h!F*8rkwJbHS#L6g0k4vW{HLp0oC@DX&C`GThG&eV~s8X-ID6=HBNG}znDn2bUCp8`-Qlk2G"
        "p90ie&9^H9IL|RSgUuD-)Dq?r<l;&x&`&KW&dkZr6D=<<w{K#<vQY`DzCzIUFQ*eDT)illFc(i*Vvc@da&l==VsfSE*)wPC`jefH"
        "N<(!>@y-+GtU&1C<Kp3BO)bbz&JYDj3tvrGqYYKsCVkkOlb;E$RE|rAi#ac~+=+vOQHup+uopKMCl`Bha$-(mQSnd3*_%-O;R4et"
        "jKv?{?VFFZilX=<7NH)~A3#O+;@Ov^Q2a3sp##ky-<JM5jp`3(xKdPqfDA_Q$40hG^HBU@4$~@&;g4A}EgiO2Bv_&NBN(9`(;we7"
        "WbCyRne0*gk%Q2I=8xaApR1zyLxlsb6xAOfgHimkyZroq7pPX}NWEE{=U`gpw9L6oxg>%9C@x7XNzDZ&Nd1!3ijsI}Qg!0vU>9N$"
        "V&Y(QVgZSJad5G5fmu1t7E>IdW-_ciw3_p_DBMgFE+a0+3@u$rh%ASLkpN7k;49t6nbQkxt>7XsHEB}O5ddKE;X("
    ),
    "tensorboardX": (
        "c-oU-fPlsI-b$Q5PNc@y9lqr##hX-=n3<>NT9%quVrAsV7RajrRj2uOWdJ9?MjBY10H>BPmmn8cN`ZcAL2+hIex7J~dAWVl{3)4A"
        "Q1umpwtqQA(%|YvxrDiR$`W(*6O)rmixQJ7MbDl&V>h|wx4kq}hZOHTVNS7hxDGxp9xm3@g8bwRQINEIN=O2VWBOo9g|Rs1yS>eB"
        "J5?0N+(xL!bPQ0DeXj%OZ4}1{WWaTxImWKWRTafC`7ouj7>=1W)6!w;ox6-Ej=7FdkLj3i8Z!2Ov^RW1ag1grTnCzC5;m_cb%82%"
        "j?|mQsgMO#DyL=6Wy&Q9bWCwcVo7Q)Fjn<TQY%X0i%WBJ6N@UH_&C^wScI537@b%^;$9qFY+PVg&oUh`N2r+$D-W&ad{quN(}c^2"
        "i!nn>R}v!2;b0^HQz`gLw{hn5LR%}i2u#iQ8&dlKJ42=D"
    ),
}
"""What a SummaryWriter of each wrote, compressed."""
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
    assert re.search(r"Made on 20\d\d-\d\d-\d\d, \d\d:\d\d UTC by lightning_dp \d", page)
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
    assert (tmp_path / "out" / "index.html").read_text(encoding="utf-8").count("∞ (no privacy)") == 2  # a cell of each
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
    assert "<th>val/loss_raw</th><th>ε ≤</th>" in page
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


DATA = "data: {{class_path: lightning_dp.data.{}, init_args: {{{}}}}}"


@pytest.mark.parametrize(
    ("size", "config", "why"),
    [
        (1437, None, "trained on 1,437 examples: expected runs on cifar10, of which there are 50,000 or 45,000"),
        (50000, DATA.format("DigitsDataModule", ""), "trained on digits: expected runs on cifar10"),
        (
            50000,
            DATA.format("FixedFeatures", "images: {class_path: a.CIFARDataModule, init_args: {name: cifar100}}"),
            "trained on cifar100",
        ),
        (None, DATA.format("DigitsDataModule", ""), "trained on digits"),
    ],
)
def test_published_figures_of_another_data_set_are_refused(
    size: int | None, config: str | None, why: str, tmp_path: Path
) -> None:
    run = logs(tmp_path / "a", None if size is None else 2.9, size=size or 0)
    if config is not None:
        (run / "config.yaml").write_text(config)
    with pytest.raises(ReportError, match=rf"--beside cifar10: .*a was {why}.*Leave --beside out"):
        read_runs([run], "val/accuracy", beside=("cifar10", TASKS["cifar10"]))


def test_the_data_set_of_a_run_is_its_name_before_its_size(tmp_path: Path) -> None:
    run = logs(tmp_path / "a", size=40000)  # of CIFAR-10, with more held out than the paper did
    (run / "config.yaml").write_text(DATA.format("CIFARDataModule", ""))
    assert read_runs([run], "val/accuracy", beside=("cifar10", TASKS["cifar10"]))[0].data == "cifar10"
    unknown = logs(tmp_path / "b", None)
    main(["report", str(unknown), "--beside", "cifar10", "--out", str(tmp_path / "out")])
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "<tr><th>data set</th><td>not known</td></tr>" in page


def test_the_page_says_when_by_what_of_what_and_what_epsilon_means(tmp_path: Path) -> None:
    about = {"begun": "2026-11-30T12:00:00+00:00", "versions": {"torch": "2.15.0"}, "module": {"class": "mine.Net"}}
    facts = {
        "expected_batch_size": 4096,
        "clip_norm": 1.0,
        "neighbouring_relation": "add/remove one example",
        "unit": "patient",
    }
    risk = {"mu": 1.7, "tpr_at_fpr": {"0.001": 0.0588}}
    run = logs(tmp_path / "a", run=about, version="0.1.9", state="interrupted", risk=risk, **facts)
    (read,) = read_runs([run], "val/accuracy")
    text = page.page([read], "val/accuracy", {}, (), "Made on 1 December")
    for said in (
        "Made on 1 December",
        "lightning_dp 0.1.9, torch 2.15.0",
        "2026-11-30 12:00:00 UTC",
        "mine.Net",
    ):
        assert said in text
    for name, fact in {"examples N": "50,000", "expected batch B": "4,096", "clip norm C": "1"}.items():
        assert f"<th>{name}</th><td>{fact}</td>" in text
    assert "the data of one patient" in text
    assert "<td>2.90</td><td>1e-05</td><td>5.9 % of those who were there</td><td>until it was interrupted</td>" in text


def real_events(folder: Path, kind: str) -> Path:
    """A file that TensorBoard or tensorboardX wrote: ε and accuracy three times, a text and a histogram."""
    folder.mkdir(parents=True)
    (folder / "events.out.tfevents.1.host").write_bytes(zlib.decompress(b85decode(EVENTS[kind])))
    return folder


@pytest.mark.parametrize("kind", ["tensorboard", "tensorboardX"])
def test_event_files_are_read(kind: str, tmp_path: Path) -> None:
    folder = real_events(tmp_path / "a" / "version_0", kind)
    assert math.isnan(read_runs([tmp_path / "a"], "val/accuracy")[0].epsilon)  # dp/epsilon says that it was private
    (folder / "privacy.json").write_text(json.dumps({"epsilon": 2.9, "delta": 1e-5, "dataset_size": 50000}))
    (run,) = read_runs([tmp_path / "a"], "val/accuracy")
    assert [step for step, _ in run.series["val/accuracy"]] == [10, 20, 30]
    assert [value for _, value in run.series["val/accuracy"]] == pytest.approx([0.4, 0.5, 0.61])
    assert run.series["dp/epsilon"][-1] == (30, pytest.approx(2.9))
    assert (run.epsilon, run.logger, set(run.series) - {"new"}) == (
        2.9,
        "TensorBoardLogger",
        {"val/accuracy", "dp/epsilon"},
    )
    if kind == "tensorboard":  # both ways of TensorBoard to write a number
        assert run.series["new"] == run.series["val/accuracy"]


def test_a_torn_event_file_is_named_and_one_that_is_still_written_is_read(tmp_path: Path) -> None:
    folder = real_events(tmp_path / "a", "tensorboard")
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    assert len(read_runs([folder], "val/accuracy")[0].series["val/accuracy"]) == 3
    for place in (0, 40, len(whole) // 2):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ReportError, match=r"events.out.tfevents.1.host is torn \(.*checksum.*Copy it again"):
            read_runs([folder], "val/accuracy")


def test_a_record_of_wandb_is_torn_or_needs_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run-1.wandb").write_bytes(b"no record at all")
    with pytest.raises(ReportError, match=r"run-1.wandb is torn \(it does not begin as such a record does\)"):
        read_runs([tmp_path], "val/accuracy")

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(wandb_files, "import_module", missing)
    with pytest.raises(ReportError, match=r"pip install 'lightning-dp\[wandb\]'"):
        read_runs([tmp_path], "val/accuracy")


def test_no_curve_hides_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "_png", drawn)
    runs = read_runs([logs(tmp_path / f"seed_{seed}") for seed in range(8)], "val/accuracy")
    assert [run.label for run in runs[:2]] == ["seed_0", "seed_1"]
    lines = figures.validation_by_step(runs, "val/accuracy").lines
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 8
    widths = [line.get_linewidth() for line in lines[3:]]
    assert widths == sorted(set(widths), reverse=True)
    assert [line.get_markersize() for line in lines] == sorted((line.get_markersize() for line in lines), reverse=True)
    curve, budget = figures.budget_by_step(runs).lines  # the same of all runs: one line, named after all
    assert curve.get_label() == ", ".join(run.label for run in runs)
    assert budget.get_label().startswith("budget ε = 3: seed_0, ")
    shown = figures.accuracy_against_epsilon(runs, "val/accuracy", ()).lines
    assert len({line.get_markersize() for line in shown}) > 4


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
MEASURE = """<script>addEventListener("load", () => { const root = document.documentElement; document.title = [
  [...document.images].every(one => one.complete && one.naturalWidth > 500 && one.clientWidth > 200),
  document.images.length, root.scrollWidth <= innerWidth, document.querySelector("h1").innerText].join("|") })</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; what the page holds is tested without one above")
@pytest.mark.parametrize("width", [420, 1200])
def test_a_browser_shows_every_picture_and_nothing_beyond_the_edge(width: int, tmp_path: Path) -> None:
    runs = [logs(tmp_path / "a_run_with_a_long_name" / str(size)) for size in range(5)]
    main(["report", *map(str, runs), "--out", str(tmp_path / "out")])
    file = tmp_path / "out" / "index.html"
    file.write_text(file.read_text(encoding="utf-8") + MEASURE, encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom")
    shown = subprocess.run(
        [str(CHROMIUM), *options, f"--window-size={width},900", file.as_uri()],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "<title>true|3|true|Report of 5 runs</title>" in shown


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
    if how == "other names":
        both = [good, logs(tmp_path / "other")]
        for folder, name in zip(both, ("cifar10", "cifar100"), strict=True):
            (folder / "config.yaml").write_text(DATA.format("CIFARDataModule", f"name: {name}"))
        return both
    return [good, logs(tmp_path / "other", size=1437)] if how == "other data" else [good]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "empty",
            r"empty has no metrics.csv, no events.out.tfevents and no run-\*.wandb: expected the folder of one run",
        ),
        ("missing", r"nowhere has no metrics.csv"),
        ("two", r"two has 2 runs \(.*version_0, .*version_1\): expected the folder of one run"),
        ("two statements", r"good has 2 statements \(privacy.json, privacy-2.json\): expected one, that of the run"),
        ("torn statement", r"privacy.json is torn \(JSONDecodeError.*: expected the statement of a run"),
        ("torn metrics", r"metrics.csv is torn \(.*1x.*\): expected numbers"),
        ("no rows", r"metrics.csv: expected a column 'step' and at least one row"),
        ("other data", r"runs of different data sets \(.*good: 50000, .*other: 1437 training examples\)"),
        ("other names", r"runs of different data sets \(.*good: cifar10, .*other: cifar100\)"),
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
    for task in TASKS.values():
        for curve in task.curves:
            assert curve.source.count("arXiv") == 1
            epsilons = [epsilon for epsilon, _ in curve.points]
            assert epsilons == sorted(set(epsilons))
            assert set(curve.unconfirmed) <= set(epsilons)
            assert all(0 < accuracy < 1 for _, accuracy in curve.points)
