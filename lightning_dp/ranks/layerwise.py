"""Sharded parameters that are brought together for one layer at a time, and sums that are never whole on any rank.

Bringing a layer together takes all ranks, but ranks differ: in how many micro-batches they need, whether they have
any example at all, in how many groups the examples of a micro-batch run. So the ranks go through one common list of
collective calls, which the first pass on a few examples writes down, as often as any of them has something to run. A rank
that has nothing more, or whose pass ended half-way, still takes its part in the calls and adds zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from lightning_dp.mechanism.adaptive import INDICATOR
from lightning_dp.mechanism.clip import accumulation_dtype
from lightning_dp.mechanism.noise import Parts
from lightning_dp.mechanism.reduce import flatten
from lightning_dp.mechanism.release import Collective
from lightning_dp.mechanism.shards import by_rank, of_rank
from lightning_dp.ranks.gathering import gathered
from lightning_dp.ranks.lost_ranks import naming_lost_ranks
from lightning_dp.ranks.world import World

BRING, ADD = "bring", "add"


class LayerOrderError(RuntimeError):
    """A training step used its layers in another order than the one all ranks have agreed on."""


class Layerwise:
    """A :class:`~lightning_dp.engines.keeper.Keeper` of parameters that FSDP2 keeps in shards.

    Args:
        world: whose ranks.
        parameters: all parameters of the module, by name, as FSDP2 keeps them.
        names: of those to bring together layer by layer. The others are whole for the length of a step.

    Attributes:
        names: as given.
        order: the collective calls of a pass, once the first has been made.
    """

    def __init__(self, world: World, parameters: Mapping[str, DTensor], names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self.order: list[tuple[str, str]] | None = None
        self._world, self._parameters = world, dict(parameters)
        mesh = next(iter(self._parameters.values())).device_mesh
        self._mesh, self._ranks, self._rank, self._group = mesh, mesh.size(), mesh.get_local_rank(), mesh.get_group()
        self._types = list(dict.fromkeys(p.dtype for p in self._parameters.values()))
        self._sums: dict[str, Tensor] | None = None
        self._trainable: frozenset[str] = frozenset()
        self._written: list[tuple[str, str]] = []
        self._at, self._step, self._lost = 0, 0, False

    def begin(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Start a step with sums of zero. A collective call.

        Args:
            step: its number, for messages.

        Returns:
            The trainable parameters by name, those that are brought layer by layer in shards and the others whole; and the
            frozen ones that are not brought layer by layer, whole.
        """
        self._step, self._lost, self._sums = step, False, {}
        others = [name for name in self._parameters if name not in self.names]
        of_type = {dtype: [n for n in others if self._parameters[n].dtype == dtype] for dtype in self._types}
        together = {
            name: tensor for names in of_type.values() if names for name, tensor in self._together(names).items()
        }
        trained = {name: p for name, p in self._parameters.items() if p.requires_grad}
        self._trainable = self.names & trained.keys()
        given = {name: together.get(name, p) for name, p in trained.items()}
        return given, {name: tensor for name, tensor in together.items() if name not in trained}

    def finish(self) -> None:
        """Wait until no rank has anything to run; this rank then has its rows of all sums. A collective call."""
        while self._anybody(working=False):
            self._at = 0
            self._play_to_the_end()

    def taken(self) -> dict[str, Tensor]:
        """This rank's rows of the sums over all ranks, by name, in the accumulation type. **Private**, and given once.

        A trainable parameter of which no rank had an example is zero.
        """
        sums, self._sums = self._sums, None
        if sums is None:
            raise RuntimeError(
                "the sums of a step were asked for twice, or after a pass that failed: expected once, after passes that have "
                "all ended. Do not call backward again for one training_step, and let errors end the fit."
            )
        zeros = {name: p.to_local().detach() for name, p in self._parameters.items() if name in self._trainable}
        return {
            name: sums[name] if name in sums else torch.zeros_like(p, dtype=accumulation_dtype(p.dtype))
            for name, p in zeros.items()
        }

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """See :class:`~lightning_dp.engines.keeper.Keeper`. A pass that ends half-way lets the others' go on."""
        self._at, self._written = 0, []
        if self.order is not None:
            self._anybody(working=True)
        try:
            yield
        except Exception:
            if self._passed(ADD):
                self._sums = None  # of half a pass: not to be released
            if not self._lost:
                self._play_to_the_end()
            raise
        self._play_to_the_end()
        if self.order is None:
            self.order = self._written

    def bring(self, name: str) -> Tensor:
        """See :class:`~lightning_dp.engines.keeper.Keeper`."""
        self._go_to(BRING, name)
        return self._whole(name)

    def add(self, name: str, total: Tensor | None) -> None:
        """See :class:`~lightning_dp.engines.keeper.Keeper`."""
        self._go_to(ADD, name)
        self._add(name, total)

    def check_order(self) -> None:
        """Raise on every rank unless all of them wrote down the same calls. A collective call.

        Raises:
            LayerOrderError: they did not.
        """
        orders = gathered(self._world, self.order)
        for rank, order in enumerate(orders):
            if order != orders[0]:
                raise LayerOrderError(
                    f"rank {rank} used its layers in another order than rank 0: expected the same for the same examples. "
                    "Use gather='step'."
                )

    def collective(self) -> Collective:
        """How a step's sums become its gradient: this rank holds its rows of what is added up, and gives them their noise.

        Those are the same numbers as in one process. ``held`` takes this rank's sums for the trainable parameters that are not
        brought layer by layer; it is a collective call, and takes the others' rows.
        """
        order: list[str] = []

        def held(rest: Mapping[str, Tensor]) -> tuple[Parts, int]:
            beside = {name: sum_ for name, sum_ in rest.items() if name == INDICATOR}
            rest = {name: sum_ for name, sum_ in rest.items() if name not in beside}
            mine = {name: rows.contiguous() for name, rows in self.taken().items()}
            order.extend(name for name in self._parameters if name in rest or name in mine)
            if rest:
                mine |= self._scattered({name: rest[name] for name in order if name in rest})
            place, parts = 0, []
            for name in order:
                p = self._parameters[name]
                parts.append((place + self._rank * self._chunk(name) * p.shape[1:].numel(), mine[name]))
                place += p.numel()
            for name, total in beside.items():  # whole on every rank, and every rank draws the same noise for it
                order.append(name)
                parts.append((place, self._world_sum(total)))
                place += total.numel()
            return parts, place

        def named(totals: Sequence[Tensor], _: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: rows if name == INDICATOR else self._as_parameter(name, rows)
                for name, rows in zip(order, totals, strict=True)
            }

        return Collective(held=held, named=named)

    def _world_sum(self, own: Tensor) -> Tensor:
        """The sum over the ranks, on every rank."""
        total = own.clone()
        with self._call():
            dist.all_reduce(total, op=dist.ReduceOp.SUM, group=self._group)
        return total

    def _scattered(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's rows of the sums over all ranks, which are made by one call."""
        given = by_rank(flatten(own), own, self._ranks)
        part = given.new_empty(given.numel() // self._ranks)
        with self._call():
            dist.reduce_scatter_tensor(part, given, op=dist.ReduceOp.SUM, group=self._group)
        return {name: rows.contiguous() for name, rows in of_rank(part, own, self._rank, self._ranks).items()}

    def _as_parameter(self, name: str, local: Tensor) -> Tensor:
        p = self._parameters[name]
        sharded: Tensor = DTensor.from_local(
            local, self._mesh, (Shard(0),), run_check=False, shape=p.shape, stride=p.stride()
        )
        return sharded

    def _chunk(self, name: str) -> int:
        """Rows of the first ranks; later ones have the rest or none."""
        return -(-self._parameters[name].shape[0] // self._ranks)

    def _whole(self, name: str) -> Tensor:
        shard = self._padded(name)
        whole = shard.new_empty(self._ranks * len(shard), *shard.shape[1:])
        with self._call():
            dist.all_gather_into_tensor(whole, shard, group=self._group)
        return whole[: self._parameters[name].shape[0]]

    def _together(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Several parameters of one type, whole, by one call."""
        shards = [self._padded(name) for name in names]
        flat = torch.cat([shard.flatten() for shard in shards])
        whole = flat.new_empty(self._ranks * len(flat))
        with self._call():
            dist.all_gather_into_tensor(whole, flat, group=self._group)
        columns = torch.split(whole.view(self._ranks, -1), [shard.numel() for shard in shards], dim=1)
        return {
            name: column.reshape(-1, *shard.shape[1:])[: self._parameters[name].shape[0]]
            for name, column, shard in zip(names, columns, shards, strict=True)
        }

    def _padded(self, name: str) -> Tensor:
        """This rank's rows, and zeros where other ranks have more."""
        shard = self._parameters[name].to_local().detach()
        missing = self._chunk(name) - len(shard)
        return torch.cat([shard, shard.new_zeros(missing, *shard.shape[1:])]) if missing else shard.contiguous()

    def _add(self, name: str, total: Tensor | None) -> None:
        p, chunk = self._parameters[name], self._chunk(name)
        rows, dtype = self._ranks * chunk, accumulation_dtype(p.dtype)
        if total is None or len(total) < rows:
            padded = torch.zeros(rows, *p.shape[1:], dtype=dtype, device=p.device)
            if total is not None:
                padded[: len(total)] = total
            total = padded
        mine = total.new_empty(chunk, *p.shape[1:])
        with self._call():
            dist.reduce_scatter_tensor(mine, total.contiguous(), op=dist.ReduceOp.SUM, group=self._group)
        mine = mine[: len(p.to_local())]
        if self._sums is not None:
            self._sums[name] = mine if name not in self._sums else self._sums[name].add_(mine)

    def _go_to(self, kind: str, name: str) -> None:
        """Take part in the calls before this one, as a layer that is left out at times would have made them."""
        if self.order is None:
            self._written.append((kind, name))
            return
        while self._at < len(self.order) and self.order[self._at] != (kind, name):
            self._play_one()
        if self._at == len(self.order):
            raise LayerOrderError(
                f"{name} is used earlier, or more often, than in the first pass: expected training_step to call its layers in "
                "the order in which it did on the first examples, which is the one the ranks have agreed on. Use "
                "gather='step'."
            )
        self._at += 1

    def _passed(self, kind: str) -> bool:
        """Whether this pass has made a call of that kind."""
        made = self._written if self.order is None else self.order[: self._at]
        return any(one == kind for one, _ in made)

    def _play_to_the_end(self) -> None:
        while self.order is not None and self._at < len(self.order):
            self._play_one()

    def _play_one(self) -> None:
        assert self.order is not None
        kind, name = self.order[self._at]
        self._at += 1
        if kind == BRING:
            self._whole(name)
        else:
            self._add(name, None)

    def _anybody(self, working: bool) -> bool:
        """Whether any rank has something to run in the next pass."""
        flag = torch.tensor([float(working)], device=self._world.device)
        with self._call():
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Around a collective call: remember if it failed, and say who is missing."""
        try:
            with naming_lost_ranks(self._world, self._step):
                yield
        except BaseException:
            self._lost = True
            raise
