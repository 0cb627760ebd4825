"""Optimizers that know how much noise their gradient has: ordinary torch optimizers, and plain ones where nobody tells them.

What they compute follows from released gradients and public numbers alone, so none of them changes ε (post-processing).
"""

from lightning_dp.optim.adamw import DPAdamW
from lightning_dp.optim.micro_adam import DPMicroAdam
from lightning_dp.optim.muon import DPMuon

__all__ = ["DPAdamW", "DPMicroAdam", "DPMuon"]
