"""Planted bugs in what separates a run from the mechanism that is composed: cut draws and discrete noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch

import lightning_dp.accounting.entry as entry_module
import lightning_dp.accounting.phase as phase_module
import lightning_dp.engines.rounded as rounded_module
import lightning_dp.loading.draws as draws_module
import lightning_dp.mechanism.discrete as discrete_module
import lightning_dp.mechanism.grid as grid_module
import lightning_dp.mechanism.release as release_module
from lightning_dp.accounting import Slack
from lightning_dp.plan.mechanism import Mechanism
from tests.guarantees.mutations import patched

# --- cut draws --------------------------------------------------------------------------------------------------------


@contextmanager
def cuts_are_free() -> Iterator[None]:
    """Draws are cut and accounted for as if they were not, as a fixed-size buffer does it."""
    with patched((phase_module, "_where_draws_are_cut", lambda mechanism: None)):
        yield


@contextmanager
def cuts_move_an_example_by_no_more_than_others() -> Iterator[None]:
    """Where a draw is cut, the example that is displaced is forgotten, which moves the sum by C as well."""
    original = phase_module._where_draws_are_cut

    def where_draws_are_cut(mechanism: Mechanism) -> Any:
        found = original(mechanism)
        return found and found._replace(noise_multiplier=2.0 * found.noise_multiplier)

    with patched((phase_module, "_where_draws_are_cut", where_draws_are_cut)):
        yield


@contextmanager
def slack_is_paid_for_once() -> Iterator[None]:
    """The distance from the ideal is taken for one step, not for all of them."""
    original = entry_module.Entry.slack

    def slack(self: Any) -> Slack:
        return original(replace(self, steps=min(1, self.steps)))

    with patched((entry_module.Entry, "slack", slack)):
        yield


@contextmanager
def draws_are_not_cut() -> Iterator[None]:
    """The bound is accounted for and not kept."""
    with patched((draws_module, "cut", lambda generator, drawn, bound: drawn)):
        yield


@contextmanager
def each_rank_cuts_for_itself() -> Iterator[None]:
    """The bound is kept by every rank, so that all of them together exceed it."""

    def cut(generator: Any, drawn: Any, bound: int) -> Any:
        return drawn[: 2 * bound]

    with patched((draws_module, "cut", cut)):
        yield


# --- discrete noise ---------------------------------------------------------------------------------------------------


@contextmanager
def discrete_noise_is_free() -> Iterator[None]:
    """Discrete noise is accounted for as if it were the Gaussian itself."""
    original = entry_module.slack_of

    def slack_of(mechanism: Mechanism) -> Slack:
        return original(mechanism.but(resolution=None))

    with patched((entry_module, "slack_of", slack_of)):
        yield


@contextmanager
def noise_is_drawn_in_floating_point() -> Iterator[None]:
    """A rounded float32 Gaussian where the discrete one is meant: of its numbers, most cannot occur."""

    def rounded(variance: Fraction, count: int, stream: Any) -> Any:
        drawn = np.random.default_rng().standard_normal(count, np.float32) * np.float32(float(variance) ** 0.5)
        return np.rint(drawn).astype(np.int64)

    with patched((discrete_module, "discrete_gaussian", rounded)):
        yield


@contextmanager
def discrete_noise_scaled(factor: Fraction) -> Iterator[None]:
    """The discrete noise has ``factor`` times the variance of the plan."""
    original = discrete_module.discrete_gaussian

    def scaled(variance: Fraction, count: int, stream: Any) -> Any:
        return original(variance * factor, count, stream)

    with patched((discrete_module, "discrete_gaussian", scaled)):
        yield


@contextmanager
def every_rank_adds_discrete_noise() -> Iterator[None]:
    """Each rank adds the whole noise to its own sum."""
    original = release_module.own_share
    with patched(
        (release_module, "own_share", lambda held, number, rank, size, block: original(held, number, 0, 1, block)),
    ):
        yield


@contextmanager
def one_ranks_noise_is_doubled() -> Iterator[None]:
    """The rank that adds the noise of the first coordinates adds it twice."""
    original = discrete_module.add_discrete_noise

    def twice(parts: Any, coordinates: int, **options: Any) -> None:
        for _ in range(2 if parts and parts[0][0] == 0 else 1):
            original(parts, coordinates, **options)

    with patched((discrete_module, "add_discrete_noise", twice)):
        yield


def _rounded(gradient: Any, clip_norm: float, resolution: int, clipped_first: bool) -> Any:
    norm = torch.cat([part.double().flatten() for part in gradient.values()]).norm()
    units = {name: part.double() * (resolution / clip_norm) for name, part in gradient.items()}
    if not clipped_first:  # every coordinate is rounded before the factor is applied, and again, to the nearest
        units = {name: part.round() for name, part in units.items()}
    factor = min(1.0, clip_norm / max(float(norm), 1e-300))
    return {name: (part * factor).round().nan_to_num().to(torch.int64) for name, part in units.items()}


@contextmanager
def rounding_comes_before_clipping() -> Iterator[None]:
    """Integers are made of the gradient as it is, and scaled afterwards."""
    with patched(*_everywhere(lambda gradient, clip, units=2**30: _rounded(gradient, clip, units, False))):
        yield


@contextmanager
def rounding_is_to_the_nearest() -> Iterator[None]:
    """A gradient at the clip norm is rounded to the nearest integers, which may be longer than it is."""
    with patched(*_everywhere(lambda gradient, clip, units=2**30: _rounded(gradient, clip, units, True))):
        yield


@contextmanager
def the_sum_is_rounded_and_not_the_examples() -> Iterator[None]:
    """Examples are added up in floating point, and what comes out is rounded."""

    def clipped_sum(
        self: Any, loss: Any, parameters: Any, batch: Any, examples: int, clip_norm: float, **_: Any
    ) -> Any:
        whole = self.engine.clipped_sum(loss, parameters, batch, examples, clip_norm)
        unit = self.resolution / clip_norm
        whole.gradient = {name: (g.double() * unit).round().to(torch.int64) for name, g in whole.gradient.items()}
        return whole

    with patched((rounded_module.RoundedEngine, "clipped_sum", clipped_sum)):
        yield


def _everywhere(wrong: Any) -> list[tuple[Any, str, Any]]:
    return [(grid_module, "to_grid", wrong), (rounded_module, "to_grid", wrong)]
