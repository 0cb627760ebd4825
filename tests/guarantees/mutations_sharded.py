"""Bugs that only a sharded step can have, planted one at a time. Nothing here is ever right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

import lightning_dp.ranks.sharding as sharding_module
from lightning_dp import DifferentialPrivacy
from tests.guarantees.mutations import patched


@contextmanager
def shards_are_averaged() -> Iterator[None]:
    """FSDP2's own reduction, a mean, where the sum is meant."""
    right = dist.reduce_scatter_tensor

    def wrong(mine: Any, given: Any, *, group: Any, **_: Any) -> None:
        right(mine, given, group=group)
        mine /= dist.get_world_size(group)

    with patched((dist, "reduce_scatter_tensor", wrong)):
        yield


@contextmanager
def own_shard_without_the_others() -> Iterator[None]:
    """Each rank keeps its shard of its own sum: what the others add, noise included, is lost."""

    def wrong(mine: Any, given: Any, **_: Any) -> None:
        mine.copy_(given.view(dist.get_world_size(), -1)[dist.get_rank()])

    with patched((dist, "reduce_scatter_tensor", wrong)):
        yield


@contextmanager
def whole_parameters_are_kept() -> Iterator[None]:
    """The whole parameters of one step are still there at the next, which then trains on old ones."""
    parts: dict[int, Any] = {}
    original = sharding_module.FSDPModule.unshard

    def once(part: Any) -> None:
        original(part)
        stale = parts.setdefault(id(part), [p.detach().clone() for p in part.parameters()])
        for parameter, old in zip(part.parameters(), stale, strict=True):
            parameter.data.copy_(old)

    with patched((sharding_module.FSDPModule, "unshard", once)):
        yield


@contextmanager
def planned_before_the_checkpoint_is_read() -> Iterator[None]:
    """The run is planned in ``on_fit_start``, after which Lightning reads a sharded checkpoint: what was spent is forgotten."""
    with patched(
        (DifferentialPrivacy, "on_fit_start", lambda self, *_: self._under_way.set_up()),
        (DifferentialPrivacy, "on_train_start", lambda self, *_: self._under_way.stop_if_spent()),
    ):
        yield
