"""Is what was added to a sum the noise of the plan: as large, independent of the sum, and new at every step?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import torch
from scipy import stats
from torch import Tensor

FALSE_ALARM = 1e-9
"""How likely a run that follows its plan is taken for one that does not, all tests of its noise together."""


@dataclass(frozen=True)
class Noised:
    """One release.

    Attributes:
        step: its step.
        noise: parameter → what was added to the sum.
        total: parameter → the sum.
        std: σC, the standard deviation that the plan says.
    """

    step: int
    noise: dict[str, Tensor]
    total: dict[str, Tensor]
    std: float


@dataclass(frozen=True)
class Unlikely:
    """A test that failed: at which step, of which parameter, and what was found."""

    step: int
    name: str
    text: str


def noise_fault(releases: list[Noised]) -> Unlikely | None:
    """The first test that the noise of these releases fails, ``None`` if it passes all.

    The squares of a release's noise over (σC)² add up to a χ² number with as many degrees of freedom as there are
    coordinates, for each parameter and altogether; half the squared distance between two releases' noise does; and the
    product with the sum, over its length and σC, is a normal number, since nobody knows the noise when the sum is made. Each is
    tested on both sides, at :data:`FALSE_ALARM` over the number of tests (Bonferroni).

    Args:
        releases: of one run, in order.
    """
    tests = [test for release in releases for test in _of_one(release)]
    tests += [test for first, second in combinations(releases, 2) for test in _of_two(first, second)]
    level = FALSE_ALARM / max(1, len(tests))
    return next((found for probability, found in tests if not probability >= level), None)


Test = tuple[float, Unlikely]


def _of_one(release: Noised) -> Iterator[Test]:
    if release.std == 0:
        return
    parts = {**release.noise, "all parameters": _flat(release.noise)}
    for name, noise in parts.items():
        squares, numbers = float(noise.double().square().sum()) / release.std**2, noise.numel()
        if numbers:
            text = (
                f"what was added to the sum has standard deviation {(squares / numbers) ** 0.5:.4g} times σC, in {numbers} "
                "coordinates: expected 1"
            )
            yield _two_sided(squares, numbers), Unlikely(release.step, name, text)
    total, noise = _flat(release.total), parts["all parameters"]
    length = float(total.double().norm())
    if length > 0:
        along = float(total.double() @ noise.double()) / length / release.std
        text = f"what was added to the sum points along the sum, {along:.3g} standard deviations far: expected about 1 or less"
        yield 2.0 * float(stats.norm.sf(abs(along))), Unlikely(release.step, "all parameters", text)


def _of_two(first: Noised, second: Noised) -> Iterator[Test]:
    if min(first.std, second.std) == 0 or first.noise.keys() != second.noise.keys():
        return
    one, other = _flat(first.noise) / first.std, _flat(second.noise) / second.std
    squares = float((one - other).double().square().sum()) / 2.0
    text = (
        f"its noise and that of step {first.step} differ by {(squares / one.numel()) ** 0.5:.3g} times what independent noise "
        "does: expected 1. The difference of two releases with the same noise has none"
    )
    yield _two_sided(squares, one.numel()), Unlikely(second.step, "all parameters", text)


def _two_sided(squares: float, degrees: int) -> float:
    return 2.0 * min(float(stats.chi2.cdf(squares, degrees)), float(stats.chi2.sf(squares, degrees)))


def _flat(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.double().reshape(-1) for part in parts.values()])
