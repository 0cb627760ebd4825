"""Every bad input gets an error that names the value, the expectation and the remedy, before the first batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, GradientAccumulationScheduler, LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_dp import DifferentialPrivacy, EngineError, PreflightError
from tests.conftest import Regressor, loader, regression_data, regressor, trainer, weights


class NeverStepped(Regressor):
    """Fails the test if a training batch is reached or a parameter moves."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("a batch was reached")


def refused(
    error: type[Exception],
    *words: str,
    module: L.LightningModule | None = None,
    data: Any = None,
    callbacks: tuple[L.Callback, ...] = (),
    private: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Assert that fit raises ``error`` whose text holds all ``words``, before any batch, leaving the weights alone."""
    module = NeverStepped() if module is None else module
    before = weights(module).clone()
    callback = DifferentialPrivacy(**(private or {"noise_multiplier": 1.0}))
    with pytest.raises(error) as caught:
        trainer(*callbacks, callback, **options).fit(module, loader() if data is None else data)
    for word in (*words, "expected"):
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"
    assert torch.equal(before, weights(module))


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
    from lightning_dp import preflight

    fit = trainer()
    monkeypatch.setattr(type(fit), "precision", property(lambda self: "16-mixed"))
    with pytest.raises(PreflightError, match=r"precision='16-mixed'.*expected.*bf16-mixed"):
        preflight.check_trainer(fit)


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


def test_complex_parameters() -> None:
    module = NeverStepped()
    module.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(PreflightError, match=r"complex parameters phase: expected"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0)).fit(module, loader())
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


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


def test_a_training_step_that_learns_through_a_buffer() -> None:
    class Remembering(NeverStepped):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen += batch[0].detach().mean(0)
            return super().training_step(batch, batch_idx)

    refused(PreflightError, "seen", module=Remembering())


class _Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([])


class _Batches(BatchSampler):
    pass


class _OwnIteration(DataLoader):
    def __iter__(self) -> Any:
        return super().__iter__()


class _NoLength(torch.utils.data.Dataset):
    def __getitem__(self, index: int) -> Any:
        return index


DATA = regression_data()
LOADERS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "weighted": (lambda: loader(sampler=WeightedRandomSampler([1.0] * 64, 64)), ["WeightedRandomSampler", "same probability"]),
    "subset": (lambda: loader(sampler=SubsetRandomSampler(range(32))), ["SubsetRandomSampler"]),
    "replacement": (lambda: loader(sampler=RandomSampler(DATA, replacement=True)), ["RandomSampler"]),
    "fewer": (lambda: loader(sampler=RandomSampler(DATA, num_samples=10)), ["RandomSampler"]),
    "batch sampler": (
        lambda: DataLoader(DATA, batch_sampler=_Batches(SequentialSampler(DATA), 4, False)),
        ["_Batches", "batch_size"],
    ),
    "plain batch sampler": (
        lambda: DataLoader(DATA, batch_sampler=BatchSampler(WeightedRandomSampler([1.0] * 64, 64), 4, False)),
        ["WeightedRandomSampler"],
    ),
    "no batching": (lambda: DataLoader(DATA, batch_size=None), ["batch_size=None"]),
    "stream": (lambda: DataLoader(_Stream(), batch_size=4), ["IterableDataset", "map-style"]),
    "no length": (lambda: DataLoader(_NoLength(), sampler=range(4), batch_size=2), ["no length"]),
    "own iteration": (lambda: _OwnIteration(DATA, batch_size=4), ["_OwnIteration"]),
    "list": (lambda: [(torch.zeros(2, 4), torch.zeros(2))], ["several", "list"]),
    "dict of loaders": (lambda: {"a": loader(), "b": loader()}, ["several training loaders", "ConcatDataset"]),
    "list of loaders": (lambda: [loader(), loader()], ["several training loaders"]),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADERS)
def test_loaders_that_poisson_sampling_cannot_replace(name: str) -> None:
    make, words = LOADERS[name]
    if name == "list":
        words = ["type Tensor"]  # Lightning takes a list for a list of loaders
    refused(PreflightError, *words, data=make())


def test_a_custom_sampler_under_ddp_is_found_inside_lightnings_wrapper() -> None:
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper

    from lightning_dp.preflight import check_loader

    wrapped = DistributedSamplerWrapper(WeightedRandomSampler([1.0] * 64, 64), num_replicas=2, rank=0)
    with pytest.raises(PreflightError, match="WeightedRandomSampler"):
        check_loader(loader(sampler=wrapped))


def test_a_batch_larger_than_the_data() -> None:
    refused(ValueError, "expected_batch_size=100", "dataset_size=64", data=loader(batch_size=100))


def test_an_epsilon_without_an_end() -> None:
    refused(
        PreflightError,
        "epsilon=3.0",
        "max_steps",
        private={"epsilon": 3.0},
        max_steps=-1,
        max_time="00:00:01:00",
    )


def test_an_epsilon_out_of_reach() -> None:
    refused(ValueError, "epsilon=1e-07", private={"epsilon": 1e-7, "delta": 1e-12}, max_steps=10**6)


def test_a_delta_that_protects_nobody_is_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"delta=0.1 with dataset_size=64"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0, delta=0.1), max_steps=1).fit(regressor(), loader())


def test_an_engine_asked_for_by_name_that_cannot_trace() -> None:
    class Branching(NeverStepped):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float(np.sign(batch[0].numpy()).sum())

    refused_module = Branching()
    with pytest.raises(EngineError, match=r"engine='vmap' cannot run .*NumPy.* in training_step\).*engine='auto'"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0, engine="vmap")).fit(refused_module, loader())


def test_a_batch_without_a_row_for_each_example() -> None:
    def transposed(rows: list[Any]) -> Any:
        return torch.stack([row[0] for row in rows], dim=1), torch.stack([row[1] for row in rows])

    refused(ValueError, "batch[0]", "(4, 2)", data=loader(collate_fn=transposed))


class _MixUp(NeverStepped):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        order = torch.randperm(len(batch[0]))
        return 0.7 * batch[0] + 0.3 * batch[0][order], batch[1]


class _Standardised(NeverStepped):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] - batch[0].mean(0), batch[1]


@pytest.mark.parametrize("module", [_MixUp(), _Standardised()])
def test_a_batch_transform_that_mixes_examples(module: L.LightningModule) -> None:
    refused(PreflightError, "mixes examples", "batch[0]", module=module)


def test_a_random_transform_of_each_example_alone_is_fine() -> None:
    class Jittered(Regressor):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]

    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=1).fit(Jittered(), loader())


def test_a_loader_inside_a_dict() -> None:
    refused(PreflightError, "nested in a dict", data={"only": loader()})


def test_a_training_step_without_batch_idx() -> None:
    class Short(Regressor):
        def training_step(self, batch: Any) -> Tensor:
            return super().training_step(batch, 0)

    module = Short()
    before = weights(module).clone()
    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=1).fit(module, loader())
    assert not torch.equal(before, weights(module))


def test_a_hook_that_looks_into_the_logical_batch_is_told_what_it_is() -> None:
    class Peeking(Regressor):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            _inputs, _targets = batch

    with pytest.raises(TypeError, match=r"LogicalBatch.*expected.*batch\.indices"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=1).fit(Peeking(), loader())
