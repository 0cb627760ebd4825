"""Loggers that refuse a hyperparameter that changes, as MLflow does: resumes and second fits go on, and say all."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger
from lightning.pytorch.loggers.logger import Logger

from lightning_dp import DifferentialPrivacy
from lightning_dp.record.loggers import tell_plan
from tests.conftest import loader, regressor, trainer


class Strict(Logger):
    """A logger of somebody's own. A parameter that has a value keeps it, as in MLflow."""

    def __init__(self) -> None:
        self.params: dict[str, Any] = {}
        self.metrics: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        return "strict"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        for name, value in params.get("dp", {}).items():
            if self.params.setdefault(name, value) != value:
                raise ValueError(f"Changing param values is not allowed: {name}")

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics.append(dict(metrics))


class Client:
    """As much of MlflowClient as Lightning and this package use, with MLflow's rule for parameters."""

    def __init__(self) -> None:
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.artifacts: dict[str, str] = {}
        self.figures: dict[str, Any] = {}
        self.unreachable = False

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), **_: Any) -> None:
        for param in params:
            if self.params.setdefault(param.key, param.value) != param.value:
                raise ValueError(f"Changing param values is not allowed: {param.key}")

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        if self.unreachable:
            raise ConnectionError("no way to the server")
        self.tags[key] = value

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        self.artifacts[artifact_file] = text

    def log_figure(self, run_id: str, figure: Any, artifact_file: str) -> None:
        self.figures[artifact_file] = figure

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(info=SimpleNamespace(experiment_id="0"))

    def set_terminated(self, run_id: str, status: str) -> None:
        pass


class WithoutServer(MLFlowLogger):
    """Lightning's own logger, with a client that keeps everything here."""

    def __init__(self, client: Client) -> None:
        Logger.__init__(self)
        self.client = client
        self._checkpoint_callback, self._log_model = None, False
        self._initialized, self._prefix, self._log_batch_kwargs = True, "", {}

    @property
    def experiment(self) -> Any:
        return self.client

    @property
    def run_id(self) -> str:
        return "run"

    @property
    def save_dir(self) -> str:
        return "."

    def log_hyperparams(self, params: Any) -> None:
        self.client.log_batch(
            "run", params=[SimpleNamespace(key=key, value=str(value)) for key, value in params.items()]
        )

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass

    name = version = "run"


def private(**options: Any) -> DifferentialPrivacy:
    return DifferentialPrivacy(**{"noise_multiplier": 1.0, "delta": 1e-3, "engine": "vmap", **options})


def two_fits_and_a_resume(logger: Logger, tmp_path: Path) -> DifferentialPrivacy:
    """Other numbers of steps each time, and another σ after the resume."""
    first = private()
    one = trainer(first, logger=logger, max_steps=3)
    one.fit(regressor(), loader())
    one.fit_loop.epoch_loop.max_steps = 5
    one.fit(regressor(), loader())
    one.save_checkpoint(tmp_path / "fifth.ckpt")
    second = private(noise_multiplier=2.0)
    trainer(second, logger=logger, max_steps=8).fit(regressor(), loader(), ckpt_path=tmp_path / "fifth.ckpt")
    return second


def test_any_logger_that_refuses_changed_parameters_lets_a_run_be_resumed(tmp_path: Path) -> None:
    logger = Strict()
    two_fits_and_a_resume(logger, tmp_path)
    assert logger.params["delta"] == 1e-3
    assert not {"steps", "noise_multiplier", "world_size", "dataset_size", "engine"} & logger.params.keys()
    planned = [row["dp/plan/steps"] for row in logger.metrics if "dp/plan/steps" in row]
    assert planned == [3.0, 5.0, 8.0]
    assert all(row["dp/plan/dataset_size"] == 64.0 for row in logger.metrics if "dp/plan/dataset_size" in row)


def test_mlflow_gets_tags_and_the_statement_as_an_artifact(tmp_path: Path) -> None:
    client = Client()
    callback = two_fits_and_a_resume(WithoutServer(client), tmp_path)
    assert not client.params
    assert (client.tags["dp/steps"], client.tags["dp/steps_spent"], client.tags["dp/dataset_size"]) == ("8", "8", "64")
    assert client.tags["dp/statement"] == str(callback.statement())
    assert client.tags["dp/state"] == "ended"
    kept = json.loads(client.artifacts["privacy.json"])
    assert (kept["steps"], kept["epsilon"], kept["state"]) == (8, callback.statement().epsilon, "ended")


def test_a_run_that_is_killed_has_told_mlflow_an_upper_bound() -> None:
    seen: list[tuple[int, str, str]] = []

    class Watched(Client):
        def log_batch(self, run_id: str, metrics: Any = (), params: Any = (), **_: Any) -> None:
            pass

    class Module(type(regressor())):
        def on_train_batch_end(self, *_: Any) -> None:
            seen.append((self.global_step, client.tags["dp/steps_spent"], client.tags["dp/statement"]))

    client, callback = Watched(), private()
    trainer(callback, logger=WithoutServer(client), max_steps=4).fit(Module(), loader())
    assert [taken for taken, _, _ in seen] == [1, 2, 3, 4]
    assert all(int(steps) == 4 and said.startswith("still running, at most: (ε = ") for _, steps, said in seen)


def test_a_logger_that_cannot_be_reached_does_not_cost_the_statement() -> None:
    class Lost(Client):
        def log_text(self, *_: Any) -> None:
            self.unreachable = True
            raise ConnectionError("no way to the server")

    callback = private()
    with pytest.warns(UserWarning, match=r"WithoutServer did not take what was spent \(ConnectionError: no way"):
        trainer(callback, logger=WithoutServer(Lost()), max_steps=3).fit(regressor(), loader())
    assert json.loads(Path("privacy.json").read_text())["state"] == "ended"


def test_the_record_is_beside_the_logs_of_every_logger_that_has_a_folder(tmp_path: Path) -> None:
    loggers = [Strict(), CSVLogger(tmp_path, name="one"), CSVLogger(tmp_path, name="two")]
    callback = private()
    trainer(callback, logger=loggers, max_steps=3, default_root_dir=tmp_path / "root").fit(regressor(), loader())
    found = [tmp_path / "root", Path(loggers[1].log_dir), Path(loggers[2].log_dir)]
    assert {path.parent for path in tmp_path.rglob("privacy.json")} == set(found)
    assert {(folder / "privacy.json").read_text() for folder in found} == {(found[0] / "privacy.json").read_text()}


def test_loggers_that_take_new_values_get_the_whole_plan(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    for steps in (3, 4):
        tell_plan(SimpleNamespace(loggers=[logger]), {"steps": steps, "engine": "vmap"})
        assert f"steps: {steps}" in (Path(logger.log_dir) / "hparams.yaml").read_text()
