"""Rows 11 to 21 of the field's silent failures. Each check holds here, and fails when the bug is planted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_dp import DifferentialPrivacy, PreflightError
from lightning_dp.accounting import Phase, epsilon_bound, rdp_epsilon
from tests.accounting.test_epsilon import pld_epsilon
from tests.conftest import Regressor, loader, regressor, trainer, weights
from tests.guarantees import mutations
from tests.guarantees import mutations_outside as outside
from tests.guarantees.mutations import caught
from tests.guarantees.test_failures_01_to_10 import clipped_sums_are_right
from tests.mechanism.laws import FALSE_ALARM, standard_normal_p_values
from tests.nearly import assert_nearly
from tests.training import test_budget as budget
from tests.training import test_lightning_stays_itself as lightning
from tests.training import test_randomness as randomness
from tests.training.refusals import refused

pytestmark = budget.pytestmark


def test_11_parameters_of_an_unknown_kind_are_dropped() -> None:
    clipped_sums_are_right("scalar parameter")
    with caught(mutations.parameter_dropped("log_scale")):
        clipped_sums_are_right("scalar parameter")


def test_12_the_scheduler_moves_the_rate_of_a_wrapper() -> None:
    lightning.test_a_zero_rate_scheduler_stops_all_movement()
    with caught(outside.optimizer_is_wrapped()):
        lightning.test_a_zero_rate_scheduler_stops_all_movement()


@pytest.mark.parametrize("wrong", [mutations.noise_stream_restarts, outside.spent_budget_is_forgotten])
def test_13_a_resume_restarts_the_noise_or_forgets_the_budget(tmp_path: Path, wrong: mutations.Mutation) -> None:
    (tmp_path / "right").mkdir()
    budget.test_resume_goes_on_with_the_budget_and_the_weights_of_an_uninterrupted_run(tmp_path / "right")
    with caught(wrong()):
        budget.test_resume_goes_on_with_the_budget_and_the_weights_of_an_uninterrupted_run(tmp_path)


def test_13_two_resumes_of_one_checkpoint_use_the_same_noise(tmp_path: Path) -> None:
    budget.test_resume_never_reuses_noise(tmp_path)
    with caught(mutations.same_secret_in_every_run()):
        budget.test_resume_never_reuses_noise(tmp_path)


def test_14_one_broken_gradient_poisons_the_sum() -> None:
    def check() -> None:
        data = torch.utils.data.TensorDataset(
            torch.randn(8, 4).index_fill(0, torch.tensor(3), torch.nan), torch.randn(8)
        )
        module = regressor()
        private = DifferentialPrivacy(noise_multiplier=0.0, expected_batch_size=8, engine="vmap")
        with pytest.warns(UserWarning, match="1 per-example gradients .* were not finite"):
            trainer(private, max_steps=1).fit(module, loader(data, 8))
        assert bool(torch.isfinite(weights(module)).all())

    check()
    with caught(mutations.broken_examples_poison_the_sum()):
        check()


class BatchNormed(Regressor):
    """Without running statistics, so that nothing but the refusal notices it under vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.BatchNorm1d(8, track_running_stats=False))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.net[2:](self.net[1](self.net[0](inputs).unsqueeze(-1).expand(-1, -1, 2)).mean(-1))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return nn.functional.mse_loss(self(batch[0]).squeeze(-1), batch[1])

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        raise AssertionError("a batch was reached")


def test_15_batch_norm_silently_becomes_per_example() -> None:
    refused(PreflightError, "net.1", "make_trainable_privately", module=BatchNormed())
    with caught(outside.batch_norm_is_accepted()):
        refused(PreflightError, "net.1", "make_trainable_privately", module=BatchNormed())


def test_16_seed_everything_fixes_the_noise() -> None:
    randomness.test_seed_everything_fixes_neither_noise_nor_sampling()
    with caught(mutations.key_from_the_global_generator()):
        randomness.test_seed_everything_fixes_neither_noise_nor_sampling()


def test_17_floating_point_noise_is_sold_as_secure() -> None:
    def check() -> None:
        private = DifferentialPrivacy(noise_multiplier=1.0)
        trainer(private, max_steps=1).fit(regressor(), loader())
        assert any("floating point" in caveat for caveat in private.statement().caveats)

    check()
    with caught(outside.floating_point_noise_is_not_mentioned()):
        check()


def test_18_train_metrics_leave_without_noise_and_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    lightning.test_the_first_logging_of_private_train_metrics_is_warned_about(caplog)
    lightning.test_train_metrics_can_be_kept_from_the_loggers()
    caplog.clear()
    with caught(outside.train_metrics_are_not_mentioned()):
        lightning.test_the_first_logging_of_private_train_metrics_is_warned_about(caplog)
    with caught(outside.the_switch_for_train_metrics_does_nothing()):
        lightning.test_train_metrics_can_be_kept_from_the_loggers()


@pytest.mark.parametrize(
    "wrong", [mutations.noise_of_sigma_alone, lambda: mutations.noise_scaled(0.5), mutations.no_noise]
)
def test_19_the_noise_added_is_not_the_noise_accounted_for(wrong: mutations.Mutation) -> None:
    def check() -> None:
        """At a clip norm other than 1, each parameter's noise has the σ that the ledger charged, times C."""
        module = Regressor(lr=1.0)
        module.idle, module.other = nn.Parameter(torch.zeros(5000)), nn.Parameter(torch.zeros(70, 80))
        private = DifferentialPrivacy(noise_multiplier=1.3, clip_norm=0.25, expected_batch_size=16)
        trainer(private, max_steps=1).fit(module, loader())
        assert private.ledger is not None
        (phase,) = private.ledger.phases
        unit = phase.noise_multiplier * 0.25 / 16
        for parameter in (module.idle, module.other):
            assert min(standard_normal_p_values(parameter.detach().numpy() / unit).values()) > FALSE_ALARM
        pair = np.corrcoef(module.idle.detach().numpy(), module.other.detach().flatten().numpy()[:5000])[0, 1]
        assert abs(pair) < 6 / np.sqrt(5000)

    check()
    with caught(wrong()):
        check()


def test_20_the_accountant_fails_or_reports_less_than_an_upper_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        for phase, delta in (
            (Phase(3.0, 0.08192, 875), 1e-5),
            (Phase(1.0, 0.01, 300), 1e-6),
            (Phase(0.7, 0.3, 20), 1e-4),
        ):
            assert epsilon_bound([phase], delta).epsilon >= pld_epsilon([phase], delta, interval=1e-3) - 1e-3

    def check_failure() -> None:
        out_of_reach = Phase(0.1, 0.5, 300)
        bound = epsilon_bound([out_of_reach], 1e-5)
        assert bound.accountant == "RDP"
        assert_nearly(bound.epsilon, rdp_epsilon([out_of_reach], 1e-5))
        assert bound.note

    check()
    with caught(outside.the_lower_bound_is_reported()):
        check()
    check_failure()
    with caught(outside.a_failing_accountant_says_zero()):
        check_failure()


def spends_the_target() -> None:
    """A batch that does not divide the data: all planned steps are taken, and they stay within the target."""
    private = DifferentialPrivacy(epsilon=2.0, delta=1e-3, expected_batch_size=14)
    _, fit = budget.run(private, max_steps=-1, max_epochs=3)
    assert private.plan is not None
    assert private.ledger is not None
    assert private.ledger.steps == fit.global_step == 3 * 4  # of the loader's batches of 16
    assert private.statement().epsilon <= 2.0


@pytest.mark.filterwarnings("ignore:The privacy budget is spent")
@pytest.mark.parametrize("wrong", [lambda: outside.noise_found_too_small(0.97), outside.epochs_rounded_down])
def test_21_the_target_is_overshot_by_the_search_or_by_rounding_epochs(wrong: mutations.Mutation) -> None:
    """With σ too small the ledger stops the run early; should it not, the target is overshot. Both are noticed."""
    spends_the_target()
    with caught(wrong()):
        spends_the_target()
    with outside.ledger_never_says_no(), caught(wrong()):
        spends_the_target()
