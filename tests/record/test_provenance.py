"""A record says whose it is: when, by which versions, of which plan and module; and every logger gets the same one."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lightning_dp import DifferentialPrivacy
from lightning_dp.accounting import Ledger
from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.record.provenance import FORMAT, module_facts
from lightning_dp.record.written import digest_of, records_in
from tests.conftest import loader, regression_data, regressor, trainer
from tests.tracking.test_loggers import Client, Strict, WithoutServer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory .* exists and is not empty"),
]


def private(**options: Any) -> DifferentialPrivacy:
    return DifferentialPrivacy(**{"noise_multiplier": 1.0, "delta": 1e-3, "engine": "vmap", **options})


def read(path: Path | str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return found


def test_a_record_says_whose_it_is_and_all_that_its_numbers_follow_from(tmp_path: Path) -> None:
    before, first, module = datetime.now(UTC) - timedelta(seconds=1), private(), regressor()
    one = trainer(first, max_steps=3)
    one.fit(module, loader())
    one.save_checkpoint(tmp_path / "third.ckpt")
    record = read("privacy.json")
    run = record["run"]
    assert run["format"] == FORMAT
    assert before <= datetime.fromisoformat(run["begun"]) <= datetime.now(UTC)
    assert run["versions"]["torch"] == version("torch")
    assert run["versions"]["lightning"] == version("lightning")
    assert {run["fit"]} == record["fits"].keys()
    assert run["module"] == module_facts(module)
    assert run["plan"] == digest_of(record["plan"])
    assert first.ledger is not None
    assert record["ledger"] == json.loads(json.dumps(first.ledger.state_dict()))
    again = Ledger.resume(PrivacyPlan(**record["plan"]), record["ledger"])
    assert (again.plan, again.epsilon().epsilon) == (first.plan, record["epsilon"])

    second = private(noise_multiplier=2.0)
    trainer(second, max_steps=5).fit(regressor(), loader(), ckpt_path=tmp_path / "third.ckpt")
    later = read("privacy.json")
    assert (later["run"]["id"], later["run"]["module"]) == (run["id"], run["module"])
    assert later["run"]["fit"] not in record["fits"]
    assert later["run"]["plan"] != run["plan"]
    assert [phase["steps"] for phase in later["ledger"]["phases"]] == [3, 2]


def test_the_digest_of_a_module_is_of_its_parameters_and_not_of_their_values() -> None:
    same, one = module_facts(regressor(seed=1)), module_facts(regressor())
    assert same == one
    frozen = regressor()
    frozen.net[0].requires_grad_(False)
    others = [regressor(hidden=9), frozen, regressor().double()]
    digests = {module_facts(other)["digest"] for other in others} | {one["digest"]}
    assert len(digests) == 4

    class Renamed(type(regressor())):
        pass

    assert module_facts(Renamed())["class"].endswith("Renamed")
    assert module_facts(Renamed())["digest"] == one["digest"]
    lazy = regressor()
    lazy.net[0] = nn.LazyLinear(8)
    assert module_facts(lazy)["digest"] not in digests


@pytest.mark.parametrize("kind", ["none", "mlflow", "strict", "csv"])
def test_no_second_run_takes_the_place_of_the_first_ones_record(kind: str, tmp_path: Path) -> None:
    """In one folder, with every logger; each record is another run's, and each logger has the text of its run's record."""

    def run(steps: int) -> str | None:
        made: dict[str, Callable[[], Any]] = {
            "none": lambda: False,
            "mlflow": lambda: WithoutServer(Client()),
            "strict": Strict,
            "csv": lambda: CSVLogger(tmp_path, name="", version="same"),
        }
        logger = made[kind]()
        data = DataLoader(regression_data(), batch_size=16)
        trainer(private(), logger=logger, max_steps=steps, default_root_dir=tmp_path).fit(regressor(), data)
        return logger.client.artifacts["privacy.json"] if kind == "mlflow" else None

    told = [run(steps) for steps in (1, 2)]
    folder = {"csv": tmp_path / "same", "mlflow": Path()}.get(kind, tmp_path)
    texts = [path.read_text(encoding="utf-8") for path in records_in(folder)]
    assert [json.loads(text)["steps"] for text in texts] == [1, 2]
    assert len({json.loads(text)["run"]["id"] for text in texts}) == 2
    if kind == "mlflow":
        assert told == texts
