"""Is δ small enough?"""

from __future__ import annotations

from lightning_dp.engines.user_code import warn_user
from lightning_dp.plan.privacy_plan import PrivacyPlan


def check_delta_for(plan: PrivacyPlan) -> None:
    """Warn when δ is so large that publishing one whole record would satisfy it."""
    if plan.delta >= 1 / plan.dataset_size:
        warn_user(
            f"delta={plan.delta} with dataset_size={plan.dataset_size}: expected well below 1/{plan.dataset_size} = "
            f"{1 / plan.dataset_size:.2g}. At this δ, publishing a random record in the clear would count as private."
        )
