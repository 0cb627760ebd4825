"""Whether δ can pay for a run's slack, its distance from the mechanism that the accountant composes, before the run begins."""

from __future__ import annotations

import math
from dataclasses import replace

from lightning_dp.accounting.ledger import Ledger
from lightning_dp.accounting.reserve import SHARES
from lightning_dp.accounting.slack import smallest_max_batch_size

_SENSIBLE_SHARE = 1e-2


def check_slack_is_affordable(ledger: Ledger) -> None:
    """Refuse a plan whose ε is infinite only because draws are cut too often, or because its grid is too coarse.

    Args:
        ledger: whose plan is about to begin. Of an open number of steps the first one is looked at.

    Raises:
        ValueError: the message names a bound on draws that would do.
    """
    plan = ledger.plan
    steps = ledger.steps + 1 if plan.steps is None else max(plan.steps, ledger.steps)
    slack = ledger.slack(steps)
    if slack.total_variation == 0.0:
        return
    ideal = plan.but(max_batch_size=None, resolution=None, coordinates=None)
    epsilon = plan.target_epsilon
    if epsilon is None:
        epsilon = Ledger.resume(ideal, ledger.state_dict()).epsilon(steps).epsilon
    if math.isinf(epsilon) or slack.costs(epsilon) <= max(SHARES) * plan.delta:
        return
    without_cuts = replace(slack, truncation=0.0)
    if plan.max_batch_size is None or without_cuts.costs(epsilon) > max(SHARES) * plan.delta / 2:
        raise ValueError(
            f"secure=True with noise_multiplier={plan.noise_multiplier}: ε would be {epsilon:.3g}, and δ={plan.delta:g} cannot "
            f"pay for what separates discrete from continuous noise at that ε. Expected more noise: raise noise_multiplier, "
            "or lower epsilon."
        )
    affordable = _SENSIBLE_SHARE * plan.delta / ((1.0 + math.exp(min(epsilon, 600.0))) * max(steps, 1))
    sensible = smallest_max_batch_size(plan.dataset_size, plan.sampling_probability, affordable)
    raise ValueError(
        f"max_batch_size={plan.max_batch_size} with an expected batch size of {plan.expected_batch_size:g}: expected at least "
        f"{sensible}. A step's draw would be cut with a probability that adds up to {min(1.0, slack.truncation):.2g} over "
        f"{steps} {'step' if steps == 1 else 'steps'}, and δ={plan.delta:g} cannot pay for that at ε = {epsilon:.3g}. Raise "
        "max_batch_size, or leave it out: memory is bounded by physical_batch_size anyway."
    )
