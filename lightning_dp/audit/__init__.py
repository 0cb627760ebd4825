"""A lower bound on ε from one training run, to hold against the upper bound that is claimed.

canaries → the run itself → observer → guesses → bound
"""

from lightning_dp.audit.bound import epsilon_lower_bound, p_value
from lightning_dp.audit.curve_bound import curve_p_value
from lightning_dp.audit.result import AuditResult
from lightning_dp.audit.run import audit

__all__ = ["AuditResult", "audit", "curve_p_value", "epsilon_lower_bound", "p_value"]
