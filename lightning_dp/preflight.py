"""Every refusal, before the first batch: what would break the guarantee, or quietly not do what it says."""

from __future__ import annotations

import inspect
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    WeightAveraging,
)
from lightning.pytorch.overrides.distributed import _IndexBatchSamplerWrapper
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_dp.checked import whole
from lightning_dp.engines.user_code import library_that_calls, warn_user
from lightning_dp.plan import PrivacyPlan

CANARIES = "dp_audit_canaries"
"""The name under which an audit adds the coordinates of its gradient-space canaries to the module."""

SUPPORTED_PRECISION = ("32-true", "64-true", "bf16-mixed", "bf16-true")


_TWO_STEPS = (("first_step", "second_step"), ("ascent_step", "descent_step"))
"""What sharpness-aware minimisation (SAM) and its kin call the halves of a step."""


class PreflightError(ValueError):
    """Training cannot be private as configured. The message names the value, the expectation and the remedy."""


def check_before_setup(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """:func:`check_trainer`, and :func:`check_module` as far as its layers are there."""
    check_trainer(trainer)
    check_module(module, complete=False)


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse Trainer settings that differential privacy cannot honour. Called when ``fit`` is being set up.

    Raises:
        PreflightError: see the message.
    """
    for name in ("max_steps", "max_epochs"):
        try:
            whole(name, -1 if (limit := getattr(trainer, name)) is None else limit, low=-1)
        except ValueError as error:
            raise PreflightError(
                f"{error} The noise is planned for all steps to come: give a whole number, or -1 for no limit."
            ) from None
    if trainer.gradient_clip_val:
        library = library_that_calls()
        where = (
            f"Here {library} makes or runs the Trainer: have it pass gradient_clip_val=None on to it, as with "
            "trainer_kwargs={'gradient_clip_val': None}"
            if library
            else "Leave it out of Trainer(...), or give None; where a library makes the Trainer, as GluonTS's estimators do, give "
            "trainer_kwargs={'gradient_clip_val': None} or what it calls that"
        )
        raise PreflightError(
            f"gradient_clip_val={trainer.gradient_clip_val}, an argument of the Trainer: expected None or 0. It would clip the "
            f"gradient that is already clipped per example and noisy. {where}. The clip norm is "
            "DifferentialPrivacy(clip_norm=...)."
        )
    if trainer.accumulate_grad_batches != 1 or _has(trainer, GradientAccumulationScheduler):
        raise PreflightError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}: expected 1 (and no "
            "GradientAccumulationScheduler). One Lightning batch is one private step, whatever its size: raise the "
            "loader's batch_size, and limit memory with DifferentialPrivacy(physical_batch_size=...)."
        )
    settings: Any = trainer  # Lightning sets overfit_batches where type checkers do not see it
    if settings.overfit_batches:
        raise PreflightError(
            f"overfit_batches={settings.overfit_batches}: expected 0. It replaces the training sampler by one that "
            "always takes the same examples. Train on a torch.utils.data.Subset instead."
        )
    if trainer.precision not in SUPPORTED_PRECISION:
        raise PreflightError(
            f"precision={trainer.precision!r}: expected one of {', '.join(SUPPORTED_PRECISION)}. Loss scaling and the "
            "narrow range of fp16 turn gradients into inf before they can be clipped; use 'bf16-mixed'."
        )
    check_averaging(trainer)
    if _has(trainer, LearningRateFinder) or _has(trainer, BatchSizeFinder):
        raise PreflightError(
            "Tuner (LearningRateFinder or BatchSizeFinder): expected none together with DifferentialPrivacy. Every "
            "trial run reads the private data and spends budget that no ledger counts. Tune on public data, or set the "
            "value by hand."
        )


def check_averaging(trainer: pl.Trainer) -> None:
    """Refuse an average of sharded weights, which Lightning makes by copying the whole module.

    Raises:
        PreflightError: see the message.
    """
    if isinstance(trainer.strategy, ModelParallelStrategy) and _has(trainer, WeightAveraging):
        raise PreflightError(
            "ExponentialMovingAverage or another WeightAveraging with sharded parameters: expected neither together. "
            "Lightning copies the module for it, and FSDP2 forbids that. Use strategy='ddp', or train without an average."
        )


def check_module(module: pl.LightningModule, *, complete: bool = True) -> None:
    """Refuse modules whose layers mix examples or have nothing to train. Called once the module is complete.

    Args:
        module: the user's.
        complete: ``False`` before ``configure_model``, which may be where the parameters come from.

    Raises:
        PreflightError: see the message.
    """
    parameters = inspect.signature(module.training_step).parameters
    if "dataloader_iter" in parameters:
        raise PreflightError(
            "training_step(dataloader_iter): expected training_step(batch, batch_idx). A step that fetches its own "
            "batches cannot be sampled by Poisson. Take the batch as the argument."
        )
    for hook in ("backward",):
        if is_overridden(hook, module, parent=pl.LightningModule):
            raise PreflightError(
                f"{type(module).__name__}.{hook} is overridden: expected Lightning's own. Per-example gradients are "
                "not taken by a backward pass over the batch, so the override would never run. Remove it."
            )
    mixing = [name for name, layer in module.named_modules() if mixes_examples(layer)]
    if mixing:
        raise PreflightError(
            f"BatchNorm in {', '.join(mixing)}: expected layers that treat every example on its own. Batch statistics let "
            "one example change every other's gradient, so clipping bounds nothing. Replace them by GroupNorm with "
            "lightning_dp.make_trainable_privately(module) before fit; or, for a frozen pre-trained part, call .eval() and "
            ".requires_grad_(False) on it."
        )
    late = not complete and is_overridden("configure_model", module, parent=pl.LightningModule)
    if not late and not any(parameter.requires_grad for parameter in module.parameters()):
        raise PreflightError(
            "no trainable parameter: expected at least one with requires_grad=True. Unfreeze what should be trained."
        )


def check_optimizers(module: pl.LightningModule, optimizers: list[torch.optim.Optimizer]) -> None:
    """Refuse optimizers that would step more than once, or outside the reach of the noise.

    Raises:
        PreflightError: see the message.
    """
    if module.automatic_optimization and len(optimizers) != 1:
        raise PreflightError(
            f"{len(optimizers)} optimizers: expected exactly one. Return a single optimizer from configure_optimizers "
            "(it may have several parameter groups)."
        )
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise PreflightError(
            "optimizer=LBFGS: expected one that evaluates its closure once per step. Every further evaluation would be "
            "an unaccounted release. Use SGD or Adam."
        )
    if any(isinstance(optimizer, torch.optim.SparseAdam) for optimizer in optimizers):
        raise PreflightError(
            "optimizer=SparseAdam: expected one that takes dense gradients. Noise falls on every row of an embedding, so a private "
            "gradient is never sparse. Use Adam or AdamW."
        )
    for optimizer in optimizers:
        two = next((pair for pair in _TWO_STEPS if all(hasattr(optimizer, name) for name in pair)), None)
        if two:
            raise PreflightError(
                f"optimizer={type(optimizer).__name__}, which steps in two halves ({two[0]}, {two[1]}): expected one that needs "
                "one gradient a step. Its second gradient, at weights moved by the first, is a further release of the same "
                "sample, not amplified by sampling as if it had a sample of its own. Use SGD or Adam."
            )
    known = {id(parameter) for parameter in module.parameters()}
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    strangers = len(held - known)
    if strangers:
        raise PreflightError(
            f"{strangers} of the optimizer's parameters are not parameters of the module: expected all of them to be. "
            "They would get no private gradient and never move. Register them on the LightningModule."
        )
    idle = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    idle = [name for name in idle if not name.startswith(CANARIES)]  # an audit reads their gradients alone
    if idle:
        warn_user(
            f"Trainable parameters that no optimizer holds: {', '.join(idle[:5])}. They count in the clip norm and "
            "never move. Freeze them with requires_grad_(False) or give them to the optimizer."
        )


def check_strategy(strategy: Strategy, convertible: tuple[type[Strategy], ...]) -> None:
    """Refuse strategies that have no private twin.

    Raises:
        PreflightError: see the message.
    """
    if type(strategy) not in convertible:
        raise PreflightError(
            f"strategy={type(strategy).__module__}.{type(strategy).__name__}: expected Lightning's single-device, DDP "
            "or ModelParallelStrategy, imported from 'lightning' (not 'pytorch_lightning'). Use strategy='auto', 'ddp', "
            "'private' or 'private_ddp', and for sharded parameters 'private_fsdp' with fully_shard in configure_model; "
            "DeepSpeed, FSDPStrategy (FSDP1) and XLA shard gradients before they could be clipped per example."
        )
    hooks = [
        name
        for name in ("_ddp_comm_hook", "_ddp_comm_state", "_model_averaging_period")
        if getattr(strategy, name, None)
    ]
    if hooks:
        raise PreflightError(
            f"DDPStrategy({hooks[0].removeprefix('_')}=...): expected none. The ranks' clipped gradients are added up once "
            "a step without DistributedDataParallel, so it would never run. Remove it."
        )


def check_loader(loader: object) -> DataLoader[Any]:
    """Refuse training loaders whose sampling cannot be replaced by Poisson sampling without changing their meaning.

    Raises:
        PreflightError: see the message.
    """
    if not isinstance(loader, DataLoader):
        raise PreflightError(
            f"train_dataloader of type {type(loader).__name__}: expected a torch.utils.data.DataLoader. Poisson sampling "
            "needs to reach every example by its index; wrap the dataset in a DataLoader."
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise PreflightError(
            f"train_dataloader of type {type(loader).__name__}, which iterates in its own way: expected torch's "
            "DataLoader. Its own iteration would not take place; put that logic into the dataset or collate_fn."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise PreflightError(
            f"dataset={type(loader.dataset).__name__} is an IterableDataset: expected a map-style dataset with "
            "__getitem__ and __len__. A stream cannot be sampled by Poisson: what a shuffle buffer gives is neither independent "
            "nor drawn with a known probability. Index the data, or hold the records of its shards in memory with "
            "lightning_dp.HeldRecords."
        )
    if not hasattr(loader.dataset, "__len__"):
        raise PreflightError(
            f"dataset={type(loader.dataset).__name__} has no length: expected __len__. Poisson sampling needs to know "
            "how many examples there are to draw from."
        )
    if loader.batch_sampler is None:
        raise PreflightError(
            f"train_dataloader with batch_size=None over {type(loader.dataset).__name__}: expected single examples and "
            "DataLoader(dataset, batch_size=...), or, of a dataset that takes a list of indices, "
            "DataLoader(dataset, batch_size=None, sampler=BatchSampler(RandomSampler(dataset), batch_size=..., drop_last=False)). "
            "Here an index is a whole batch, which would be drawn, clipped and protected as one example. Batches that are tuples "
            "of tensors become examples with TensorDataset(*map(torch.cat, zip(*dataset)))."
        )
    if loader.batch_size is None or type(loader.batch_sampler) not in (BatchSampler, _IndexBatchSamplerWrapper):
        given: Any = loader.batch_sampler
        within = _given(getattr(given, "sampler", None))
        kind = f"{type(given).__name__}({'' if within is None else type(within).__name__})"
        if within is not None:
            _check_sampler(within, loader.dataset)
        size = getattr(given, "batch_size", "...")
        raise PreflightError(
            f"batch_sampler={kind}: expected none. Poisson sampling, which the accountant assumes, would replace it. Give "
            f"DataLoader(dataset, batch_size={size}, drop_last={getattr(given, 'drop_last', False)}) instead."
        )
    _check_sampler(_given(loader.sampler), loader.dataset)
    if len(loader) == 0 and len(loader.dataset) > 0:
        raise PreflightError(
            f"drop_last=True with batch_size={loader.batch_size} leaves no batch of {len(loader.dataset)} examples: expected "
            "at least one. An epoch has len(train_dataloader) steps, so nothing would be trained. Give drop_last=False, or a "
            "smaller batch_size."
        )
    return loader


def check_not_nested(given: object, loader: object) -> None:
    """Refuse a training loader in a list, dict or ``CombinedLoader``.

    Args:
        given: the Trainer's ``train_dataloader``.
        loader: the private one, made of the loader that was found.

    Raises:
        PreflightError: they are not the same.
    """
    if given is not loader:
        raise PreflightError(
            f"train_dataloader nested in a {type(given).__name__}: expected the DataLoader itself. Pass the loader "
            "without a list, dict or CombinedLoader around it."
        )


def check_delta_for(plan: PrivacyPlan) -> None:
    """Warn when δ is so large that publishing one whole record would satisfy it."""
    if plan.delta >= 1 / plan.dataset_size:
        warn_user(
            f"delta={plan.delta} with dataset_size={plan.dataset_size}: expected well below 1/{plan.dataset_size} = "
            f"{1 / plan.dataset_size:.2g}. At this δ, publishing a random record in the clear would count as private."
        )


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers of ``module`` that are there but harmless now (frozen and in eval mode)."""
    return [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def check_batch_norms_rest(module: nn.Module) -> None:
    """Refuse BatchNorm layers that were switched to train mode since training began.

    Raises:
        PreflightError: see the message.
    """
    mode = [layer for layer in batch_norms(module) if layer.training]
    if mode:
        raise PreflightError(
            f"{len(mode)} BatchNorm layers were switched to train mode during training: expected eval mode. Do not "
            "call .train() on a frozen part; batch statistics mix the examples."
        )


def mixes_examples(layer: nn.Module) -> bool:
    """Whether one example's output of this layer would depend on the others, or leave traces in its buffers."""
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return layer.training and layer.track_running_stats
    if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return False
    return layer.training or any(parameter.requires_grad for parameter in layer.parameters())


def _has(trainer: pl.Trainer, callback: type[pl.Callback]) -> bool:
    return any(isinstance(one, callback) for one in trainer.callbacks)  # type: ignore[attr-defined]  # set where type checkers do not see it


def _given(sampler: Any) -> Any:
    """The user's sampler inside Lightning's wrapper under DDP."""
    return getattr(getattr(sampler, "dataset", None), "_sampler", sampler)


def _check_sampler(sampler: Any, dataset: Any) -> None:
    """Refuse a sampler under which examples are not all drawn, or not all as often."""
    name, size = type(sampler).__name__, len(dataset)
    if isinstance(sampler, RandomSampler) and type(sampler) is RandomSampler:
        if not sampler.replacement and sampler.num_samples == size:
            return
        remedy = "Remove the sampler"
        if sampler.num_samples < size:
            remedy = (
                "To train on a part, the same in every epoch, give torch.utils.data.Subset(dataset, indices) without the "
                f"sampler; for epochs of {sampler.num_samples} of all {size} examples, shuffle=True and Trainer("
                "limit_train_batches=...)"
            )
        raise PreflightError(
            f"sampler={name}(replacement={sampler.replacement}, num_samples={sampler.num_samples}): expected none "
            f"(shuffle=True or False). Poisson sampling draws from all {size} examples, each with the same probability. {remedy}."
        )
    if type(sampler) in (SequentialSampler, DistributedSampler):
        return
    if _chooses_a_part(sampler, size):
        raise PreflightError(
            f"sampler={name} over a part of the {size} examples: expected none, with a dataset of that part. Poisson sampling "
            "draws from the whole dataset, and without the sampler it would train on what was left out too, such as a "
            "validation part. Give DataLoader(torch.utils.data.Subset(dataset, indices), shuffle=True) with the sampler's "
            "indices."
        )
    raise PreflightError(
        f"sampler={name}: expected none (shuffle=True or False). Every example must be drawn with "
        "the same probability, or the ε reported is wrong for the examples drawn more often. Remove the sampler; to "
        "weight examples, weight their losses. If it leaves examples out, give torch.utils.data.Subset(dataset, indices)."
    )


def _chooses_a_part(sampler: Any, size: int) -> bool:
    """Whether a sampler of indices without repetition leaves some out, by what it says of itself."""
    if getattr(sampler, "replacement", False) or hasattr(sampler, "weights"):
        return False
    indices = getattr(sampler, "indices", None)
    try:
        return len(indices if indices is not None else sampler) < size
    except TypeError:
        return False
