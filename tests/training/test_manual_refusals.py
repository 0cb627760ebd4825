"""Manual optimization that cannot be private is refused before anything is released."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DifferentialPrivacy, PreflightError
from tests.conftest import loader, regressor, trainer, weights
from tests.training.manual_modules import ManualRegressor, gan
from tests.training.test_manual_optimization import fit_gan


def training(body: Any, optimizers: int = 1) -> L.LightningModule:
    class Training(ManualRegressor):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = nn.functional.mse_loss(self.net(batch[0]).squeeze(-1), batch[1])
            body(self, self.optimizers(), loss)

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(self.net[2 * i].parameters(), lr=0.1) for i in range(optimizers)]

    return Training()


def _accumulating(module: Any, optimizer: Any, loss: Tensor) -> None:
    module.manual_backward(loss)


def _clipping(module: Any, optimizer: Any, loss: Tensor) -> None:
    module.manual_backward(loss)
    module.clip_gradients(optimizer, gradient_clip_val=1.0)
    optimizer.step()


def _bare(module: Any, optimizer: Any, loss: Tensor) -> None:
    module.manual_backward(loss)
    module.optimizers(use_pl_optimizer=False).step()


def _shared(module: Any, optimizers: Any, loss: Tensor) -> None:
    module.manual_backward(loss)
    for optimizer in optimizers:
        optimizer.step()


def _twice(module: Any, optimizer: Any, loss: Tensor) -> None:
    for _ in range(2):
        module.manual_backward(loss * 1.0)
        optimizer.step()


def _by_the_data(module: Any, optimizer: Any, loss: Tensor) -> None:
    if not loss.requires_grad or float(loss) > 0.5:
        module.manual_backward(loss)
        optimizer.step()


def _writing(module: Any, optimizers: Any, loss: Tensor) -> None:
    optimizers[0].zero_grad()
    module.manual_backward(loss)
    optimizers[0].step()
    module.net[0].weight.data.mul_(0.5)
    module.manual_backward(loss * 1.0)
    optimizers[1].step()


def _nothing(module: Any, optimizer: Any, loss: Tensor) -> None:
    return None


@pytest.mark.parametrize(
    ("body", "optimizers", "words"),
    [
        (_accumulating, 1, ["without a step of an optimizer", "batch_size"]),
        (_clipping, 1, ["self.clip_gradients", "clip_norm"]),
        (_bare, 1, ["use_pl_optimizer=False", "self.optimizers()"]),
        (_shared, 2, ["optimizer 1 steps without a manual_backward", "parameter groups"]),
        (
            _twice,
            1,
            ["optimizer 0 steps twice", "releases of one drawn sample are not amplified", "batch_idx % n == 0"],
        ),
        (_writing, 2, ["training_step writes into net.0.weight", "target networks"]),
        (_nothing, 1, ["no private optimizer steps", "opt.step()"]),
    ],
)
@pytest.mark.filterwarnings("ignore:Trainable parameters that no optimizer holds")
def test_what_cannot_be_private_is_refused_before_anything_is_released(
    body: Any, optimizers: int, words: list[str]
) -> None:
    module = training(body, optimizers)
    before = weights(module)
    private = DifferentialPrivacy(noise_multiplier=1.0, engine="loop")
    with pytest.raises(PreflightError, match="expected") as caught_error:
        trainer(private).fit(module, loader())
    for word in words:
        assert word in str(caught_error.value)
    assert private.ledger is None or private.ledger.steps == 0
    assert torch.equal(before, weights(module))


@pytest.mark.parametrize(
    ("public", "words"),
    [
        ([2], ["public_optimizers=[2] with 2 optimizers"]),
        ([0, 1], ["at least one optimizer left that is private"]),
    ],
)
def test_a_choice_of_public_optimizers_that_makes_no_sense(public: list[int], words: list[str]) -> None:
    with pytest.raises(PreflightError, match="expected") as caught_error:
        fit_gan(public_optimizers=public)
    for word in words:
        assert word in str(caught_error.value)


def test_public_optimizers_under_automatic_optimization_or_over_shared_parameters() -> None:
    with pytest.raises(PreflightError, match="with automatic optimization: expected None"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0, public_optimizers=[0])).fit(regressor(), loader())
    module = gan()
    module.configure_optimizers = lambda: [torch.optim.SGD(module.parameters(), lr=0.1) for _ in range(2)]
    with pytest.raises(PreflightError, match="belong to a public and to a private optimizer: expected"):
        fit_gan(module=module)


def in_pieces(cut: Any) -> L.LightningModule:
    class InPieces(ManualRegressor):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer, pieces = self.optimizers(), list(zip(*map(cut, batch), strict=True))
            optimizer.zero_grad()
            for inputs, targets in pieces:
                self.manual_backward(nn.functional.mse_loss(self.net(inputs).squeeze(-1), targets) / len(pieces))
            optimizer.step()

    return InPieces()


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (lambda rows: rows.chunk(4), "calls manual_backward 4 times for a batch and 1 for one example"),
        (lambda rows: rows.split(8), "calls manual_backward 2 times for a batch and 1 for one example"),
        (lambda rows: [rows[4 * i : 4 * i + 4] for i in range(4)], "calls manual_backward with nan for one example"),
    ],
    ids=["chunk", "split", "slices"],
)
def test_gradients_accumulated_over_pieces_of_a_batch_are_refused(cut: Any, words: str) -> None:
    """An example has no pieces, and its gradient would be divided by their number, or be nothing at all."""
    with pytest.raises(PreflightError, match="expected the loss of the whole batch") as caught_error:
        trainer(DifferentialPrivacy(noise_multiplier=1.0)).fit(in_pieces(cut), loader())
    assert words in str(caught_error.value)
    assert "physical_batch_size" in str(caught_error.value)


def test_several_losses_of_one_step_are_no_pieces() -> None:
    class Two(ManualRegressor):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.net(batch[0]).square().mean())
            self.manual_backward(self.net[0](batch[0]).abs().mean())
            self.optimizers().step()

    private = DifferentialPrivacy(noise_multiplier=1.0)
    trainer(private, max_steps=2).fit(Two(), loader())
    assert private.ledger.steps == 2


def test_a_step_that_failed_after_its_release_is_not_released_again() -> None:
    """A user's hook fails once the noisy gradient is there; trying again would release the sample with the same noise."""
    seen: list[Tensor] = []

    class TriesAgain(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.weight, self.other = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
            self.weight.register_hook(self.fails_on_noise)

        def fails_on_noise(self, gradient: Tensor) -> None:
            if float(gradient.abs().sum()) > 0:
                seen.append(gradient.detach().clone())
                raise ValueError("a hook's own trouble")

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            self.manual_backward(0.0 * (self.weight * batch[0]).sum())
            try:
                first.step()
            except ValueError:
                first.step()
            self.manual_backward(0.0 * (self.other * batch[0]).sum())
            second.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([one], lr=1.0) for one in (self.weight, self.other)]

    private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-4)
    with pytest.raises(PreflightError, match="steps twice in one training_step"):
        trainer(private, max_steps=1).fit(TriesAgain(), loader())
    assert len(seen) == 1
    assert private.ledger is not None
    assert private.ledger.steps == 1
