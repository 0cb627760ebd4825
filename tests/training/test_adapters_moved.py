"""A run whose adapters learn nothing ends with an error, and one whose adapters learn does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import peft
import pytest
import torch
from torch import Tensor, nn

from lightning_dp import AdaptersMoved, DifferentialPrivacy
from lightning_dp.callbacks.adapters_moved import AdaptersError
from tests.conftest import loader, trainer


class Adapted(L.LightningModule):
    """A frozen linear layer with an adapter."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 4))
            peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), self.net)
        self.net[0].base_layer.to(dtype)
        self.rate, self.names = 0.1, "lora_"

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for n, p in self.named_parameters() if self.names in n], lr=self.rate)


DATA = [(torch.randn(4, generator=torch.Generator().manual_seed(i)), torch.ones(4)) for i in range(12)]


def fit(model: Adapted, early: int = 10, steps: int = 3, private: bool = True) -> None:
    callbacks: list[L.Callback] = [AdaptersMoved(early)]
    if private:
        callbacks.append(DifferentialPrivacy(noise_multiplier=1.0, seed=0))
    trainer(*callbacks, max_steps=steps).fit(model, loader(DATA, batch_size=6))


@pytest.mark.parametrize("private", [True, False])
def test_adapters_that_learn_pass(private: bool) -> None:
    fit(Adapted(), private=private)


def a_rate_of_zero(model: Adapted) -> None:
    model.rate = 0.0


def an_optimizer_of_half_of_them(model: Adapted) -> None:
    model.names = "lora_A"


@pytest.mark.filterwarnings("ignore:DifferentialPrivacy:UserWarning")
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (a_rate_of_zero, "2 trainable parameters: expected all to have moved after 3 steps"),
        (an_optimizer_of_half_of_them, "lora_B.default.weight of 2 trainable parameters: expected all to have moved"),
    ],
)
def test_adapters_that_do_not_move_are_an_error(mistake: Callable[[Adapted], None], message: str) -> None:
    model = Adapted()
    mistake(model)
    with pytest.raises(AdaptersError, match=message):
        fit(model, private=False)


def test_it_is_said_early() -> None:
    model = Adapted()
    model.rate = 0.0
    with pytest.raises(AdaptersError, match="after 1 steps"):
        fit(model, early=1, steps=50)
    assert model.trainer.global_step == 1


def test_what_vanishes_in_the_merged_weight_is_an_error() -> None:
    """Products of a hundred-thousandth of the weight in bfloat16, which has eight bits: only the smallest weights take them."""
    model = Adapted(torch.bfloat16)
    model.net[0].base_layer.to(torch.float32)  # for the forward pass

    def at_the_end(*_: Any) -> None:
        layer = model.net[0]
        layer.base_layer.to(torch.bfloat16)
        layer.lora_A.default.weight.data.fill_(1e-3)
        layer.lora_B.default.weight.data.fill_(1e-3)

    checked = AdaptersMoved()
    checked.on_fit_start(L.Trainer(logger=False, accelerator="cpu"), model)
    at_the_end()
    with pytest.raises(AdaptersError, match=r"merged in torch.bfloat16, 12% of the adapter 'default' is left"):
        checked.on_train_end(type("Done", (), {"global_step": 5}), model)


def test_a_product_of_zero_is_an_error() -> None:
    model = Adapted()
    checked = AdaptersMoved()
    checked.on_fit_start(L.Trainer(logger=False, accelerator="cpu"), model)
    model.net[0].lora_A.default.weight.data.fill_(1e-38)
    model.net[0].lora_B.default.weight.data.fill_(1e-38)
    with pytest.raises(AdaptersError, match=r"adds 0.0 of its weight: expected a share above 0"):
        checked.on_train_end(type("Done", (), {"global_step": 5}), model)


@pytest.mark.parametrize("early", [0, -1, 1.5, "ten", None])
def test_what_is_no_number_of_steps_is_refused(early: Any) -> None:
    with pytest.raises(ValueError, match="early="):
        AdaptersMoved(early)
