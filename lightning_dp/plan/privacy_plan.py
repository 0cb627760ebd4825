"""The one source of privacy numbers: sampler, clipping, noise and ledger all read a :class:`PrivacyPlan`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_dp.plan.clipping import DEFAULT_GAMMA, Clipping, ClippingStyle, check_clipping
from lightning_dp.validate import number, whole

MOST_STEPS = MOST_EXAMPLES = 10**15
"""Counts up to here are exact as floating-point numbers, and so is arithmetic with them."""
SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER = 1e-9, 1e9
SMALLEST_CLIP_NORM = 1e-30

EXAMPLE = "example"
"""The privacy unit unless another is named."""

SAMPLING = "Poisson"


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyPlan:
    """Everything the mechanism is, as plain public numbers.

    One step draws every example independently with probability :attr:`sampling_probability`, bounds each drawn
    example's gradient to L2 norm ``clip_norm`` in the style of ``clipping``, sums, adds Gaussian noise of standard deviation
    :attr:`noise_std` to every coordinate of the sum, and divides by ``expected_batch_size`` (Abadi et al. 2016,
    Algorithm 1, with Poisson sampling).

    All fields are public: none may be computed from the private records themselves. ``dataset_size`` is treated as
    public, as usual under add/remove-one accounting.

    Args:
        noise_multiplier: σ, the noise's standard deviation in units of ``clip_norm``. 0 means no noise (ε = ∞).
        clip_norm: C, the L2 norm to which each example's gradient is clipped. ``math.inf`` means no clipping, and
            is accepted only together with ``noise_multiplier=0``.
        delta: δ of the (ε, δ) guarantee, in (0, 1).
        dataset_size: N, the public number of examples.
        expected_batch_size: B, the expected size of a step's sample over all ranks. ``0 < B <= N``.
        steps: T, the number of steps planned, or ``None`` if the end is not known in advance.
        target_epsilon: the ε that training must not exceed, or ``None`` if σ was given instead.
        max_batch_size: M, the most examples that a step uses over all ranks: a larger draw is cut to a random part of
            this size (truncated Poisson sampling). ``None`` never cuts.
        resolution: Δ, how many units of an integer grid the clip norm has. Noise is then a discrete Gaussian on the
            grid. ``None`` for noise in floating point.
        coordinates: P, the most coordinates that get noise; needed with ``resolution``.
        clipping: ``"flat"``, ``"per_layer"`` or ``"automatic"``, see :class:`lightning_dp.plan.clipping.Clipping`.
        automatic_gamma: γ of the automatic style.
        unit: who is protected, ``"example"`` or the name of a user's field; ``dataset_size``, ``expected_batch_size`` and
            ``max_batch_size`` count these.
        simulation: how many times smaller batch and noise are than those of the run this one simulates; 1 if it is none.

    Raises:
        ValueError: a field is outside its range; the message names the value, what was expected and the remedy.

    Example:
        >>> plan = PrivacyPlan(noise_multiplier=2.0, clip_norm=1.0, delta=1e-5, dataset_size=1000,
        ...                    expected_batch_size=100, steps=50)
        >>> plan.sampling_probability, plan.noise_std
        (0.1, 2.0)
    """

    noise_multiplier: float
    clip_norm: float
    delta: float
    dataset_size: int
    expected_batch_size: float
    steps: int | None = None
    target_epsilon: float | None = None
    max_batch_size: int | None = None
    resolution: int | None = None
    coordinates: int | None = None
    clipping: ClippingStyle = "flat"
    automatic_gamma: float = DEFAULT_GAMMA
    simulation: int = 1
    unit: str = EXAMPLE

    def __post_init__(self) -> None:
        check_noise_multiplier(self.noise_multiplier)
        check_clip_norm(self.clip_norm)
        check_clipping(self.clipping, self.automatic_gamma, self.clip_norm)
        check_delta(self.delta)
        if self.target_epsilon is not None:
            check_epsilon(self.target_epsilon)
        number("expected_batch_size", self.expected_batch_size)
        if whole("dataset_size", self.dataset_size, high=MOST_EXAMPLES) < 1:
            raise ValueError(
                f"dataset_size={self.dataset_size}: expected at least one example. "
                "Check that the training dataset is not empty."
            )
        q = self.expected_batch_size / self.dataset_size
        if not 0 < q <= 1 or math.isinf(1 / q):  # so small that nothing can be computed with it
            raise ValueError(
                f"expected_batch_size={self.expected_batch_size} with dataset_size={self.dataset_size} gives a "
                f"sampling probability of {q:.4g}: expected a value in "
                "(0, 1]. Lower the loader's batch_size (it is multiplied by the number of ranks) or pass "
                f"DifferentialPrivacy(expected_batch_size=...) at most {self.dataset_size}."
            )
        if self.steps is not None and whole("steps", self.steps, high=MOST_STEPS) < 0:
            raise ValueError(f"steps={self.steps}: expected a non-negative number of steps, or None if unknown.")
        if math.isinf(self.clip_norm) and self.noise_multiplier > 0:
            raise ValueError(
                f"clip_norm=inf with noise_multiplier={self.noise_multiplier}: without clipping no finite noise "
                "protects anybody. Give a finite clip_norm, or noise_multiplier=0 to train without privacy."
            )
        if self.max_batch_size is not None:
            check_max_batch_size(self.max_batch_size)
        if self.resolution is not None:
            self._check_grid(self.resolution)

    def _check_grid(self, resolution: int) -> None:
        if self.noise_multiplier == 0:
            raise ValueError(
                "noise_multiplier=0 with secure=True: expected noise, since there is nothing else to make secure. Give a "
                "noise_multiplier above 0, or leave out secure=True."
            )
        if self.coordinates is None or self.coordinates < 1:
            raise ValueError(
                f"coordinates={self.coordinates} with resolution={resolution}: expected the number of trainable coordinates."
            )
        if self.noise_multiplier * resolution < 1:
            raise ValueError(
                f"noise_multiplier={self.noise_multiplier} with resolution={resolution}: expected noise of at least one unit "
                "of the grid. Raise noise_multiplier."
            )
        if (self.dataset_size + 2**10 * self.noise_multiplier) * resolution >= 2**62:
            raise ValueError(
                f"dataset_size={self.dataset_size}, noise_multiplier={self.noise_multiplier} with resolution={resolution}: "
                "expected sums and noise that fit into 62 bits. Lower noise_multiplier, or leave out secure=True."
            )

    @property
    def sampling_probability(self) -> float:
        """Q = B / N, the probability with which each example enters a step's sample."""
        return self.expected_batch_size / self.dataset_size

    @property
    def neighbouring_relation(self) -> str:
        """Between which datasets the guarantee holds."""
        return f"add/remove one {self.unit}"

    @property
    def clipping_rule(self) -> Clipping:
        """How a step clips, with its sensitivity: what the engines are given."""
        return Clipping(self.clip_norm, self.clipping, self.automatic_gamma)

    @property
    def noise_std(self) -> float:
        """σ times the clipping's sensitivity (C): the noise on each coordinate of the *sum* of clipped gradients."""
        return self.noise_multiplier * self.clipping_rule.sensitivity if self.noise_multiplier > 0 else 0.0


def check_max_batch_size(max_batch_size: int) -> None:
    """Raise ``ValueError`` unless ``max_batch_size`` is at least 1."""
    if whole("max_batch_size", max_batch_size) < 1:
        raise ValueError(
            f"max_batch_size={max_batch_size}: expected at least 1, well above the expected batch size, or None for draws "
            "of any size."
        )


def check_epsilon(epsilon: float) -> None:
    """Raise ``ValueError`` unless ``epsilon`` is a finite positive number."""
    number("epsilon", epsilon)
    if not (epsilon > 0 and math.isfinite(epsilon)):
        raise ValueError(f"epsilon={epsilon}: expected a finite number above 0, such as 8.0.")


def check_delta(delta: float) -> None:
    """Raise ``ValueError`` unless ``delta`` lies in (0, 1)."""
    if not 0 < number("delta", delta) < 1:
        raise ValueError(f"delta={delta}: expected a number in (0, 1), well below 1 / dataset_size, such as 1e-5.")


def check_clip_norm(clip_norm: float) -> None:
    """Raise ``ValueError`` unless ``clip_norm`` is above 0 (``inf`` is accepted) and suits float32.

    Noise of a standard deviation near the smallest float32 would be rounded to a few values.
    """
    if not number("clip_norm", clip_norm) > 0:
        raise ValueError(f"clip_norm={clip_norm}: expected a number above 0, such as 1.0.")
    if clip_norm != math.inf and not SMALLEST_CLIP_NORM <= clip_norm <= 1 / SMALLEST_CLIP_NORM:
        raise ValueError(
            f"clip_norm={clip_norm}: expected a number from {SMALLEST_CLIP_NORM:g} to {1 / SMALLEST_CLIP_NORM:g}, such as 1.0: "
            "sums and noise are float32. Scale the loss instead."
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


def check_sampling_probability(sampling_probability: float) -> None:
    """Raise ``ValueError`` unless ``sampling_probability`` lies in (0, 1]."""
    if not 0 < number("sampling_probability", sampling_probability) <= 1:
        raise ValueError(
            f"sampling_probability={sampling_probability}: expected a number in (0, 1], "
            "the expected batch size divided by the dataset size."
        )
