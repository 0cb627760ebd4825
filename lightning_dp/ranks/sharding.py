"""Parameters that FSDP2 keeps in shards: whole for the length of a private step, and a gradient's shards back to them.

``fully_shard`` brings a layer's parameters together in hooks around its forward pass, which neither vmap nor a
``functional_call`` with other parameters knows of. So for a private step the whole module is brought together once
(FSDP2's own ``unshard``), its hooks are left out, and the engines see a module like any other. Afterwards each rank keeps
its shards again, and gets the sum over the ranks of its shards of the gradient alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from lightning_dp.errors import PreflightError
from lightning_dp.mechanism.adaptive import INDICATOR
from lightning_dp.mechanism.release import Collective
from lightning_dp.mechanism.shards import by_rank, of_rank
from lightning_dp.ranks.lost_ranks import naming_lost_ranks
from lightning_dp.ranks.world import Gather, World
from lightning_dp.validate import shown


def check_gather(gather: str) -> Gather:
    """``gather`` if it is one of :data:`Gather`.

    Raises:
        ValueError: it is not.
    """
    if gather == "step" or gather == "layer":
        return gather  # type: ignore[return-value]  # narrowed by ==, which mypy follows for enums alone
    raise ValueError(f"gather={shown(gather)}: expected 'step' or 'layer'.")


def check_sharding(module: pl.LightningModule, ranks: int, tensor_parallel: int) -> None:
    """Refuse modules whose parameters are cut in another way than ``fully_shard`` cuts them over all ranks.

    Args:
        module: after ``configure_model``.
        ranks: how many processes train together.
        tensor_parallel: over how many of them each layer is cut.

    Raises:
        PreflightError: see the message.
    """
    if tensor_parallel > 1:
        raise PreflightError(
            f"tensor_parallel_size={tensor_parallel}: expected 1. A rank that holds a part of each layer cannot take its "
            f"examples' gradients alone. Use ModelParallelStrategy(data_parallel_size={ranks}, tensor_parallel_size=1), or "
            "strategy='private_fsdp'."
        )
    if not module.automatic_optimization:
        raise PreflightError(
            "automatic_optimization=False with sharded parameters: expected True. Optimizers would step in the middle of a "
            "training_step, for whose length the parameters are whole. Use strategy='ddp'."
        )
    for name, parameter in module.named_parameters():
        if parameter.is_complex() and parameter.requires_grad:
            raise PreflightError(
                f"{name} is complex and sharded: expected real parameters under 'private_fsdp'. Keep real and imaginary parts "
                "as real parameters (torch.view_as_complex where they are used), or use strategy='ddp'."
            )
        if not isinstance(parameter, DTensor):
            if parameter.requires_grad:
                raise PreflightError(
                    f"{name} is not sharded: expected every trainable parameter to be. Its copies on the ranks would "
                    "drift apart. End configure_model with fully_shard on the module that holds all others, such as "
                    "fully_shard(self.net, mesh=self.device_mesh['data_parallel'])."
                )
        elif parameter.device_mesh.size() != ranks or tuple(parameter.placements) != (Shard(0),):
            raise PreflightError(
                f"{name} with placements={parameter.placements} on a mesh of shape {tuple(parameter.device_mesh.shape)}: "
                f"expected (Shard(dim=0),) on a mesh of all {ranks} ranks. Use fully_shard alone, with "
                "mesh=self.device_mesh['data_parallel']; tensor parallelism, replicated groups of shards and other "
                "placements have no private step."
            )


_WHOLE: WeakSet[nn.Module] = WeakSet()
"""The modules inside :func:`full_parameters`."""


@contextmanager
def full_parameters(module: nn.Module, world: World | None = None) -> Iterator[None]:
    """The module with all its parameters whole, and without the hooks that would take them apart again.

    A collective call: every rank brings its shards. A module without shards is left as it is, and so is one that is whole
    already.

    Args:
        module: any module; its parts that ``fully_shard`` was called on are found.
        world: whose ranks bring their shards, to name those that are gone.

    Raises:
        RankLostError: a rank is gone.
        PreflightError: a ``mp_policy`` changed the parameters' type.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    if not parts or module in _WHOLE:
        yield
        return
    reshard(module)  # an evaluation leaves some parts whole, with the parameters of then
    stored = {name: parameter.dtype for name, parameter in module.named_parameters()}
    _WHOLE.add(module)
    try:
        with nullcontext() if world is None else naming_lost_ranks(world):
            for part in parts:
                part.unshard()
        _check_dtypes(module, stored)
        with without_hooks(module):
            yield
    finally:
        _WHOLE.discard(module)
        reshard(module)


@contextmanager
def without_hooks(module: nn.Module) -> Iterator[None]:
    """The module without FSDP2's hooks: nothing brings its parameters together, or takes them apart, by itself."""
    hooks = _fsdp_hooks(module)
    try:
        for owner, key, _ in hooks:
            del owner[key]
        yield
    finally:
        _put_back(hooks)


@contextmanager
def in_shards(module: nn.Module) -> Iterator[None]:
    """The module with its parameters in shards and without hooks, for somebody who brings them layer by layer."""
    reshard(module)
    with without_hooks(module):
        yield


def reshard(module: nn.Module) -> None:
    """Let every rank keep its shards alone."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def collective_of(world: World, module: nn.Module, names: Iterable[str]) -> Collective:
    """How the ranks' sums become the one gradient: by one all-reduce, or to each rank its shards by one reduce-scatter.

    Args:
        world: whose ranks add up.
        module: whose parameters are in shards or were never sharded.
        names: of the parameters whose gradients are added up, in their order in the flat sum.

    Returns:
        An argument of :func:`lightning_dp.mechanism.release.release`. The gradients that come of it have the shape, and
        if they are sharded the placement, of the parameters.

    Raises:
        RuntimeError: some of the parameters are sharded and others are not.
    """
    named = dict(module.named_parameters())
    wanted = [name for name in names if name != INDICATOR]
    parameters = {name: parameter for name in wanted if isinstance(parameter := named[name], DTensor)}
    if not parameters:
        return Collective(world.rank, world.size, total=world.sum)
    if len(parameters) != len(wanted):
        raise RuntimeError(
            f"{len(parameters)} of {len(wanted)} parameters are sharded: expected all of them or none. Do not change the "
            "module's parameters during training."
        )
    mesh = next(iter(parameters.values())).device_mesh
    ranks, group = mesh.size(), mesh.get_group()

    coordinates = sum(parameter.numel() for parameter in parameters.values())

    def reduce_scatter(flat: Tensor) -> Tensor:
        """This rank's shards of the sum, and behind them the whole sum of what adapts C."""
        given, beside = by_rank(flat[:coordinates], parameters, ranks), flat[coordinates:].clone()
        mine = given.new_empty(given.numel() // ranks)
        dist.reduce_scatter_tensor(mine, given, op=dist.ReduceOp.SUM, group=group)
        if beside.numel():
            dist.all_reduce(beside, op=dist.ReduceOp.SUM, group=group)
        return torch.cat([mine, beside])

    def shards(totals: Sequence[Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        beside = {name: tensor for name, tensor in like.items() if name == INDICATOR}
        size = totals[0].numel() - sum(tensor.numel() for tensor in beside.values())
        like = {name: tensor for name, tensor in like.items() if name not in beside}
        found: dict[str, Tensor] = {
            name: DTensor.from_local(
                local,
                mesh,
                (Shard(0),),
                run_check=False,
                shape=parameters[name].shape,
                stride=parameters[name].stride(),
            )
            for name, local in of_rank(totals[0][:size], like, mesh.get_local_rank(), ranks).items()
        }
        return found | dict.fromkeys(beside, totals[0][size:])

    return Collective(world.rank, world.size, total=reduce_scatter, named=shards)


Hooks = list[tuple[MutableMapping[int, Any], int, dict[int, Any]]]
"""(a module's table of hooks, the key of one of FSDP2's, the whole table as it was)."""


def _fsdp_hooks(module: nn.Module) -> Hooks:
    """FSDP2's hooks around the forward passes of ``module`` and what is in it."""
    return [
        (table, key, dict(table))
        for part in module.modules()
        for table in (part._forward_pre_hooks, part._forward_hooks)
        for key, hook in table.items()
        if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp")
    ]


def _put_back(hooks: Hooks) -> None:
    """All hooks in their old order, then those that were registered meanwhile."""
    for table, _, before in hooks:
        since = dict(table)
        table.clear()
        table.update({**before, **since})


def _check_dtypes(module: nn.Module, stored: Mapping[str, Any]) -> None:
    for name, parameter in module.named_parameters():
        if parameter.dtype != stored[name]:
            raise PreflightError(
                f"mp_policy with param_dtype={parameter.dtype}: expected fully_shard without a mp_policy. It acts in hooks "
                "that a private step leaves out. Use Trainer(precision='bf16-mixed') or 'bf16-true'."
            )
