"""Bugs that only a step with parameters brought layer by layer can have, planted one at a time. Nothing here is right."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning_dp.mechanism.gaussian as gaussian_module
from lightning_dp.ranks.layerwise import Layerwise
from tests.guarantees.mutations import patched

_add_noise = gaussian_module.add_gaussian_noise


@contextmanager
def no_shard_gets_noise() -> Iterator[None]:
    """The sums are reduced, and nobody adds the noise of the coordinates that it keeps."""
    with patched((gaussian_module, "add_gaussian_noise", lambda *_, **__: None)):
        yield


@contextmanager
def noise_is_added_twice() -> Iterator[None]:
    """As if two ranks had added the noise of the same coordinates."""

    def twice(shards: Any, *rest: Any, **named: Any) -> None:
        for _ in range(2):
            _add_noise(shards, *rest, **named)

    with patched((gaussian_module, "add_gaussian_noise", twice)):
        yield


@contextmanager
def every_shard_gets_the_same_noise() -> Iterator[None]:
    """Each rank begins at the first coordinate: one noise for several coordinates, and their difference without any."""

    def from_the_beginning(shards: Any, coordinates: int, **named: Any) -> None:
        for _, shard in shards:
            _add_noise([(0, shard)], coordinates, **named)

    with patched((gaussian_module, "add_gaussian_noise", from_the_beginning)):
        yield


@contextmanager
def an_idle_rank_forgets_what_it_receives() -> Iterator[None]:
    """A rank without examples takes part in the calls, but drops its rows of the others' sums."""
    finish = Layerwise.finish

    def forgetful(self: Any) -> None:
        sums = dict(self._sums)
        finish(self)
        self._sums = sums

    with patched((Layerwise, "finish", forgetful)):
        yield


@contextmanager
def the_last_pass_alone_counts() -> Iterator[None]:
    """Each micro-batch's sums replace those of the one before."""
    add = Layerwise._add

    def replacing(self: Any, name: str, total: Any) -> None:
        self._sums.pop(name, None)
        add(self, name, total)

    with patched((Layerwise, "_add", replacing)):
        yield
