"""A lower bound on ε from one training run, to hold against the upper bound that is claimed.

canaries → the run itself → observer → guesses → bound
"""

from lightning_dp.audit.bound import epsilon_lower_bound, p_value
from lightning_dp.audit.run import AuditResult, audit

__all__ = ["AuditResult", "audit", "epsilon_lower_bound", "p_value"]
