"""What one step is, as plain public numbers: a draw, a bound on each example, noise, and whom all this protects."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from lightning_dp.plan.adaptation import adaptation_of, numbers_of
from lightning_dp.plan.clipping import DEFAULT_GAMMA, Clipping, ClippingStyle
from lightning_dp.plan.correlation import INDEPENDENT, Correlation, check_goes_with_noise
from lightning_dp.plan.filtering import FilterStyle, GradientFilter, filter_numbers, read_filter
from lightning_dp.plan.sampling import MOST_EXAMPLES, Sampling, SamplingScheme
from lightning_dp.validate import number, shown, whole

SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER = 1e-9, 1e9

EXAMPLE = "example"
"""The privacy unit unless another is named."""

Adjacency = Literal["add_remove", "zero_out"]
"""Between which data sets the guarantee holds, N being the same number for both."""
ADD_REMOVE: Adjacency = "add_remove"


NoiseKind = Literal["floating", "discrete"]
"""Noise in floating point, or discrete noise on a grid of integers."""


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """How much noise a step adds, in units of the sensitivity, whether in floating point or on a grid, and how correlated.

    Args:
        noise_multiplier: σ, the noise's standard deviation in units of the sensitivity. 0 means no noise (ε = ∞).
        resolution: Δ, how many units of an integer grid the sensitivity has. Noise is then a discrete Gaussian on the
            grid. ``None`` for noise in floating point.
        coordinates: P, the most coordinates that get noise; needed with ``resolution``.
        correlation: the strategy matrix of noise that is correlated over the steps; ``None`` for independent noise.

    Raises:
        ValueError: a number is outside its range.
    """

    noise_multiplier: float
    resolution: int | None = None
    coordinates: int | None = None
    correlation: Correlation | None = None

    def __post_init__(self) -> None:
        check_noise_multiplier(self.noise_multiplier)
        if self.resolution is None:
            return
        if self.correlation is not None:
            raise ValueError(
                f"noise={self.correlation.style!r} with resolution={self.resolution}: expected independent noise. Sums of "
                "discrete noise with real factors are not on the grid. Leave out secure=True, or noise=."
            )
        if self.noise_multiplier == 0:
            raise ValueError(
                "noise_multiplier=0 with secure=True: expected noise, since there is nothing else to make secure. Give a "
                "noise_multiplier above 0, or leave out secure=True."
            )
        whole("resolution", self.resolution, 1, MOST_EXAMPLES)
        if self.coordinates is None or whole("coordinates", self.coordinates, high=MOST_EXAMPLES) < 1:
            raise ValueError(
                f"coordinates={self.coordinates} with resolution={self.resolution}: expected the number of trainable "
                "coordinates."
            )
        if self.grid_std < 1:
            raise ValueError(
                f"noise_multiplier={self.noise_multiplier} with resolution={self.resolution}: expected noise of at least one "
                "unit of the grid. Raise noise_multiplier."
            )

    @property
    def kind(self) -> NoiseKind:
        """What draws, adds up or speaks of the noise has one way for each kind."""
        return "floating" if self.resolution is None else "discrete"

    @property
    def grid_std(self) -> float:
        """The noise's standard deviation in units of the grid; ∞ in floating point, where nothing is rounded to one."""
        return math.inf if self.kind == "floating" else self.noise_multiplier * (self.resolution or 0)


class Event(NamedTuple):
    """What an accountant composes: one step of the Poisson-subsampled Gaussian mechanism.

    Args:
        noise_multiplier: σ.
        sampling_probability: q.
    """

    noise_multiplier: float
    sampling_probability: float


@dataclass(frozen=True, slots=True)
class Mechanism:
    """One step: draw, bound each example's gradient, sum, add noise to every coordinate, divide by a public number.

    Sampler, clipping, noise and ledger all read this one object, and a ledger's entry holds it whole.

    Args:
        sampling: N, B and M.
        clipping: C, the style, and γ.
        noise: σ, and the grid of discrete noise.
        unit: who is protected, ``"example"`` or the name of a user's field; N, B and M count these.
        adjacency: ``"add_remove"``: one data set has one unit more than the other, and N is held at a public number.
            ``"zero_out"``: in one of them a unit is replaced by one that adds nothing to any sum, and N is that of both.
        filter: what is between release and optimizer, ``None`` for nothing; no number of privacy depends on it.

    Raises:
        ValueError: the numbers do not go together.

    Guarantee:
        The Poisson-subsampled Gaussian mechanism of :meth:`event` under :attr:`adjacency`, but for what cut draws and
        discrete noise take from δ (:func:`lightning_dp.accounting.slack.slack_of`). With N held, both relations have one pair
        of laws: whether others are drawn does not depend on a unit, so one that adds nothing is as one that is not there.
        Where draws are cut it would take another's place, and where C is adapted it would say something of its norm: there
        ``"zero_out"`` is refused.

    Example:
        >>> step = Mechanism(Sampling(1000, 100), Clipping(0.5), NoiseScale(3.0))
        >>> step.sensitivity, step.noise_std, step.divisor, step.event()
        (0.5, 1.5, 100, Event(noise_multiplier=3.0, sampling_probability=0.1))

    Source: Abadi et al. 2016, Algorithm 1 (arXiv 1607.00133), with Poisson sampling.
    """

    sampling: Sampling
    clipping: Clipping
    noise: NoiseScale
    unit: str = EXAMPLE
    filter: GradientFilter | None = None
    adjacency: Adjacency = ADD_REMOVE

    def __post_init__(self) -> None:
        check_adjacency(
            self.adjacency, self.sampling.max_batch_size, self.clipping.style, self.clipping.adaptation is not None
        )
        sigma, units = self.noise.noise_multiplier, self.noise.resolution
        if math.isinf(self.clipping.clip_norm) and sigma > 0:
            raise ValueError(
                f"clip_norm=inf with noise_multiplier={sigma}: without clipping no finite noise "
                "protects anybody. Give a finite clip_norm, or noise_multiplier=0 to train without privacy."
            )
        if units is not None and (self.sampling.dataset_size + 2**10 * sigma) * units >= 2**62:
            raise ValueError(
                f"dataset_size={self.sampling.dataset_size}, noise_multiplier={sigma} with resolution={units}: "
                "expected sums and noise that fit into 62 bits. Lower noise_multiplier, or leave out secure=True."
            )
        check_goes_with_noise(
            self.noise.correlation,
            sampling=self.sampling.scheme,
            max_batch_size=self.sampling.max_batch_size,
            expected_batch_size=self.sampling.expected_batch_size,
            dataset_size=self.sampling.dataset_size,
            groups=self.groups,
            clipping=self.clipping.style,
            adapted=self.clipping.adaptation is not None,
            unit=None if self.unit == EXAMPLE else self.unit,
        )

    @classmethod
    def of(
        cls,
        *,
        noise_multiplier: float,
        clip_norm: float,
        dataset_size: int,
        expected_batch_size: float,
        max_batch_size: int | None = None,
        resolution: int | None = None,
        coordinates: int | None = None,
        clipping: ClippingStyle = "flat",
        automatic_gamma: float = DEFAULT_GAMMA,
        clip_quantile: float | None = None,
        clip_learning_rate: float | None = None,
        quantile_weight: float | None = None,
        slack_bins: int | None = None,
        unit: str = EXAMPLE,
        sampling: SamplingScheme = "poisson",
        noise: str = INDEPENDENT,
        gradient_filter: FilterStyle | None = None,
        filter_gain: float | None = None,
        filter_lookahead: float | None = None,
        participations: int = 1,
        adjacency: Adjacency = ADD_REMOVE,
    ) -> Mechanism:
        """The mechanism of these numbers, as a user, a checkpoint or a logger writes them: one beside the other."""
        adaptation = adaptation_of(
            clipping,
            clip_quantile=clip_quantile,
            clip_learning_rate=clip_learning_rate,
            quantile_weight=quantile_weight,
            slack_bins=slack_bins,
        )
        return cls(
            Sampling(dataset_size, expected_batch_size, max_batch_size, sampling, participations),
            Clipping(clip_norm, clipping, automatic_gamma, adaptation),
            NoiseScale(noise_multiplier, resolution, coordinates, Correlation.read(noise)),
            unit,
            read_filter(gradient_filter, filter_gain, filter_lookahead),
            adjacency,
        )

    @property
    def numbers(self) -> dict[str, Any]:
        """All numbers, as :meth:`of` takes them."""
        return {
            "noise_multiplier": self.noise.noise_multiplier,
            "clip_norm": self.clipping.clip_norm,
            "dataset_size": self.sampling.dataset_size,
            "expected_batch_size": self.sampling.expected_batch_size,
            "max_batch_size": self.sampling.max_batch_size,
            "resolution": self.noise.resolution,
            "coordinates": self.noise.coordinates,
            "clipping": self.clipping.style,
            "automatic_gamma": self.clipping.gamma,
            **numbers_of(self.clipping.adaptation),
            "unit": self.unit,
            "sampling": self.sampling.scheme,
            "participations": self.sampling.participations,
            "noise": str(self.noise.correlation or INDEPENDENT),
            **filter_numbers(self.filter),
            "adjacency": self.adjacency,
        }

    def but(self, **changes: Any) -> Mechanism:
        """The same with other numbers, by the names of :meth:`of`. What adapts C is kept with its clipping style alone."""
        kept = self.numbers
        if changes.get("clipping", kept["clipping"]) != kept["clipping"]:
            kept |= numbers_of(None)
        return Mechanism.of(**{**kept, **changes})

    @property
    def sensitivity(self) -> float:
        """The most by which adding or removing one unit moves the sum, in L2 norm."""
        return self.clipping.sensitivity

    @property
    def divisor(self) -> float:
        """B: the only number that a noisy sum is divided by."""
        return self.sampling.expected_batch_size

    @property
    def noise_std(self) -> float:
        """σ times the sensitivity: the standard deviation of the noise on each coordinate of the *sum*."""
        sigma = self.noise.noise_multiplier
        return sigma * self.sensitivity if sigma > 0 else 0.0

    @property
    def neighbouring_relation(self) -> str:
        """Between which datasets the guarantee holds."""
        return f"{_RELATIONS[self.adjacency]} one {self.unit} with N {_HELD[self.adjacency]}"

    @property
    def memoryless(self) -> bool:
        """Whether each step's draw and noise are independent of those of all other steps.

        Steps of a mechanism that is not are accounted for together, from where its randomness began: see
        :func:`lightning_dp.accounting.phase.phase_of` and :attr:`lightning_dp.accounting.entry.Entry.stretch`.
        """
        return self.sampling.scheme == "poisson"

    @property
    def groups(self) -> int:
        """How many groups cyclic Poisson sampling has: of so many steps in a row, an example takes part in at most one.

        Where C has b bands, so many that its columns do not meet. Where C⁻¹ has, and the sample's randomness counts for
        nothing, as many as there can be: ⌊N / B⌋.
        """
        correlation = self.noise.correlation
        if self.sampling.scheme != "cyclic_poisson" or correlation is None:
            return 1
        if correlation.of_inverse:
            return max(1, int(self.sampling.dataset_size // self.sampling.expected_batch_size))
        return correlation.bands

    def event(self) -> Event:
        """What the accountant composes: σ and q."""
        return Event(self.noise.noise_multiplier, self.sampling.probability)


_RELATIONS: dict[Adjacency, str] = {"add_remove": "add/remove", "zero_out": "zero out"}
_HELD: dict[Adjacency, str] = {"add_remove": "public", "zero_out": "constant"}


def check_adjacency(adjacency: object, max_batch_size: int | None, clipping: str, adapted: bool) -> None:
    """Raise ``ValueError`` unless ``adjacency`` is a relation for which these draws and bounds are proved to protect.

    Args:
        adjacency: the relation.
        max_batch_size: M.
        clipping: the style.
        adapted: whether C changes from step to step.
    """
    if not isinstance(adjacency, str) or adjacency not in get_args(Adjacency):
        raise ValueError(f"adjacency={shown(adjacency)}: expected one of {', '.join(map(repr, get_args(Adjacency)))}.")
    if adjacency == ADD_REMOVE:
        return
    if max_batch_size is not None:
        raise ValueError(
            f"adjacency={adjacency!r} with max_batch_size={max_batch_size}: expected draws of any size. An example that adds "
            "nothing would still take another's place in a draw that is cut, which is not proved. Leave out one of the two."
        )
    if adapted:
        raise ValueError(
            f"adjacency={adjacency!r} with clipping={clipping!r}: expected a clip norm that stays. An example without a "
            "gradient would still be counted in what C is adapted by, which is not proved. Leave out one of the two."
        )


def check_noise_multiplier(noise_multiplier: float) -> None:
    """Raise ``ValueError`` unless ``noise_multiplier`` is 0 or a number that the accountants can work with."""
    number("noise_multiplier", noise_multiplier)
    if 0 < noise_multiplier < SMALLEST_NOISE_MULTIPLIER or math.inf > noise_multiplier > LARGEST_NOISE_MULTIPLIER:
        raise ValueError(
            f"noise_multiplier={noise_multiplier}: expected 0, or a number from {SMALLEST_NOISE_MULTIPLIER:g} to "
            f"{LARGEST_NOISE_MULTIPLIER:g}, such as 1.0."
        )
    if not (noise_multiplier >= 0 and math.isfinite(noise_multiplier)):
        raise ValueError(
            f"noise_multiplier={noise_multiplier}: expected a finite number of at least 0, such as 1.0 "
            "(0 means no noise and no privacy)."
        )
