"""A process that has trained once, so that those that are forked from it need not begin cold."""

from __future__ import annotations

import tempfile

from lightning_dp import DifferentialPrivacy
from tests.conftest import loader, regressor, trainer


def train_once() -> None:
    """What is imported, compiled or cached in a first private fit is passed on to the ranks that are forked afterwards."""
    private = DifferentialPrivacy(noise_multiplier=1.0)
    with tempfile.TemporaryDirectory() as folder:
        trainer(private, max_steps=1, default_root_dir=folder).fit(regressor(), loader())
