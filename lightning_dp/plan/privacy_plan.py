"""The one source of privacy numbers: sampler, clipping, noise and ledger all read a :class:`PrivacyPlan`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

from lightning_dp.plan.adaptation import NAMES
from lightning_dp.plan.clipping import Clipping, ClippingStyle
from lightning_dp.plan.filtering import NAMES as FILTERED
from lightning_dp.plan.filtering import FilterStyle
from lightning_dp.plan.html import html_table
from lightning_dp.plan.mechanism import Adjacency, Mechanism
from lightning_dp.plan.sampling import SamplingScheme
from lightning_dp.validate import number, whole

MOST_STEPS = 10**15
"""Counts up to here are exact as floating-point numbers, and so is arithmetic with them."""

SAMPLING: dict[SamplingScheme, str] = {
    "poisson": "Poisson",
    "cyclic_poisson": "cyclic Poisson",
    "random_allocation": "random-allocation",
    "balls_in_bins": "balls-in-bins",
}
"""In words."""

_NAMES = (
    "noise_multiplier", "clip_norm", "delta", "dataset_size", "expected_batch_size", "steps", "target_epsilon",
    "max_batch_size", "resolution", "coordinates", "clipping", "automatic_gamma", *NAMES, "simulation", "unit", "sampling",
    "noise", *FILTERED, "participations", "adjacency",
)  # fmt: skip
"""In the order in which they are shown."""


class Numbers(TypedDict, total=False):
    """The numbers of a :class:`~lightning_dp.plan.mechanism.Mechanism` by the names of its ``of``."""

    noise_multiplier: float
    clip_norm: float
    dataset_size: int
    expected_batch_size: float
    max_batch_size: int | None
    resolution: int | None
    coordinates: int | None
    clipping: ClippingStyle
    automatic_gamma: float
    clip_quantile: float | None
    clip_learning_rate: float | None
    quantile_weight: float | None
    slack_bins: int | None
    unit: str
    sampling: SamplingScheme
    noise: str
    gradient_filter: FilterStyle | None
    filter_gain: float | None
    filter_lookahead: float | None
    participations: int
    adjacency: Adjacency


@dataclass(frozen=True, slots=True, init=False)
class PrivacyPlan:
    """What each step is, how many there are to be, and how much they may spend together.

    One step draws every example independently with probability :attr:`sampling_probability`, bounds each drawn
    example's gradient to L2 norm ``clip_norm`` in the style of ``clipping``, sums, adds Gaussian noise of standard deviation
    :attr:`noise_std` to every coordinate of the sum, and divides by ``expected_batch_size`` (Abadi et al. 2016,
    Algorithm 1, with Poisson sampling).

    All numbers are public: none may be computed from the private records themselves. ``dataset_size`` is held at one number
    for both of two neighbouring data sets: q and, in blocks, the divisor follow from it.

    Args:
        mechanism: what one step is. Or its numbers one beside the other, as in the example:

            - ``noise_multiplier``: σ, the noise's standard deviation in units of ``clip_norm``. 0 means no noise (ε = ∞).
            - ``clip_norm``: C, the L2 norm to which each example's gradient is clipped. ``math.inf`` means no clipping,
              and is accepted only together with ``noise_multiplier=0``.
            - ``dataset_size``: N, the public number of examples.
            - ``expected_batch_size``: B, the expected size of a step's sample over all ranks. ``0 < B <= N``.
            - ``max_batch_size``: M, the most examples that a step uses over all ranks; ``None`` never cuts a draw.
            - ``resolution``: Δ, how many units of the grid of discrete noise the clip norm has. ``None`` for noise in
              floating point.
            - ``coordinates``: P, the most coordinates that get noise; needed with ``resolution``.
            - ``clipping``: ``"flat"``, ``"per_layer"``, ``"automatic"``, ``"quantile"`` or ``"slaclip"``, see
              :class:`lightning_dp.plan.clipping.Clipping`. In the last two ``clip_norm`` is C at first.
            - ``automatic_gamma``: γ of the automatic style.
            - ``clip_quantile``, ``clip_learning_rate``, ``quantile_weight``, ``slack_bins``: how C is adapted, see
              :mod:`lightning_dp.plan.adaptation`.
            - ``unit``: who is protected, ``"example"`` or the name of a user's field.
            - ``adjacency``: between which data sets, ``"add_remove"`` or ``"zero_out"``.
            - ``sampling``: how samples are drawn, see :class:`lightning_dp.plan.sampling.Sampling`.
            - ``participations``: t, in how many steps of a block an example is.
            - ``noise``: ``"independent"``, or the text of a :class:`lightning_dp.plan.correlation.Correlation`.
            - ``gradient_filter``, ``filter_gain``, ``filter_lookahead``: see :mod:`lightning_dp.plan.filtering`.
        delta: δ of the (ε, δ) guarantee, in (0, 1).
        steps: T, the number of steps planned, or ``None`` if the end is not known in advance.
        target_epsilon: the ε that training must not exceed, or ``None`` if σ was given instead.
        simulation: how many times smaller batch and noise are than those of the run this one simulates; 1 if it is none.

    Raises:
        ValueError: a number is outside its range; the message names the value, what was expected and the remedy.
        TypeError: a number of the mechanism is missing, or both the mechanism and its numbers are given.

    Example:
        >>> plan = PrivacyPlan(noise_multiplier=2.0, clip_norm=1.0, delta=1e-5, dataset_size=1000,
        ...                    expected_batch_size=100, steps=50)
        >>> plan.sampling_probability, plan.noise_std
        (0.1, 2.0)
        >>> plan == PrivacyPlan(plan.mechanism, delta=1e-5, steps=50)
        True
    """

    mechanism: Mechanism
    delta: float
    steps: int | None
    target_epsilon: float | None
    simulation: int

    def __init__(
        self,
        mechanism: Mechanism | None = None,
        *,
        delta: float,
        steps: int | None = None,
        target_epsilon: float | None = None,
        simulation: int = 1,
        **numbers: Unpack[Numbers],
    ) -> None:
        if mechanism is not None and numbers:
            raise TypeError(f"mechanism and {', '.join(numbers)}: expected one of the two. Use mechanism.but(...).")
        mechanism = Mechanism.of(**numbers) if mechanism is None else mechanism
        check_delta(delta)
        if target_epsilon is not None:
            check_epsilon(target_epsilon)
        if steps is not None and whole("steps", steps, high=MOST_STEPS) < 0:
            raise ValueError(f"steps={steps}: expected a non-negative number of steps, or None if unknown.")
        for name, value in (
            ("mechanism", mechanism),
            ("delta", delta),
            ("steps", steps),
            ("target_epsilon", target_epsilon),
            ("simulation", simulation),
        ):
            object.__setattr__(self, name, value)

    def but(self, **changes: Any) -> PrivacyPlan:
        """The same with other numbers, of the plan or of its mechanism.

        Example:
            >>> plan = PrivacyPlan(noise_multiplier=2.0, clip_norm=1.0, delta=1e-5, dataset_size=1000,
            ...                    expected_batch_size=100)
            >>> plan.but(noise_multiplier=4.0, steps=7).noise_std
            4.0
        """
        of_plan = {name: self.numbers[name] for name in ("delta", "steps", "target_epsilon", "simulation")}
        given = {name: changes.pop(name) for name in of_plan if name in changes}
        return PrivacyPlan(self.mechanism.but(**changes), **{**of_plan, **given})

    @property
    def numbers(self) -> dict[str, Any]:
        """All numbers one beside the other, as the constructor takes them, and loggers and files show them."""
        every = {
            **self.mechanism.numbers,
            "delta": self.delta,
            "steps": self.steps,
            "target_epsilon": self.target_epsilon,
            "simulation": self.simulation,
        }
        return {name: every[name] for name in _NAMES}

    def _repr_html_(self) -> str:
        """For notebooks: the numbers that are set, by the constructor's names, and those that follow from them."""
        rows = {name: value for name, value in self.numbers.items() if (name, value) != ("simulation", 1)}
        if self.clipping != "automatic":
            rows.pop("automatic_gamma")
        derived = {"sampling probability q": self.sampling_probability, "noise on the sum, σ·S": self.noise_std}
        simulated = "" if self.simulation == 1 else f": SIMULATION at 1/{self.simulation} of batch and noise"
        return html_table(f"Privacy plan{simulated}", {**rows, **derived})

    @property
    def noise_multiplier(self) -> float:
        """σ."""
        return self.mechanism.noise.noise_multiplier

    @property
    def clip_norm(self) -> float:
        """C."""
        return self.mechanism.clipping.clip_norm

    @property
    def dataset_size(self) -> int:
        """N."""
        return self.mechanism.sampling.dataset_size

    @property
    def expected_batch_size(self) -> float:
        """B."""
        return self.mechanism.sampling.expected_batch_size

    @property
    def sampling_probability(self) -> float:
        """Q = B / N, the probability with which each example enters a step's sample."""
        return self.mechanism.sampling.probability

    @property
    def max_batch_size(self) -> int | None:
        """M."""
        return self.mechanism.sampling.max_batch_size

    @property
    def resolution(self) -> int | None:
        """Δ."""
        return self.mechanism.noise.resolution

    @property
    def coordinates(self) -> int | None:
        """P."""
        return self.mechanism.noise.coordinates

    @property
    def clipping(self) -> ClippingStyle:
        """The clipping style."""
        return self.mechanism.clipping.style

    @property
    def automatic_gamma(self) -> float:
        """γ."""
        return self.mechanism.clipping.gamma

    @property
    def unit(self) -> str:
        """Who is protected."""
        return self.mechanism.unit

    @property
    def sampling(self) -> SamplingScheme:
        """How samples are drawn."""
        return self.mechanism.sampling.scheme

    @property
    def neighbouring_relation(self) -> str:
        """Between which datasets the guarantee holds."""
        return self.mechanism.neighbouring_relation

    @property
    def clipping_rule(self) -> Clipping:
        """How a step clips, with its sensitivity: what the engines are given."""
        return self.mechanism.clipping

    @property
    def noise_std(self) -> float:
        """σ times the clipping's sensitivity (C): the noise on each coordinate of the *sum* of clipped gradients."""
        return self.mechanism.noise_std


def check_epsilon(epsilon: float) -> None:
    """Raise ``ValueError`` unless ``epsilon`` is a finite positive number."""
    number("epsilon", epsilon)
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon={epsilon}: expected a finite number above 0, such as 8.0.")


def check_delta(delta: float) -> None:
    """Raise ``ValueError`` unless ``delta`` lies in (0, 1)."""
    if not 0 < number("delta", delta) < 1:
        raise ValueError(f"delta={delta}: expected a number in (0, 1), well below 1 / dataset_size, such as 1e-5.")
