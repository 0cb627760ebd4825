"""The private twins of Lightning's single-device, DDP and model-parallel (FSDP2) strategies.

Each has its stock class as its only base (so that a stock strategy can be turned into its twin by assigning
``__class__``) and delegates to one :class:`PrivateFit`. What all of them do is written once, in ``_EveryTwin``;
:func:`private_twin` gives it to a class that says no more than what is different about its strategy. The classes here are upon
``lightning``; :func:`twins` makes them again upon ``pytorch_lightning`` for a Trainer from there.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import (
    DDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dp.errors import PreflightError
from lightning_dp.lightning_internals import (
    PYTORCH_LIGHTNING,
    fill,
    loaded_roots,
    namesake,
    own,
    root_of,
    set_device,
    share_over,
    strategy_registry,
    sync_module_states,
)
from lightning_dp.loading.loader import LogicalBatch
from lightning_dp.look.trainer import check_strategy
from lightning_dp.ranks.gathering import on_every_rank
from lightning_dp.ranks.lost_ranks import naming_absent_nodes, naming_lost_ranks
from lightning_dp.ranks.sharding import check_gather, check_sharding, full_parameters, in_shards, reshard
from lightning_dp.ranks.world import Gather, world_of
from lightning_dp.record.checkpoint import check_before_reading, read_checkpoint
from lightning_dp.step.private_step import PrivateStep

TwinT = TypeVar("TwinT", bound=type[Strategy])


class PrivateFit(Protocol):
    """What a twin asks of the fit under way, in this order."""

    def process_dataloader(self, dataloader: object) -> object:
        """The private loader in the place of the user's. The plan is made here."""

    def shown_to_hooks(self, sample: LogicalBatch) -> Any:
        """What hooks and callbacks get for the batch of a step."""

    def before_step(self) -> None:
        """After all hooks, before each step; before the first one, the look."""

    @property
    def step(self) -> PrivateStep:
        """The private step."""

    def teardown(self) -> None:
        """Leave the module as it was found."""


class _EveryTwin(SingleDeviceStrategy):
    """What every private twin does. Never made: its methods are copied, and their ``super()`` is the twin's.

    It is written upon one stock strategy, as good as any other, so that type checkers know what ``super()`` is.
    """

    private_fit: PrivateFit | None = None

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        require(self, trainer)
        super().setup(trainer)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(super().load_checkpoint, checkpoint_path, weights_only)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        with naming_lost_ranks(world_of(self)):
            super().barrier(*args, **kwargs)

    @override
    def broadcast(self, *args: Any, **kwargs: Any) -> Any:
        with naming_lost_ranks(world_of(self)):
            return super().broadcast(*args, **kwargs)

    @override
    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        with naming_lost_ranks(world_of(self)):
            return super().reduce(*args, **kwargs)

    @override
    def process_dataloader(self, dataloader: object) -> object:
        module = self.lightning_module
        if module is None or not module.trainer.training:
            return dataloader
        return fit_of(self).process_dataloader(dataloader)

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        if isinstance(batch, LogicalBatch):
            return fit_of(self).shown_to_hooks(batch)
        return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        fit_of(self).before_step()
        super().on_train_batch_start(batch, batch_idx)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        return fit_of(self).step.training_step(*args, **kwargs)

    @override
    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        return fit_of(self).step.backward(closure_loss, **kwargs)

    @override
    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        return super().optimizer_step(optimizer, fit_of(self).step.step_closure(optimizer, closure), model, **kwargs)

    @override
    def teardown(self) -> None:
        if self.private_fit is not None:
            self.private_fit.teardown()
            self.private_fit = None
        super().teardown()


PrivateStrategy = _EveryTwin
"""For type checkers: a strategy that has been made private."""

TWINS: dict[type[Strategy], type[PrivateStrategy]] = {}
"""Stock strategy → its private twin."""


def private_twin(stock: type[Strategy]) -> Callable[[TwinT], TwinT]:
    """Make a class, whose only base is ``stock``, the private twin of it.

    The class gets every method of ``_EveryTwin`` that it does not define itself. A new twin is such a class, with
    ``strategy_name``, what its ranks have to do beside that, and a test.
    """

    def filled(twin: TwinT) -> TwinT:
        fill(twin, _EveryTwin)
        TWINS[stock] = cast(type[PrivateStrategy], twin)
        return twin

    return filled


def twins(root: str) -> dict[type[Strategy], type[PrivateStrategy]]:
    """Stock strategy → private twin, both of one of Lightning's roots."""
    found = ((namesake(root, stock), twin) for stock, twin in TWINS.items())
    return {stock: _upon(root, twin) for stock, twin in found if stock is not None}


@cache
def _upon(root: str, twin: type[PrivateStrategy]) -> type[PrivateStrategy]:
    """The same twin upon the stock class of this root, under a name by which a spawned process finds it."""
    if root_of(twin) == root:
        return twin
    named = {"__module__": twin.__module__, "__doc__": twin.__doc__, "__qualname__": f"{twin.__name__}{_UPON}{root}"}
    made = cast(Any, type(twin))(twin.__name__, (own(root, twin.__bases__[0]),), named)
    fill(made, twin)
    return cast(type[PrivateStrategy], made)


_UPON = "_upon_"


def __getattr__(name: str) -> Any:
    twin, _, root = name.partition(_UPON)
    if root == PYTORCH_LIGHTNING and twin in {one.__name__ for one in TWINS.values()}:
        return _upon(root, globals()[twin])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@private_twin(SingleDeviceStrategy)
class PrivateSingleDeviceStrategy(SingleDeviceStrategy):
    """Lightning's single-device strategy with private training steps; ``strategy="private"``.

    Validation, testing, prediction, checkpoints and precision are the stock strategy's. It needs the
    :class:`~lightning_dp.DifferentialPrivacy` callback and refuses to fit without it.
    """

    strategy_name = "private"

    @property
    def parallel_devices(self) -> list[torch.device]:
        """The one device; Lightning's connector sets it when the strategy is asked for by name."""
        return []

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) != 1:
            raise PreflightError(
                f"strategy='private' with {len(devices)} devices: expected one. Use strategy='private_ddp' for several."
            )
        set_device(self, devices[0])


@private_twin(DDPStrategy)
class PrivateDDPStrategy(DDPStrategy):
    """Lightning's DDP strategy with private training steps; ``strategy="private_ddp"``.

    The module is not wrapped in ``DistributedDataParallel``: the ranks' sums of clipped gradients are added up once a
    step, in one all-reduce, so ranks may hold different numbers of examples. It needs the
    :class:`~lightning_dp.DifferentialPrivacy` callback and refuses to fit without it.
    """

    strategy_name = "private_ddp"

    @override
    def setup_distributed(self) -> None:
        with naming_absent_nodes(self.num_nodes, self.num_processes):
            super().setup_distributed()

    @override
    def configure_ddp(self) -> None:
        """Start all ranks from rank 0's parameters and buffers, which is all that is needed of the DDP wrapper."""
        assert self.model is not None
        with naming_lost_ranks(world_of(self)):
            sync_module_states(self.model)

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        for name, start_method in (
            ("private_ddp", "popen"),
            ("private_ddp_spawn", "spawn"),
            ("private_ddp_fork", "fork"),
            ("private_ddp_notebook", "fork"),
        ):
            strategy_registry.register(
                name,
                cls,
                description=f"Private DDP with start_method '{start_method}'",
                start_method=start_method,
            )


@private_twin(ModelParallelStrategy)
class PrivateModelParallelStrategy(ModelParallelStrategy):
    """Lightning's model-parallel strategy with private training steps; ``strategy="private_fsdp"``.

    Parameters, the gradient that the optimizer gets and the optimizer's state are sharded by ``fully_shard``, which the
    module's ``configure_model`` calls. For the length of a step every rank holds the parameters whole, and each sums the
    clipped gradients of its own examples; each then gets its shards of the ranks' total by one reduce-scatter. With
    ``gather="layer"`` no rank ever holds all parameters or the whole sum. It needs the
    :class:`~lightning_dp.DifferentialPrivacy` callback and refuses to fit without it.

    Args:
        data_parallel_size: how many ranks share the parameters; ``"auto"`` for all of them.
        tensor_parallel_size: 1.
        save_distributed_checkpoint: ``True`` for a folder with a file for each rank, ``False`` for one file.
        process_group_backend: as for the stock strategy.
        timeout: as for the stock strategy.
        gather: how long the parameters are whole: for a ``"step"``, or each matrix only while its ``"layer"`` runs. That
            takes less memory, and two gathers and a reduction for each micro-batch; it needs the engine ``ghost``.

    Raises:
        ValueError: ``gather`` is neither.
        PreflightError: ``tensor_parallel_size`` is above 1, or parameters are not sharded over all ranks.
    """

    strategy_name = "private_fsdp"
    gather: Gather = "step"

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        gather: Gather = "step",
    ) -> None:
        self.gather = check_gather(gather)
        super().__init__(
            data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout
        )

    @override
    def setup_environment(self) -> None:
        share_over(self, self.num_nodes * self.num_processes)
        with naming_absent_nodes(self.num_nodes, self.num_processes):
            super().setup_environment()

    @override
    def setup(self, trainer: pl.Trainer) -> None:
        require(self, trainer)
        reshard(trainer.lightning_module)  # as an evaluation before this fit may not have left it
        if trainer.state.fn == TrainerFn.FITTING:
            tensor_parallel = self.device_mesh["tensor_parallel"].size()
            check_sharding(trainer.lightning_module, world_of(self).size, tensor_parallel)
        super().setup(trainer)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        if weights_only is not False:  # False is the caller's own risk, and nothing is looked through
            on_every_rank(world_of(self), lambda: check_before_reading(path), PreflightError)
        return read_checkpoint(super().load_checkpoint, path, weights_only, weights_apart=True)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        step = fit_of(self).step
        module, world = step.run.planned.module, step.run.planned.world
        with in_shards(module) if self.gather == "layer" else full_parameters(module, world):
            return step.training_step(*args, **kwargs)

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        for name, gather in ((cls.strategy_name, "step"), (f"{cls.strategy_name}_by_layer", "layer")):
            strategy_registry.register(name, cls, description=f"Private FSDP2, whole for a {gather}", gather=gather)


def make_private(strategy: Strategy) -> PrivateStrategy:
    """Turn a stock strategy object into its private twin, in place; a private strategy stays as it is.

    Raises:
        PreflightError: the strategy has no private twin.
    """
    known = twins(root_of(strategy))
    check_strategy(strategy, (*known, *known.values()))
    if type(strategy) in known:
        strategy.__class__ = known[type(strategy)]
    return cast(PrivateStrategy, strategy)


def is_private(strategy: Strategy) -> bool:
    """Whether the strategy is a private twin."""
    return isinstance(strategy, tuple(twins(root_of(strategy)).values()))


def register_strategies() -> None:
    """Make ``private``, ``private_ddp`` and its start methods, and ``private_fsdp`` known to ``Trainer(strategy=...)``.

    Of every root that is loaded by now. It is done again when a DifferentialPrivacy is made, which is before the Trainer that
    gets it.
    """
    for root in loaded_roots():
        registry = strategy_registry(root)
        for twin in twins(root).values():
            if twin.strategy_name not in registry:
                twin.register_strategies(registry)


def fit_of(strategy: Strategy) -> PrivateFit:
    """The fit under way of a twin.

    Raises:
        PreflightError: there is none, because the callback is missing.
    """
    private = cast(PrivateStrategy, strategy)
    if private.private_fit is None:
        raise PreflightError(
            f"strategy={private.strategy_name!r} without DifferentialPrivacy: expected the callback, which holds the "
            "plan. Add lightning_dp.DifferentialPrivacy(...) to Trainer(callbacks=[...]), or use a stock strategy."
        )
    return private.private_fit


def require(strategy: Strategy, trainer: pl.Trainer) -> None:
    """Refuse a fit without the callback.

    Raises:
        PreflightError: it is missing.
    """
    if trainer.state.fn == TrainerFn.FITTING:
        fit_of(strategy)


register_strategies()
