"""The ledger in a run: ε at every step, a stop before overspending, and resumes that keep what was spent."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dp import BudgetExceededError, DifferentialPrivacy, PreflightError
from lightning_dp.accounting import Phase, epsilon_bound
from tests.conftest import loader, regressor, sample_of, trainer, weights
from tests.nearly import assert_nearly

Q = 16 / 64
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Record(L.Callback):
    """Remembers the logged ε and steps after every step."""

    def __init__(self) -> None:
        self.epsilons: list[float] = []
        self.steps: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if "dp/epsilon" in trainer.callback_metrics:
            self.epsilons.append(float(trainer.callback_metrics["dp/epsilon"]))
            self.steps.append(int(trainer.callback_metrics["dp/steps"]))


def run(private: DifferentialPrivacy, *callbacks: L.Callback, ckpt: Any = None, **options: Any) -> Any:
    module = regressor(lr=0.1)
    fit = trainer(private, *callbacks, **options)
    fit.fit(module, loader(), ckpt_path=ckpt)
    return module, fit


def checkpoint_at(step: int, folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=step, save_top_k=-1)


def test_epsilon_is_within_the_target_and_uses_nearly_all_of_it() -> None:
    private = DifferentialPrivacy(epsilon=2.0, delta=1e-3)
    run(private, max_steps=20)
    assert 1.9 < private.statement().epsilon <= 2.0
    assert private.ledger is not None
    assert private.ledger.steps == 20


def test_every_logged_epsilon_is_an_upper_bound_and_exact_on_recorded_steps() -> None:
    record = Record()
    run(DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3), record, max_steps=10, log_every_n_steps=4)
    for steps, epsilon in zip(record.steps, record.epsilons, strict=True):
        exact = epsilon_bound([Phase(1.0, Q, steps)], 1e-3).epsilon
        assert epsilon >= exact * (1 - 1e-6)
        if steps % 4 == 0:
            assert epsilon == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": -1, "max_epochs": 3}, 12),
        ({"max_steps": -1, "max_epochs": 3, "limit_train_batches": 2}, 6),
        ({"max_steps": -1, "max_epochs": 2, "limit_train_batches": 0.5}, 4),
        ({"max_steps": 5, "max_epochs": 3}, 5),
        ({"fast_dev_run": 2}, 2),
    ],
)
def test_the_plan_knows_how_many_steps_the_trainer_will_take(options: dict[str, Any], steps: int) -> None:
    private = DifferentialPrivacy(epsilon=3.0, delta=1e-3)
    _, fit = run(private, **options)
    assert private.plan is not None
    assert private.ledger is not None
    assert private.plan.steps == private.ledger.steps == fit.global_step == steps


def test_resume_goes_on_with_the_budget_and_the_weights_of_an_uninterrupted_run(tmp_path: Path) -> None:
    whole_private = DifferentialPrivacy(epsilon=2.0, delta=1e-3, seed=5)
    whole, _ = run(whole_private, max_steps=12)
    run(
        DifferentialPrivacy(epsilon=2.0, delta=1e-3, seed=5),
        checkpoint_at(5, tmp_path),
        max_steps=12,
        enable_checkpointing=True,
    )
    resumed_private = DifferentialPrivacy(epsilon=2.0, delta=1e-3, seed=5)
    resumed, fit = run(resumed_private, max_steps=12, ckpt=tmp_path / "step=5.ckpt")
    assert fit.global_step == 12
    assert resumed_private.ledger is not None
    assert resumed_private.ledger.steps == 12
    assert_nearly(resumed_private.statement().epsilon, whole_private.statement().epsilon)
    torch.testing.assert_close(weights(resumed), weights(whole))


def test_resume_never_reuses_noise(tmp_path: Path) -> None:
    """Two secret resumes of one checkpoint draw different noise, and a reproducible one goes on where it was."""
    run(
        DifferentialPrivacy(noise_multiplier=1.0),
        checkpoint_at(2, tmp_path),
        max_steps=2,
        enable_checkpointing=True,
    )
    ends = [
        weights(run(DifferentialPrivacy(noise_multiplier=1.0), max_steps=3, ckpt=tmp_path / "step=2.ckpt")[0])
        for _ in range(2)
    ]
    assert not torch.allclose(ends[0], ends[1], atol=1e-4)


def test_no_secret_and_only_public_numbers_in_a_checkpoint(tmp_path: Path) -> None:
    from lightning_dp.mechanism.randomness import RandomKey

    keys: list[bytes] = []
    original = RandomKey.reveal
    try:
        RandomKey.reveal = lambda self: keys.append(original(self)) or original(self)
        run(
            DifferentialPrivacy(noise_multiplier=1.0),
            checkpoint_at(2, tmp_path),
            max_steps=2,
            enable_checkpointing=True,
        )
    finally:
        RandomKey.reveal = original
    assert keys
    content = (tmp_path / "step=2.ckpt").read_bytes()
    for key in keys:
        assert key not in content
        assert key.hex().encode() not in content
    state = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["callbacks"]["DifferentialPrivacy"]
    assert state["ledger"]["phases"][0]["steps"] == 2


def test_a_longer_resume_keeps_the_noise_and_stops_before_it_overspends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = DifferentialPrivacy(epsilon=2.0, delta=1e-3)
    run(first, checkpoint_at(10, tmp_path), max_steps=10, enable_checkpointing=True)
    longer = DifferentialPrivacy(epsilon=2.0, delta=1e-3)
    with pytest.warns(UserWarning, match="budget is spent"):
        _, fit = run(longer, max_steps=500, ckpt=tmp_path / "step=10.ckpt")
    assert first.plan is not None
    assert longer.plan is not None
    assert longer.plan.noise_multiplier == first.plan.noise_multiplier
    assert 10 <= fit.global_step < 500
    assert longer.statement().epsilon <= 2.0
    assert longer.ledger is not None
    assert longer.ledger.epsilon(fit.global_step + 1).epsilon > 2.0


def test_a_resume_with_another_clipping_style_costs_the_same_and_is_noted(tmp_path: Path) -> None:
    run(DifferentialPrivacy(noise_multiplier=2.0), checkpoint_at(3, tmp_path), max_steps=3, enable_checkpointing=True)
    same, other = (DifferentialPrivacy(noise_multiplier=2.0, clipping=style) for style in ("flat", "automatic"))
    for private in (same, other):
        run(private, max_steps=5, ckpt=tmp_path / "step=3.ckpt")
    assert_nearly(other.statement().epsilon, same.statement().epsilon)
    noted = [caveat for caveat in other.statement().caveats if "clipping style" in caveat]
    assert noted == ["the clipping style changed during training from flat to automatic; ε does not depend on it"]
    assert not any("clipping style" in caveat for caveat in same.statement().caveats)


def test_a_resume_with_a_larger_epsilon_may_go_on_longer(tmp_path: Path) -> None:
    run(
        DifferentialPrivacy(epsilon=2.0, delta=1e-3),
        checkpoint_at(10, tmp_path),
        max_steps=10,
        enable_checkpointing=True,
    )
    more = DifferentialPrivacy(epsilon=4.0, delta=1e-3)
    _, fit = run(more, max_steps=20, ckpt=tmp_path / "step=10.ckpt")
    assert fit.global_step == 20
    assert 2.0 < more.statement().epsilon <= 4.0


@pytest.mark.parametrize("change", [{"noise_multiplier": 2.0}, {"expected_batch_size": 8}])
def test_a_resume_with_other_sigma_or_q_is_composed(tmp_path: Path, change: dict[str, Any]) -> None:
    run(
        DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3),
        checkpoint_at(4, tmp_path),
        max_steps=4,
        enable_checkpointing=True,
    )
    other = DifferentialPrivacy(**{"noise_multiplier": 1.0, "delta": 1e-3, **change})
    run(other, max_steps=9, ckpt=tmp_path / "step=4.ckpt")
    new = Phase(change.get("noise_multiplier", 1.0), change.get("expected_batch_size", 16) / 64, 5)
    expected = epsilon_bound([Phase(1.0, Q, 4), new], 1e-3).epsilon
    assert other.statement().epsilon == pytest.approx(expected)
    assert any("changed during training" in caveat for caveat in other.statement().caveats)


def test_a_resume_with_another_q_finds_noise_that_fits_what_is_left(tmp_path: Path) -> None:
    run(
        DifferentialPrivacy(epsilon=2.0, delta=1e-3),
        checkpoint_at(5, tmp_path),
        max_steps=10,
        enable_checkpointing=True,
    )
    other = DifferentialPrivacy(epsilon=2.0, delta=1e-3, expected_batch_size=32)
    run(other, max_steps=10, ckpt=tmp_path / "step=5.ckpt")
    assert other.ledger is not None
    assert other.ledger.steps == 10
    assert 1.8 < other.statement().epsilon <= 2.0


def test_a_checkpoint_of_a_public_run_is_refused(tmp_path: Path) -> None:
    module = regressor()
    fit = trainer(checkpoint_at(2, tmp_path), max_steps=2, enable_checkpointing=True)
    fit.fit(module, loader())
    with pytest.raises(PreflightError, match=r"without a privacy ledger: expected.*load_from_checkpoint"):
        run(DifferentialPrivacy(noise_multiplier=1.0), max_steps=4, ckpt=tmp_path / "step=2.ckpt")


def test_min_steps_beyond_the_budget_raises_rather_than_overspends() -> None:
    private = DifferentialPrivacy(epsilon=2.0, delta=1e-3)
    module = regressor()
    fit = trainer(private, max_steps=5)
    fit.fit(module, loader())
    longer = trainer(private, max_steps=400, min_steps=400)
    with (
        pytest.warns(UserWarning, match="budget is spent"),
        pytest.raises(BudgetExceededError, match=r"target_epsilon=2"),
    ):
        longer.fit(module, loader())
    assert private.statement().epsilon <= 2.0


def test_a_second_fit_with_the_same_callback_continues_the_ledger() -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3)
    module = regressor()
    for _ in range(2):
        trainer(private, max_steps=4).fit(module, loader())
    assert private.ledger is not None
    assert private.ledger.steps == 8
    assert private.statement().epsilon == pytest.approx(epsilon_bound([Phase(1.0, Q, 8)], 1e-3).epsilon)


def test_what_was_released_before_an_exception_is_written_down() -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.global_step == 3:
                raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk is full"):
        run(DifferentialPrivacy(noise_multiplier=1.0), Fails(), max_steps=9)
    assert json.loads(Path("privacy.json").read_text())["steps"] == 3


def test_skipping_the_rest_of_an_epoch_keeps_sampling_and_ledger_in_step() -> None:
    """A batch that is drawn and then skipped is not charged, and no sample is used by two steps."""
    used: list[tuple[int, ...]] = []

    class Skipping(type(regressor())):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            if batch_idx == 2:
                return -1
            used.append(tuple(sample_of(self.trainer).indices.tolist()))
            return None

    private = DifferentialPrivacy(noise_multiplier=1.0)
    fit = trainer(private, max_steps=8)
    fit.fit(Skipping(), loader())
    assert private.ledger is not None
    assert private.ledger.steps == fit.global_step == len(set(used)) == 8


def test_evaluating_the_closure_twice_is_refused_before_a_second_release() -> None:
    class Twice(type(regressor())):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer_closure()
            optimizer.step(optimizer_closure)

    private = DifferentialPrivacy(noise_multiplier=1.0)
    with pytest.raises(RuntimeError, match="expected one"):
        trainer(private, max_steps=4).fit(Twice(), loader())
    assert private.ledger is not None
    assert private.ledger.steps == 1


def test_the_end_is_announced_in_one_panel(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run(DifferentialPrivacy(epsilon=2.0, delta=1e-3), max_steps=6)
    sentences = [
        record.message
        for record in caplog.records
        if ")-DP, add/remove one example with N public, Poisson" in record.message
    ]
    assert len(sentences) == 1
    assert re.search(r"^  spent +\(ε = 2\.0", sentences[0], re.MULTILINE)


def test_a_fit_that_trains_nothing_spends_nothing_also_after_one_that_did() -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0)
    run(private, max_steps=2)
    run(private, max_steps=2, limit_train_batches=0)
    assert private.ledger is not None
    assert private.ledger.steps == 2
