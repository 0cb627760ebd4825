"""Gaussian noise that is correlated over the steps, drawn again from (key, step, coordinate) instead of being kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dp.mechanism.gaussian import block_on, check_floating, standard_normal
from lightning_dp.mechanism.noise import Parts, in_blocks
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.mechanism.state import MechanismState
from lightning_dp.plan.correlation import Correlation

STATE = "correlated_noise"
"""The name under which the state says when the noise began, and a digest of the key that it is drawn from."""


@dataclass(frozen=True)
class CorrelatedNoise:
    """Row t of C⁻¹Z on every coordinate, Z of independent N(0, std²): a :class:`~lightning_dp.mechanism.noise.Noise`.

    C is a lower-triangular Toeplitz matrix. Row t of Z is what :class:`~lightning_dp.mechanism.gaussian.GaussianNoise` adds at
    that step, a function of (key, step, coordinate). So nothing of it is saved and no rank has another's:

    - if C⁻¹ is banded, C⁻¹ = (c₀, c₁, …): cₖ times the draws of the last steps, added up;
    - if C is banded, the recursion xₜ = (zₜ - c₁xₜ₋₁ - … )/c₀. What it needs of the past is held in memory, by this process
      alone, and computed again from the first row where it is not, as after a resume. The numbers are the same.

    Args:
        noise_std: σ times the clipping's sensitivity; times the largest norm of a column of C it is Z's standard deviation.
        correlation: C.
        begun: the number of the step that has the first row.

    Guarantee:
        The sums plus this noise are C⁻¹(CG + Z), post-processing of the Gaussian mechanism on CG (Denisov et al. 2022,
        arXiv 2202.08312, Theorem 2.1, also where later sums depend on what was released before), up to floating point. Rows
        of one Z with two keys would be another mechanism: a state of another key is refused.

    Example:
        >>> key, state, rows = RandomKey.from_seed(0), MechanismState(), []
        >>> noise = CorrelatedNoise(2.0, Correlation("lambda", 2, 0.0, (1.0, -0.5)))
        >>> for step in range(2):
        ...     rows.append(torch.zeros(3))
        ...     state = noise.add([(0, rows[-1])], 3, key=key, step=step, state=state)
        >>> z = [2.0 * 1.25**0.5 * standard_normal(torch.empty(3), key, step, 0) for step in range(2)]
        >>> torch.allclose(rows[0], z[0]), torch.allclose(rows[1], z[1] - 0.5 * z[0])
        (True, True)

    Source: Denisov et al. 2022; banded C: Choquette-Choo et al. 2023 (arXiv 2306.08153); drawing past noise again:
    Kalinin, McKenna, Pagh, Lampert 2026 (arXiv 2601.22334).
    """

    noise_std: float
    correlation: Correlation
    begun: int = 0

    def block(self, device: torch.device) -> int:
        """See :class:`~lightning_dp.mechanism.noise.Noise`."""
        return block_on(device)

    def add(
        self, parts: Parts, coordinates: int, *, key: RandomKey, step: int, state: MechanismState
    ) -> MechanismState:
        """See :class:`~lightning_dp.mechanism.noise.Noise`.

        Raises:
            TypeError: a part is of a type that takes no noise.
            ValueError: parts overlap, or one reaches beyond P.
            RuntimeError: the noise began with another key, or after this step.
        """
        row, own = step - self.begun, {"begun": self.begun, "key": key.digest()}
        before = state.values.get(STATE)
        if row < 0 or (before is not None and before["begun"] == self.begun and before != own):
            raise RuntimeError(
                f"step {step} of noise correlated since step {self.begun}, with another key than before or ahead of it: "
                "expected one key from its first step on. Its rows would not belong together, and would protect less."
            )
        check_floating(parts)
        some = next((part for _, part in parts if part.numel()), None)
        past = state.past if isinstance(state.past, Past) and state.past.fits(self, key, row) else Past(self, key, row)
        if some is not None and self.noise_std != 0:
            for block, length, here in in_blocks(parts, coordinates, block_on(some.device)):
                noise = past.row(some.new_empty(length), block).mul(self._draw_std)
                for part, where in here:
                    part.add_(noise[where])
        past.row_is_over()
        return MechanismState({**state.values, STATE: own}, past)

    def std(self, step: int, state: MechanismState) -> float:
        """‖row of C⁻¹‖ times that of Z: it differs from step to step."""
        return self._draw_std * self.correlation.row_norm(step - self.begun)

    @property
    def _draw_std(self) -> float:
        return self.noise_std * self.correlation.column_norm

    def to_float(self, total: Tensor, divisor: float) -> Tensor:
        """In place."""
        return total.div_(divisor)

    def released(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As the sums."""
        return sums


class Past:
    """What a recursion needs of the rows before, block by block, for one process while it runs. **Secret**, as the key is.

    It is never pickled or copied: what is read in its place is empty, and all of it is computed again.
    """

    def __init__(self, noise: CorrelatedNoise, key: RandomKey, row: int) -> None:
        self._noise, self._key, self._row = noise, key, row
        self._blocks: dict[int, tuple[int, list[Tensor]]] = {}

    def fits(self, noise: CorrelatedNoise, key: RandomKey, row: int) -> bool:
        """Whether the next row that it gives is that ``row``."""
        return (noise, row) == (self._noise, self._row) and key == self._key

    def row(self, like: Tensor, block: int) -> Tensor:
        """The row of C⁻¹Z of a block of coordinates, in units of the standard deviation; of the type of ``like``."""
        matrix = self._noise.correlation.matrix
        if self._noise.correlation.of_inverse:
            return _sum(self._terms(like, block))
        done, last = self._blocks.get(block, (0, []))
        if last and not _alike(last[0], like):
            done, last = 0, []
        for row in range(done, self._row + 1):
            new = standard_normal(like, self._key, self._noise.begun + row, block)
            for factor, before in zip(matrix[1:], last, strict=False):
                new = new - before * factor
            last = [new / matrix[0], *last][: max(1, len(matrix) - 1)]
        self._blocks[block] = (self._row + 1, last)
        return last[0]

    def _terms(self, like: Tensor, block: int) -> Iterator[Tensor]:
        for back, factor in enumerate(self._noise.correlation.matrix[: self._row + 1]):
            yield standard_normal(like, self._key, self._noise.begun + self._row - back, block) * factor

    def row_is_over(self) -> None:
        """Go on to the next row."""
        self._row += 1

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _sum(terms: Iterator[Tensor]) -> Tensor:
    total = next(terms)
    for term in terms:
        total = total + term
    return total


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _nothing() -> None:
    """What a copy of a :class:`Past` is."""
