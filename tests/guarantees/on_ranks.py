"""Run as a script: one private step on two gloo ranks, for the right code and for planted bugs."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lightning_dp import DifferentialPrivacy
from tests.conftest import PATIENCE, loader, weights
from tests.guarantees import mutations
from tests.ranks.ranks import Mute, on_ranks

WRONG = ("every_rank_adds_noise", "no_rank_adds_noise", "ranks_are_averaged", "two_ranks_add_one_share")
WRONG_AND_DISCRETE = ("every_rank_adds_noise",)
ROOT = Path(__file__).parents[2]


def noise_on_two_ranks(folder: Path) -> dict[str, npt.NDArray[np.float64]]:
    """The noise that moved the weights, in units of σC: of the right code, and of each planted bug."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.guarantees.on_ranks", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return {path.stem: torch.load(path, weights_only=True).double().numpy() for path in folder.glob("*.pt")}


def step(to: Path, **options: Any) -> None:
    module: Any = Mute()
    before = weights(module)

    def remember() -> None:
        if module.trainer.is_global_zero:
            torch.save((before - weights(module)) * 16 / (2.0 * 0.5), to)

    module.on_train_end = remember
    fit = on_ranks(2, max_steps=1)
    fit.callbacks.append(DifferentialPrivacy(noise_multiplier=2.0, clip_norm=0.5, expected_batch_size=16, **options))
    fit.fit(module, loader())


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    folder = Path(sys.argv[1])
    step(folder / "right.pt")
    step(folder / "right_and_discrete.pt", secure=True)
    for names, suffix, secure in ((WRONG, "", False), (WRONG_AND_DISCRETE, "_and_discrete", True)):
        for name in names:
            with getattr(mutations, name)():  # the ranks are forked from this process and take the bug along
                step(folder / f"{name}{suffix}.pt", secure=secure)
