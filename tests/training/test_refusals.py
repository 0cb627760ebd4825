"""A Trainer or module that cannot be private gets an error that names value, expectation and remedy, before any batch."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from lightning_dp import DifferentialPrivacy, PreflightError
from tests.conftest import Regressor, loader, trainer
from tests.training.refusals import NeverStepped, refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"epsilon": 1.0, "noise_multiplier": 1.0}, ["epsilon=1.0", "noise_multiplier=1.0", "exactly one"]),
        ({}, ["exactly one"]),
        ({"epsilon": 0.0}, ["epsilon=0.0", "above 0"]),
        ({"epsilon": -1.0}, ["epsilon=-1.0"]),
        ({"epsilon": float("nan")}, ["epsilon=nan"]),
        ({"noise_multiplier": -0.1}, ["noise_multiplier=-0.1"]),
        ({"epsilon": 1.0, "delta": 0.0}, ["delta=0.0", "(0, 1)"]),
        ({"epsilon": 1.0, "delta": 1.0}, ["delta=1.0"]),
        ({"epsilon": 1.0, "clip_norm": 0.0}, ["clip_norm=0.0"]),
        ({"epsilon": 1.0, "clip_norm": -2.0}, ["clip_norm=-2.0"]),
        ({"epsilon": 1.0, "clip_norm": float("inf")}, ["clip_norm=inf", "finite"]),
        ({"noise_multiplier": 1.0, "clip_norm": float("inf")}, ["clip_norm=inf"]),
        ({"epsilon": 1.0, "expected_batch_size": 0}, ["expected_batch_size=0", "at least 1"]),
        ({"epsilon": 1.0, "dataset_size": -5}, ["dataset_size=-5"]),
        ({"epsilon": 1.0, "physical_batch_size": 0}, ["physical_batch_size=0"]),
        ({"epsilon": 1.0, "clipping": "layerwise"}, ["clipping='layerwise'", "flat, per_layer, automatic"]),
        ({"epsilon": 1.0, "clipping": "automatic", "automatic_gamma": -1.0}, ["automatic_gamma=-1.0", "above 0"]),
        ({"noise_multiplier": 0.0, "clipping": "automatic", "clip_norm": float("inf")}, ["clipping='automatic'"]),
        ({"epsilon": 1.0, "engine": "fast"}, ["engine='fast'", "vmap", "loop"]),
    ],
)
def test_bad_arguments(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        DifferentialPrivacy(**options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gradient_clip_val": 1.0}, ["gradient_clip_val=1.0", "clip_norm"]),
        ({"max_epochs": 1.5, "max_steps": -1}, ["max_epochs=1.5", "whole number", "-1 for no limit"]),
        ({"max_epochs": "3", "max_steps": -1}, ["max_epochs='3'", "whole number"]),
        ({"max_epochs": True}, ["max_epochs=True", "whole number"]),
        ({"max_steps": 2.5}, ["max_steps=2.5", "whole number"]),
        ({"data": loader(batch_size=65)}, ["batch_size=65 with 64 examples", "at most 64", "expected_batch_size=64"]),
        ({"accumulate_grad_batches": 4}, ["accumulate_grad_batches=4", "physical_batch_size"]),
        ({"callbacks": (GradientAccumulationScheduler({0: 2}),)}, ["GradientAccumulationScheduler"]),
        ({"overfit_batches": 2}, ["overfit_batches=2", "Subset"]),
        ({"precision": "16-true"}, ["precision='16-true'", "bf16-mixed"]),
        ({"callbacks": (LearningRateFinder(),)}, ["Tuner", "budget"]),
    ],
)
def test_trainer_settings(options: dict[str, Any], words: list[str]) -> None:
    refused(PreflightError, *words, **options)


def test_the_batch_size_finder() -> None:
    class Scaled(NeverStepped):
        batch_size = 16

        def train_dataloader(self) -> Any:
            return loader(batch_size=self.batch_size)

    with pytest.raises(PreflightError, match=r"Tuner.*expected none.*budget"):
        trainer(BatchSizeFinder(), DifferentialPrivacy(noise_multiplier=1.0)).fit(Scaled())


def test_fp16_mixed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning itself refuses 16-mixed on a CPU, so the check is asked directly."""
    from lightning_dp.look.trainer import check_trainer

    fit = trainer()
    monkeypatch.setattr(type(fit), "precision", property(lambda self: "16-mixed"))
    with pytest.raises(PreflightError, match=r"precision='16-mixed'.*expected.*bf16-mixed"):
        check_trainer(fit)


class _Ddp(DDPStrategy):
    pass


class _Single(SingleDeviceStrategy):
    pass


@pytest.mark.parametrize("strategy", [_Single(), _Ddp(process_group_backend="gloo")])
def test_strategies_without_a_twin(strategy: Any) -> None:
    from lightning_dp.strategy import make_private

    with pytest.raises(PreflightError, match=r"strategy=.*expected.*private_ddp.*FSDP"):
        make_private(strategy)


@pytest.mark.parametrize("name", ["fsdp", "deepspeed", "xla"])
def test_sharding_strategies_are_named_in_the_refusal(name: str) -> None:
    from lightning.pytorch.strategies import FSDPStrategy

    from lightning_dp.strategy import make_private

    strategy = FSDPStrategy() if name == "fsdp" else object.__new__(type(f"{name}Strategy", (DDPStrategy,), {}))
    with pytest.raises(PreflightError, match="shard gradients"):
        make_private(strategy)


def test_a_ddp_comm_hook_that_would_never_run() -> None:
    from lightning_dp.strategy import make_private

    with pytest.raises(PreflightError, match=r"ddp_comm_hook.*expected"):
        make_private(DDPStrategy(ddp_comm_hook=lambda state, bucket: None, process_group_backend="gloo"))


@pytest.mark.parametrize("strategy", ["private", "private_ddp_fork"])
def test_a_private_strategy_without_the_callback_does_not_train_in_the_open(strategy: str) -> None:
    if strategy == "private_ddp_fork":
        from lightning_dp import PrivateDDPStrategy

        with pytest.raises(PreflightError, match=r"private_ddp.*without DifferentialPrivacy.*expected the callback"):
            PrivateDDPStrategy().training_step(None, 0)
        return
    module = NeverStepped()
    with pytest.raises(PreflightError, match="without DifferentialPrivacy"):
        trainer(strategy=strategy).fit(module, loader())


def test_two_privacy_callbacks() -> None:
    with pytest.raises(
        RuntimeError, match="DifferentialPrivacy"
    ):  # Lightning's own: two callbacks, one place in a checkpoint
        trainer(DifferentialPrivacy(epsilon=1.0), DifferentialPrivacy(epsilon=1.0))


class _BatchNormed(Regressor):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 4), layer)


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.InstanceNorm1d(4, track_running_stats=True)]
)
def test_layers_that_mix_or_remember_examples(layer: nn.Module) -> None:
    refused(PreflightError, "trunk.1", "make_trainable_privately(module)", module=_BatchNormed(layer))


def test_batch_norm_added_in_configure_model() -> None:
    class Late(Regressor):
        def configure_model(self) -> None:
            if not hasattr(self, "late"):
                self.late = nn.BatchNorm1d(3)

    module = Late()
    with pytest.raises(PreflightError, match="late"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0)).fit(module, loader())


@pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode")
def test_frozen_batch_norm_in_eval_mode_is_accepted_and_watched() -> None:
    layer = nn.BatchNorm1d(4).requires_grad_(False).eval()
    module = _BatchNormed(layer)
    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=1).fit(module, loader())
    module = _BatchNormed(nn.BatchNorm1d(4).requires_grad_(False).eval())
    module.on_train_batch_start = lambda *_: module.train() and None
    with pytest.raises(PreflightError, match="train mode"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=2).fit(module, loader())


def test_manual_optimization_that_optimizes_nothing() -> None:
    module = NeverStepped()
    module.automatic_optimization = False
    refused(PreflightError, "automatic_optimization=False", module=module)


def test_several_optimizers() -> None:
    class Two(NeverStepped):
        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD([p], lr=0.1) for p in self.parameters()]

    with pytest.raises(RuntimeError, match="multiple optimizers"):  # Lightning's own refusal comes first
        trainer(DifferentialPrivacy(noise_multiplier=1.0)).fit(Two(), loader())


def test_an_optimizer_that_evaluates_its_closure_again() -> None:
    class Lbfgs(NeverStepped):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters())

    refused(PreflightError, "LBFGS", module=Lbfgs())


def test_an_optimizer_over_parameters_the_module_does_not_own() -> None:
    class Stranger(NeverStepped):
        def configure_optimizers(self) -> Any:
            self._loose = [nn.Parameter(torch.zeros(3))]
            return torch.optim.SGD([*self.parameters(), *self._loose], lr=0.1)

    refused(PreflightError, "1 of the optimizer's parameters", module=Stranger())


def test_trainable_parameters_without_an_optimizer_are_named() -> None:
    class Partial(Regressor):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net[2].parameters(), lr=0.1)

    with pytest.warns(UserWarning, match=r"net\.0\.weight.*never move"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=1).fit(Partial(), loader())


def test_nothing_to_train() -> None:
    refused(PreflightError, "no trainable parameter", module=NeverStepped().requires_grad_(False))


def test_an_override_of_backward_that_would_never_run() -> None:
    class Own(NeverStepped):
        def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            loss.backward()

    refused(PreflightError, "Own.backward", module=Own())


@pytest.mark.filterwarnings("ignore:You are using the `dataloader_iter`")
def test_a_training_step_that_fetches_its_own_batches() -> None:
    class Fetching(NeverStepped):
        def training_step(self, dataloader_iter: Any) -> Tensor:
            raise AssertionError

    refused(PreflightError, "dataloader_iter", module=Fetching())


def _returns(value: Any) -> L.LightningModule:
    class Returning(NeverStepped):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return value

    return Returning()


@pytest.mark.parametrize(
    ("value", "error", "word"),
    [
        (None, TypeError, "returned None"),
        ({"los": torch.ones(())}, TypeError, "'los'"),
        (torch.ones(3), ValueError, "shape (3,)"),
        ("loss", TypeError, "type str"),
    ],
)
def test_a_training_step_without_a_loss(value: Any, error: type[Exception], word: str) -> None:
    refused(error, word, module=_returns(value))


class Squeezes(NeverStepped):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch[0].squeeze(), batch[1]
        return nn.functional.mse_loss(self.net(inputs)[:, 0], targets)


class Halves(NeverStepped):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, other = self.net(batch[0]).chunk(2)
        return one.mean() + other.mean()


class Fours(NeverStepped):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        one, other = self.net(batch[0]).split(4)[:2]  # of two rows, too, there is one piece
        return one.mean() + other.mean()


@pytest.mark.parametrize("options", [{}, {"physical_batch_size": 1}, {"engine": "vmap"}])
@pytest.mark.parametrize("module", [Squeezes, Halves, Fours])
def test_a_training_step_that_cannot_take_a_batch_of_one(module: Any, options: Any) -> None:
    with pytest.raises(
        PreflightError, match=r"cannot take a batch of one: .*test_refusals\.py:\d+ in training_step.*squeeze"
    ):
        trainer(DifferentialPrivacy(noise_multiplier=1.0, **options)).fit(module(), loader())


@pytest.mark.parametrize("module", [Squeezes, Halves, Fours])
def test_nor_by_hand(module: Any) -> None:
    class ByHand(module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    with pytest.raises(
        PreflightError, match=r"cannot take a batch of one: .*test_refusals\.py:\d+ in training_step.*squeeze"
    ):
        trainer(DifferentialPrivacy(noise_multiplier=1.0)).fit(ByHand(), loader())


def test_an_optimizer_for_sparse_gradients() -> None:
    class Sparse(NeverStepped):
        def configure_optimizers(self) -> Any:
            return torch.optim.SparseAdam(self.parameters())

    refused(PreflightError, "optimizer=SparseAdam", "Adam", module=Sparse())


def test_a_training_step_that_learns_through_a_buffer() -> None:
    class Remembering(NeverStepped):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen += batch[0].detach().mean(0)
            return super().training_step(batch, batch_idx)

    refused(PreflightError, "seen", module=Remembering())
