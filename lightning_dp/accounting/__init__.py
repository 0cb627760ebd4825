"""Privacy accounting: ε as an upper bound, σ from a target ε, spent steps, and the statement. Numbers only.

phase → rdp, prv → epsilon → calibrate, search; slack → reserve → ledger → limits, statement
"""

from lightning_dp.accounting.assumptions import Assumptions
from lightning_dp.accounting.calibrate import noise_multiplier_for
from lightning_dp.accounting.compare import side_by_side
from lightning_dp.accounting.epsilon import EpsilonBound, EpsilonCurve, epsilon_bound
from lightning_dp.accounting.ledger import BudgetExceededError, Ledger
from lightning_dp.accounting.limits import check_slack_is_affordable
from lightning_dp.accounting.phase import Phase, phases_of
from lightning_dp.accounting.rdp import rdp_epsilon
from lightning_dp.accounting.reserve import noise_with_reserve
from lightning_dp.accounting.search import search_epsilon
from lightning_dp.accounting.slack import Slack
from lightning_dp.accounting.statement import Statement

__all__ = [
    "Assumptions",
    "BudgetExceededError",
    "EpsilonBound",
    "EpsilonCurve",
    "Ledger",
    "Phase",
    "Slack",
    "Statement",
    "check_slack_is_affordable",
    "epsilon_bound",
    "noise_multiplier_for",
    "noise_with_reserve",
    "phases_of",
    "rdp_epsilon",
    "search_epsilon",
    "side_by_side",
]
