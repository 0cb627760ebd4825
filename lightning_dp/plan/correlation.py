"""Noise that is correlated over the steps, as plain public numbers: a strategy matrix, and what one example can do to it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np

from lightning_dp.plan.toeplitz import (
    Series,
    best_banded,
    best_lambda,
    check_no_negative_entry,
    gram_of_bins,
    inverse,
    inverse_square_root,
    moves_of_groups,
)
from lightning_dp.validate import number, shown, whole

NoiseStyle = Literal["independent", "banded", "lambda", "bisr"]
"""How the noise of a step depends on that of the steps before."""

INDEPENDENT = "independent"
DEFAULT_BANDS = 4
MOST_BANDS = 1024
"""More past noise than anybody has the memory or the time for."""

MOST_STEPS = 10**7
"""A matrix for more steps takes too long to compute with."""

_TEXT = re.compile(r"(banded|lambda|bisr) for (\d+) steps, momentum (\S+): (\S.*)")


@dataclass(frozen=True, slots=True)
class Correlation:
    """The strategy matrix C of noise that is correlated over the steps: what is released is C⁻¹(C·G + Z).

    G has the sums of clipped gradients, one row for each step, and Z is independent Gaussian noise. C is a lower-triangular
    Toeplitz matrix, banded or with a banded inverse:

    | style | matrix | what is drawn for a step |
    |---|---|---|
    | ``banded`` | C has b bands, found for the workload | the noise of the b - 1 steps before, and a new draw |
    | ``lambda`` | C⁻¹ = I - λ·(shift by one step) | two draws |
    | ``bisr`` | C⁻¹ = the first p bands of A^(-1/2) | p draws |

    A is the workload: what SGD with momentum makes of the gradients. It has to do with utility alone; any matrix is as private
    as its sensitivity says.

    Args:
        style: one of the three.
        steps: T, for which the matrix was made.
        momentum: β, for which it was made.
        matrix: the first column of C (``banded``) or of C⁻¹; what follows is zero.

    Raises:
        ValueError: a number is out of range.

    Source: Choquette-Choo et al. 2023 (arXiv 2306.08153); Kalinin, McKenna, Pagh, Lampert 2026 (arXiv 2601.22334); Kalinin,
    McKenna, Upadhyay, Lampert 2025 (arXiv 2505.12128).

    Example:
        >>> Correlation.found("lambda", steps=100, momentum=0.9, groups=10).bands
        2
    """

    style: str
    steps: int
    momentum: float
    matrix: tuple[float, ...]

    def __post_init__(self) -> None:
        check_noise(self.style)
        if self.style == INDEPENDENT:
            raise ValueError("noise='independent' with a strategy matrix: expected noise that is correlated.")
        whole("noise_steps", self.steps, 1, MOST_STEPS)
        check_momentum(self.momentum)
        for value in self.matrix:
            number("noise_matrix", value)
        if not 1 <= len(self.matrix) <= MOST_BANDS or not self.matrix[0] > 0 or not math.isfinite(self.column_norm):
            raise ValueError(
                f"noise_matrix={shown(list(self.matrix))}: expected 1 to {MOST_BANDS} finite numbers, the first above 0."
            )

    @classmethod
    def found(cls, style: str, *, steps: int, momentum: float, groups: int, bands: int = DEFAULT_BANDS) -> Correlation:
        """The matrix of least error, by a small search, which is kept.

        Args:
            style: ``"banded"``, ``"lambda"`` or ``"bisr"``.
            steps: T.
            momentum: β of the workload.
            groups: of which one example takes part in the steps of one.
            bands: of C or of C⁻¹; ``lambda`` always has two.

        Raises:
            ValueError: there are more bands than steps.
        """
        check_bands(bands)
        if style != "lambda" and bands > steps:
            raise ValueError(
                f"noise_bands={bands} with {steps} steps: expected at most as many bands as steps. Lower noise_bands, or take "
                "more steps."
            )
        if style == "banded":
            matrix = best_banded(steps, bands, momentum)
        elif style == "lambda":
            matrix = (1.0, -best_lambda(steps, groups, momentum))
        else:
            matrix = tuple(round(float(value), 12) for value in inverse_square_root(bands, momentum))
        return cls(style, steps, momentum, matrix)

    @classmethod
    def read(cls, text: object) -> Correlation | None:
        """The inverse of ``str``; ``None`` for ``"independent"``.

        Raises:
            ValueError: it is no such text.
        """
        if text == INDEPENDENT:
            return None
        found = _TEXT.fullmatch(text) if isinstance(text, str) and len(text) < 40 * MOST_BANDS else None
        if found is None:
            raise ValueError(f"noise={shown(text)}: expected 'independent', or the text of a strategy matrix.")
        style, steps, momentum, matrix = found.groups()
        try:
            return cls(style, int(steps), float(momentum), tuple(map(float, matrix.split())))
        except (TypeError, ValueError) as error:
            raise ValueError(f"noise={shown(text)}: {error}") from None

    def __str__(self) -> str:
        return f"{self.style} for {self.steps} steps, momentum {self.momentum!r}: {' '.join(map(repr, self.matrix))}"

    @property
    def bands(self) -> int:
        """How many bands C, or C⁻¹, has."""
        return len(self.matrix)

    @property
    def of_inverse(self) -> bool:
        """Whether it is C⁻¹ that is banded."""
        return self.style != "banded"

    @property
    def column_norm(self) -> float:
        """The largest norm of a column of C: the sensitivity of one participation, in T steps."""
        return self.sensitivity(self.steps, self.steps)

    def sensitivity(self, steps: int, groups: int) -> float:
        """How far one example moves the first ``steps`` rows of C·G, taking part in at most every b-th step; C clips to 1.

        See :func:`lightning_dp.plan.toeplitz.moves_of_groups`.

        Args:
            steps: t ≥ 1.
            groups: b.

        Raises:
            ValueError: no formula for it is known.
        """
        longest = self._at_least(steps)
        return float(_moves(self.matrix, self.of_inverse, longest, min(groups, longest))[steps - 1])

    def gram(self, steps: int, bins: int) -> Series:
        """⟨C xᵢ, C xⱼ⟩, ``(k, k)``, xᵢ with 1 in the steps of bin i of each block; see :func:`toeplitz.gram_of_bins`.

        Args:
            steps: t, a whole number of blocks.
            bins: k.

        Raises:
            ValueError: C has a negative entry, so that an example's turns may take from each other.
        """
        return _gram(self.matrix, self.of_inverse, steps, bins)

    def row_norm(self, row: int) -> float:
        """‖C⁻¹[row, :]‖: how large the noise of that row is, for Z of standard deviation 1."""
        return float(_row_norms(self.matrix, self.of_inverse, self._at_least(row + 1))[row])

    def _at_least(self, steps: int) -> int:
        return self.steps if steps <= self.steps else 1 << (steps - 1).bit_length()


@lru_cache(maxsize=128)
def _row_norms(matrix: tuple[float, ...], of_inverse: bool, steps: int) -> Series:
    given = np.zeros(steps)
    given[: len(matrix)] = matrix[:steps]
    norms: Series = np.sqrt(np.cumsum((given if of_inverse else inverse(given[: len(matrix)], steps)) ** 2))
    return norms


@lru_cache(maxsize=128)
def _moves(matrix: tuple[float, ...], of_inverse: bool, steps: int, groups: int) -> Series:
    given = np.array(matrix)
    return moves_of_groups(inverse(given, steps) if of_inverse else given, steps, groups)


@lru_cache(maxsize=32)
def _gram(matrix: tuple[float, ...], of_inverse: bool, steps: int, bins: int) -> Series:
    given = np.array(matrix)
    series = inverse(given, steps) if of_inverse else given
    check_no_negative_entry(series)
    return gram_of_bins(np.maximum(series, 0.0), steps, bins)


def check_noise(style: object) -> None:
    """Raise ``ValueError`` unless ``style`` is a :data:`NoiseStyle`."""
    if not isinstance(style, str) or style not in get_args(NoiseStyle):
        raise ValueError(f"noise={shown(style)}: expected one of {', '.join(map(repr, get_args(NoiseStyle)))}.")


def check_bands(bands: Any) -> None:
    """Raise ``ValueError`` unless ``bands`` is a whole number from 1."""
    whole("noise_bands", bands, 1, MOST_BANDS)


def check_momentum(momentum: Any) -> None:
    """Raise ``ValueError`` unless ``momentum`` lies in [0, 1)."""
    if not 0 <= number("noise_momentum", momentum) < 1:
        raise ValueError(f"noise_momentum={momentum}: expected a number in [0, 1), the momentum of the optimizer.")


def check_goes_with_noise(
    correlation: Correlation | None,
    *,
    sampling: str,
    max_batch_size: int | None,
    expected_batch_size: float,
    dataset_size: int,
    groups: int,
    clipping: str,
    adapted: bool,
    unit: str | None,
) -> None:
    """Raise ``ValueError`` unless draws and bounds are those for which correlated noise is proved to protect.

    Args:
        correlation: of the noise, ``None`` if it is independent.
        sampling: the scheme.
        max_batch_size: M.
        expected_batch_size: B.
        dataset_size: N.
        groups: b.
        clipping: the style.
        adapted: whether C changes from step to step.
        unit: who is protected, ``None`` for examples.
    """
    if correlation is None:
        if sampling == "cyclic_poisson":
            raise ValueError(
                "sampling='cyclic_poisson' with noise='independent': expected noise that is correlated, whose bands say how "
                "many groups there are. Give noise='banded', or leave out sampling=."
            )
        return
    said = f"noise={correlation.style!r}"
    if sampling not in ("cyclic_poisson", "balls_in_bins"):
        raise ValueError(
            f"{said} with sampling={sampling!r}: expected sampling='cyclic_poisson' or 'balls_in_bins'. An example's parts in "
            "several steps add up in correlated noise, and only the steps in between keep them apart. Give one of the two."
        )
    if max_batch_size is not None:
        raise ValueError(
            f"{said} with max_batch_size={max_batch_size}: expected draws of any size. What cut draws take from δ is not "
            "proved for it. Leave out one of the two."
        )
    if unit is not None:
        raise ValueError(
            f"{said} with privacy_unit={unit!r}: expected examples to be protected, which is what is proved and tested. Leave "
            "out one of the two."
        )
    if adapted:
        raise ValueError(
            f"{said} with clipping={clipping!r}: expected a clip norm that stays. Noise of steps with another clip norm "
            "cancels in part only, and this is not tested. Leave out one of the two."
        )
    if groups * expected_batch_size > dataset_size:
        raise ValueError(
            f"noise_bands={correlation.bands} with expected_batch_size={expected_batch_size:g} of {dataset_size}: expected at "
            f"most {int(dataset_size // expected_batch_size)} bands. A group has 1/b of the examples, and a step draws the "
            "batch from one. Lower noise_bands or the batch."
        )
