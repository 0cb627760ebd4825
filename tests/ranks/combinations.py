"""Run as a script: every setting of ``tests/harness.py`` on two gloo ranks. Used by test_combinations.py."""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path

import torch

from tests.conftest import trainer
from tests.harness import EVERY, by_package
from tests.ranks.warm import train_once

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.chdir(sys.argv[1])
    train_once()
    several = partial(trainer, devices=2, strategy="ddp_fork")
    torch.save(
        {str(setting): by_package(setting, "ghost", several) for setting in EVERY}, Path(sys.argv[1]) / "found.pt"
    )
