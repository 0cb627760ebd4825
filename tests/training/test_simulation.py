"""A simulation has the signal-to-noise ratio of the run it stands for, and says what it really spends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_dp import DifferentialPrivacy
from lightning_dp.accounting import Ledger, Phase, epsilon_bound
from lightning_dp.cli.main import main
from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.plan.simulation import as_if_real, simulated
from tests.conftest import loader, regressor, trainer
from tests.nearly import assert_nearly

RECIPES = Path(__file__).parents[2] / "recipes" / "digits"


def fitted(simulate: int = 1, ckpt_path: str | None = None, **options: Any) -> tuple[DifferentialPrivacy, L.Trainer]:
    dp = DifferentialPrivacy(epsilon=3.0, delta=1e-3, simulate=simulate)
    runs = trainer(dp, **options)
    runs.fit(regressor(), loader(batch_size=32), ckpt_path=ckpt_path)
    return dp, runs


def test_what_is_run_is_what_the_ledger_counts_and_no_target_is_claimed(tmp_path: Path) -> None:
    (real, _), (small, _) = fitted(), fitted(8, default_root_dir=str(tmp_path / "small"))
    assert_nearly(small.plan.noise_multiplier, real.plan.noise_multiplier / 8)
    assert_nearly(small.plan.sampling_probability, real.plan.sampling_probability / 8)
    spreads = [plan.noise_std / plan.expected_batch_size for plan in (small.plan, real.plan)]
    assert_nearly(*spreads)
    assert small.plan.steps == real.plan.steps
    assert_nearly(small.ledger.phases, (Phase(real.plan.noise_multiplier / 8, 32 / 64 / 8, 5),))
    spent = epsilon_bound(small.ledger.phases, 1e-3).epsilon
    assert real.statement().epsilon <= 3.0 < spent

    statement = small.statement()
    assert_nearly(statement.epsilon, spent)
    assert statement.target_epsilon is None
    assert str(statement).startswith("SIMULATION, NOT PRIVATE as the run it stands for: 5 steps at 1/8 of the batch")
    assert "ε = 3" not in str(statement)
    written = json.loads((tmp_path / "small" / "privacy.json").read_text())
    assert written["simulation"] == written["caveats"][0] == statement.simulation
    assert_nearly(written["epsilon"], spent)
    assert real.statement().simulation is None
    assert "SIMULATION" not in str(real.statement())


class Still(L.LightningModule):
    """A loss that no parameter changes: what moves them is noise, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(20000))
        self.drawn: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return 0.0 * self.weight.sum() + batch[0].sum() * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_the_noise_on_the_mean_gradient_stays_and_so_does_the_learning_rate() -> None:
    spreads = []
    for simulate in (1, 16):
        module = Still()
        dp = DifferentialPrivacy(noise_multiplier=2.0, delta=1e-3, simulate=simulate, engine="vmap")
        trainer(dp, max_steps=1).fit(module, loader(batch_size=32))
        spreads.append(float(module.weight.detach().std()))
    assert spreads[0] == pytest.approx(2.0 / 32, rel=0.03)
    assert spreads[1] == pytest.approx(2.0 / 32, rel=0.03)


def test_the_number_of_steps_stays_when_epochs_bound_it() -> None:
    runs = [fitted(simulate, max_steps=-1, max_epochs=2)[1] for simulate in (1, 8)]
    assert runs[0].global_step == runs[1].global_step == 4


def test_a_resumed_simulation_goes_on_as_planned(tmp_path: Path) -> None:
    whole = fitted(3, max_steps=6)[0]
    _, half = fitted(3, max_steps=4)
    half.save_checkpoint(tmp_path / "half.ckpt")
    half_sigma = fitted(3, max_steps=4)[0].plan.noise_multiplier
    resumed, _ = fitted(3, max_steps=6, ckpt_path=str(tmp_path / "half.ckpt"))
    assert resumed.ledger.steps == 6
    assert len(resumed.ledger.phases) == 1
    assert resumed.plan.noise_multiplier == pytest.approx(half_sigma)
    assert_nearly(resumed.plan.sampling_probability, whole.plan.sampling_probability)
    assert resumed.statement().simulation is not None


def test_a_real_run_does_not_go_on_from_a_simulation_within_its_budget(tmp_path: Path) -> None:
    _, run = fitted(8)
    run.save_checkpoint(tmp_path / "simulated.ckpt")
    with pytest.raises(ValueError, match="epsilon"):
        fitted(1, max_steps=9, ckpt_path=str(tmp_path / "simulated.ckpt"))


@pytest.mark.parametrize("simulate", [2, 3, 7, 10, 48])
def test_planning_sees_through_a_simulation(simulate: int) -> None:
    plan = PrivacyPlan(
        noise_multiplier=3.7, clip_norm=1.0, delta=1e-5, dataset_size=50000, expected_batch_size=4099, steps=9
    )
    ledger = Ledger(simulated(plan, simulate))
    ledger.charge()
    (phase,) = Ledger.resume(plan, as_if_real(ledger.state_dict(), simulate)).phases
    assert_nearly(phase.sampling_probability, plan.sampling_probability)
    assert_nearly(phase.noise_multiplier, plan.noise_multiplier)
    assert simulated(plan, 1) is plan


@pytest.mark.parametrize("options", [{"secure": True}, {"max_batch_size": 56}], ids=["secure", "max_batch_size"])
def test_what_serves_a_guarantee_alone_is_not_simulated(options: dict[str, Any], tmp_path: Path) -> None:
    """The grid of secure noise and the bound on a draw: at 1/S of the noise δ could often not pay for them."""

    def run(steps: int, ckpt_path: Path | None = None) -> tuple[DifferentialPrivacy, L.Trainer]:
        dp = DifferentialPrivacy(noise_multiplier=2.0, delta=1e-3, simulate=8, **options)
        runs = trainer(dp, max_steps=steps)
        runs.fit(regressor(), loader(batch_size=16), ckpt_path=ckpt_path)
        return dp, runs

    small, runs = run(4)
    assert_nearly(small.plan.noise_multiplier, 2.0 / 8)
    assert (small.plan.resolution, small.plan.max_batch_size, small.plan.target_epsilon) == (None, None, None)
    statement = small.statement()
    assert statement.noise == "Gaussian noise in floating point"
    assert_nearly(statement.epsilon, epsilon_bound(small.ledger.phases, 1e-3).epsilon)
    assert statement.epsilon < float("inf")
    assert str(statement).startswith("SIMULATION, NOT PRIVATE")
    runs.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(6, tmp_path / "half.ckpt")
    assert_nearly(resumed.ledger.phases, (Phase(2.0 / 8, 16 / 64 / 8, 6),))
    with pytest.raises(ValueError, match="expected"):  # what is impossible for the run simulated is still refused
        DifferentialPrivacy(noise_multiplier=0.0, simulate=8, secure=True)


def test_impossible_simulations_are_refused() -> None:
    with pytest.raises(ValueError, match=r"simulate=0: expected a whole number of at least 1"):
        DifferentialPrivacy(epsilon=1.0, simulate=0)
    with pytest.raises(ValueError, match=r"simulate=33 with expected_batch_size=32: expected at least one example"):
        fitted(33)


def test_any_recipe_can_be_simulated_from_the_command_line(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    small = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "1", "--trainer.enable_progress_bar", "false"]
    with caplog.at_level("INFO"):
        main(["fit", "--config", str(RECIPES / "cnn_eps8.yaml"), *small, "--simulate", "4"])
    (statement,) = tmp_path.rglob("privacy.json")
    assert "cnn_eps8_simulated_4" in str(statement)
    written = json.loads(statement.read_text())
    assert written["simulation"].startswith("SIMULATION, NOT PRIVATE")
    assert written["epsilon"] > 8
    shown = caplog.text + capsys.readouterr().err
    assert shown.count("NOT PRIVATE") >= 2, "when it starts and when it ends"
    assert "dp/simulation" in (statement.parent / "metrics.csv").read_text().splitlines()[0]

    with pytest.raises(SystemExit, match=r"--simulate 4: expected a recipe with DifferentialPrivacy"):
        main(["fit", "--config", str(RECIPES / "cnn_nonprivate.yaml"), "--simulate", "4"])
