"""The average of the parameters: its law, where it is used, and how it survives a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_dp import DifferentialPrivacy, ExponentialMovingAverage
from tests.conftest import Regressor, loader, regressor, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class Remembering(Regressor):
    """Keeps the parameters after every step, and what validation ran on."""

    def __init__(self) -> None:
        super().__init__()
        self.load_state_dict(regressor().state_dict())
        self.path = [weights(self).clone()]
        self.validated: list[Tensor] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.path.append(weights(self).clone())

    def on_validation_epoch_start(self) -> None:
        self.validated.append(weights(self).clone())


def closed_form(path: list[Tensor], decay: float) -> Tensor:
    """Each θ_t's weight is (1 − μ_t)·∏_{s>t} μ_s, and the initial parameters' the product of all."""
    decays = [min(decay, (1 + t) / (10 + t)) for t in range(1, len(path))]
    total, tail = torch.zeros_like(path[0], dtype=torch.float64), 1.0
    for mu, theta in zip(reversed(decays), reversed(path[1:]), strict=True):
        total += (1 - mu) * tail * theta.double()
        tail *= mu
    return total + tail * path[0].double()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_the_average_is_the_closed_form_with_warm_up(decay: float) -> None:
    module = Remembering()
    trainer(DifferentialPrivacy(noise_multiplier=1.0), ExponentialMovingAverage(decay), max_steps=100).fit(
        module, loader()
    )
    assert len(module.path) == 101
    torch.testing.assert_close(weights(module).double(), closed_form(module.path, decay), rtol=1e-4, atol=1e-5)


def test_validation_runs_on_the_average_and_training_goes_on_from_the_parameters() -> None:
    module = Remembering()
    trainer(
        DifferentialPrivacy(noise_multiplier=1.0, seed=1),
        ExponentialMovingAverage(0.9),
        max_steps=8,
        num_sanity_val_steps=0,
    ).fit(module, loader(), loader())
    plain = Remembering()
    trainer(DifferentialPrivacy(noise_multiplier=1.0, seed=1), max_steps=8).fit(plain, loader())
    torch.testing.assert_close(torch.stack(module.path), torch.stack(plain.path))
    torch.testing.assert_close(module.validated[0].double(), closed_form(module.path[:5], 0.9), rtol=1e-4, atol=1e-5)


def test_checkpoints_hold_the_average_and_resume_both(tmp_path: Path) -> None:
    def callbacks() -> list[Any]:
        save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=5, save_top_k=-1)
        return [DifferentialPrivacy(noise_multiplier=1.0, seed=1), ExponentialMovingAverage(0.9), save]

    whole = Remembering()
    trainer(*callbacks(), max_steps=12, enable_checkpointing=True).fit(whole, loader())
    saved = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    average = torch.cat([value.flatten() for value in saved["state_dict"].values()])
    torch.testing.assert_close(average.double(), closed_form(whole.path[:6], 0.9), rtol=1e-4, atol=1e-5)

    resumed = Remembering()
    trainer(*callbacks(), max_steps=12, enable_checkpointing=True).fit(
        resumed, loader(), ckpt_path=tmp_path / "step=5.ckpt"
    )
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=1e-5, atol=1e-6)


def test_without_privacy_it_is_an_ordinary_average() -> None:
    module = Remembering()
    trainer(ExponentialMovingAverage(0.9), max_steps=20).fit(module, loader())
    torch.testing.assert_close(weights(module).double(), closed_form(module.path, 0.9), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_outside_zero_to_one(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"decay={decay}: expected"):
        ExponentialMovingAverage(decay)
