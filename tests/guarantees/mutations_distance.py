"""Planted bugs in what separates a run from the mechanism that is composed: cut draws and discrete noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning_dp.accounting.ledger as ledger_module
import lightning_dp.loader as loader_module
from lightning_dp.accounting import Distance
from tests.guarantees.mutations import patched

# --- cut draws --------------------------------------------------------------------------------------------------------


@contextmanager
def cuts_are_free() -> Iterator[None]:
    """Draws are cut and accounted for as if they were not, as a fixed-size buffer does it."""
    original = ledger_module.distance_of_step

    def distance(**numbers: Any) -> Distance:
        return original(**{**numbers, "max_batch_size": None})

    with patched((ledger_module, "distance_of_step", distance)):
        yield


@contextmanager
def cuts_are_paid_for_once() -> Iterator[None]:
    """The probability of a cut is taken for one step, not for all of them."""
    original = ledger_module._Entry.distance

    def distance(self: Any) -> Distance:
        return original(replace(self, steps=min(1, self.steps)))

    with patched((ledger_module._Entry, "distance", distance)):
        yield


@contextmanager
def draws_are_not_cut() -> Iterator[None]:
    """The bound is accounted for and not kept."""
    with patched((loader_module, "cut", lambda generator, drawn, bound: drawn)):
        yield


@contextmanager
def each_rank_cuts_for_itself() -> Iterator[None]:
    """The bound is kept by every rank, so that all of them together exceed it."""

    def cut(generator: Any, drawn: Any, bound: int) -> Any:
        return drawn[: 2 * bound]

    with patched((loader_module, "cut", cut)):
        yield
