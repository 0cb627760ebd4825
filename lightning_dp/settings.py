"""What a user asks of :class:`~lightning_dp.DifferentialPrivacy`, checked and frozen: privacy, speed and data apart."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar

from lightning_dp.accounting.target import NAMES as RISKS
from lightning_dp.accounting.target import RiskTarget
from lightning_dp.batches.axis import Axis, BatchAxis, check_batch_axis_argument
from lightning_dp.engines.select import EngineName, check_engine_name
from lightning_dp.loading.privacy_unit import PrivacyUnit
from lightning_dp.mechanism.secure import check_secure
from lightning_dp.plan.adaptation import NAMES, adaptation_of
from lightning_dp.plan.clipping import Clipping, ClippingStyle, check_clip_norm, check_clipping
from lightning_dp.plan.correlation import INDEPENDENT, NoiseStyle, check_bands, check_momentum, check_noise
from lightning_dp.plan.filtering import FilterStyle, GradientFilter, filter_of
from lightning_dp.plan.mechanism import Adjacency, check_adjacency, check_noise_multiplier
from lightning_dp.plan.privacy_plan import check_delta, check_epsilon
from lightning_dp.plan.sampling import IN_BLOCKS, SamplingScheme, check_participations, check_sampling
from lightning_dp.plan.simulation import check_simulation
from lightning_dp.validate import shown, truth, whole

PhysicalBatchSize = int | Literal["auto"] | None
"""As the user gives it: a number, ``"auto"`` to have one measured, ``None`` for what fits (CUDA) or a rule of thumb."""


def check_physical_batch_size(size: object) -> None:
    """Raise ``ValueError`` unless ``size`` is a :data:`PhysicalBatchSize`."""
    if size is None or (isinstance(size, str) and size == "auto"):
        return
    try:
        whole("physical_batch_size", size, low=1)
    except ValueError:
        raise ValueError(
            f"physical_batch_size={shown(size)}: expected at least 1, 'auto', or None for the default."
        ) from None


def check_places(public: object) -> list[int]:
    """The places given, as a list; ``None`` for none.

    Raises:
        ValueError: they are no whole numbers from 0.
    """
    if public is None:
        return []
    if not isinstance(public, (list, tuple)):
        raise ValueError(
            f"public_optimizers={shown(public)}: expected a list of places in configure_optimizers, such as [0], or None."
        )
    return [whole("public_optimizers", place, low=0) for place in public]


def check_public_state(given: object) -> tuple[str, ...]:
    """The names given; ``None`` for none.

    Raises:
        ValueError: they are no names of attributes.
    """
    names = [] if given is None else given
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"public_state={shown(given)}: expected a list of names of attributes of the module, such as ['teacher'] or "
            "['net.center'], or None."
        )
    return tuple(names)


def check_correlated(privacy: PrivacySettings) -> None:
    """Raise ``ValueError`` unless the noise asked for goes with the rest; what depends on the data is checked by the plan."""
    check_noise(privacy.noise)
    check_bands(privacy.noise_bands)
    if privacy.noise_momentum is not None:
        check_momentum(privacy.noise_momentum)
    if privacy.noise == INDEPENDENT:
        return
    for name, value, usual, why in (
        ("secure", privacy.secure, False, "sums of discrete noise with real factors are not on the grid"),
        ("simulate", privacy.simulate, 1, "a smaller batch would change which steps an example is kept out of"),
        ("privacy_unit", privacy.privacy_unit, None, "examples are what is proved and tested"),
        ("max_batch_size", privacy.max_batch_size, None, "what cut draws take from δ is not proved for it"),
        ("public_optimizers", list(privacy.public_optimizers), [], "manual optimization may leave samples unused"),
    ):
        if value != usual:
            raise ValueError(
                f"noise={privacy.noise!r} with {name}={'…' if name == 'privacy_unit' else value}: expected {name}={usual}, "
                f"since {why}. Leave out one of the two."
            )


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """What the guarantee depends on, as the user gave it; the arguments of ``DifferentialPrivacy`` say what each means.

    Raises:
        ValueError: the message names the value, what was expected and the remedy.
    """

    epsilon: float | None
    noise_multiplier: float | None
    advantage: float | None
    tpr_at_fpr: tuple[float, float] | None
    mu: float | None
    delta: float
    clip_norm: float
    clipping: ClippingStyle
    automatic_gamma: float
    clip_quantile: float | None
    clip_learning_rate: float | None
    quantile_weight: float | None
    slack_bins: int | None
    expected_batch_size: int | None
    dataset_size: int | None
    max_batch_size: int | None
    seed: int | None
    simulate: int
    secure: bool
    sampling: SamplingScheme
    participations: int
    noise: NoiseStyle
    noise_bands: int
    noise_momentum: float | None
    gradient_filter: FilterStyle | None
    filter_gain: float
    filter_lookahead: float
    public_optimizers: tuple[int, ...]
    privacy_unit: PrivacyUnit | None
    adjacency: Adjacency
    row_wise: tuple[str, ...]
    public_state: tuple[str, ...]

    def __post_init__(self) -> None:
        asked = {name: getattr(self, name) for name in ("epsilon", "noise_multiplier", *RISKS)}
        if sum(value is not None for value in asked.values()) != 1:
            listed = ", ".join(
                f"{name}={shown(asked[name])}" for name in asked if name not in RISKS or asked[name] is not None
            )
            raise ValueError(
                f"{listed}: expected exactly one of them."
                " Give epsilon, or advantage, tpr_at_fpr or mu, to have the noise found for a budget, or noise_multiplier to "
                "have ε computed."
            )
        if self.risk is not None and self.simulate != 1:
            raise ValueError(
                f"simulate={self.simulate} with {self.risk}: expected epsilon or noise_multiplier, since a simulation has no "
                "risk of its own that anybody should quote. Leave out one of the two."
            )
        if self.epsilon is not None:
            check_epsilon(self.epsilon)
        if self.noise_multiplier is not None:
            check_noise_multiplier(self.noise_multiplier)
        check_delta(self.delta)
        check_clip_norm(self.clip_norm)
        check_clipping(self.clipping, self.automatic_gamma, self.clip_norm)
        adaptation_of(self.clipping, **{name: getattr(self, name) for name in NAMES})
        check_simulation(self.simulate)
        check_sampling(self.sampling)
        check_participations(self.participations, self.sampling)
        if self.sampling in IN_BLOCKS and self.simulate > 1:
            raise ValueError(
                f"simulate={self.simulate} with sampling={self.sampling!r}: expected sampling='poisson', since a step of a "
                "simulation, with less of the batch, belongs to no block of the run that it stands for."
            )
        truth(secure=self.secure)
        check_adjacency(self.adjacency, self.max_batch_size, self.clipping, self.clipping_rule.adaptation is not None)
        check_correlated(self)
        if self.filter is not None and self.noise != INDEPENDENT:
            raise ValueError(
                f"gradient_filter={self.gradient_filter!r} with noise={self.noise!r}: expected independent noise, which "
                "is what the filter takes out. Leave out one of the two."
            )
        for name in ("expected_batch_size", "dataset_size", "max_batch_size"):
            value = getattr(self, name)
            if value is not None and whole(name, value) < 1:
                raise ValueError(f"{name}={value}: expected at least 1, or None for the default.")
        if self.seed is not None:
            whole("seed", self.seed)
        if math.isinf(self.clip_norm) and self.noise_multiplier != 0:
            raise ValueError(
                f"clip_norm={self.clip_norm}: expected a finite number. Without clipping no finite noise protects anybody; "
                "only noise_multiplier=0 (no privacy) goes with it."
            )

    @property
    def risk(self) -> RiskTarget | None:
        """What may be risked, if the budget is not an ε."""
        return RiskTarget.of(self.advantage, self.tpr_at_fpr, self.mu)

    @property
    def clipping_rule(self) -> Clipping:
        """How a step clips."""
        adaptation = adaptation_of(self.clipping, **{name: getattr(self, name) for name in NAMES})
        return Clipping(self.clip_norm, self.clipping, self.automatic_gamma, adaptation)

    @property
    def filter(self) -> GradientFilter | None:
        """What is between release and optimizer."""
        return filter_of(self.gradient_filter, self.filter_gain, self.filter_lookahead)

    @property
    def randomness(self) -> Literal["secret", "reproducible"]:
        """Where sampling and noise come from."""
        return "secret" if self.seed is None else "reproducible"


@dataclass(frozen=True, kw_only=True)
class SpeedSettings:
    """What changes time and memory and never the result; ranks may differ in it, as machines do."""

    engine: EngineName
    physical_batch_size: PhysicalBatchSize
    static_shapes: bool
    autotune: bool | None

    def __post_init__(self) -> None:
        check_engine_name(self.engine)
        check_physical_batch_size(self.physical_batch_size)
        truth(static_shapes=self.static_shapes)
        if self.autotune is not None and not isinstance(self.autotune, bool):
            raise ValueError(
                f"autotune={shown(self.autotune)}: expected True, False, or None to measure unless a seed is given."
            )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """How batches are read, and which of their numbers are shown."""

    batch_axis: BatchAxis | Literal["each"] | dict[str, Axis | None]
    log_train_metrics: bool

    def __post_init__(self) -> None:
        check_batch_axis_argument(self.batch_axis)
        truth(log_train_metrics=self.log_train_metrics)


PartT = TypeVar("PartT", PrivacySettings, SpeedSettings, DataSettings)


@dataclass(frozen=True)
class Settings:
    """All of it. How the parts go together is checked here.

    Raises:
        ValueError: a combination means nothing.
    """

    privacy: PrivacySettings
    speed: SpeedSettings
    data: DataSettings

    def __post_init__(self) -> None:
        privacy = self.privacy
        if privacy.filter is not None and self.speed.engine == "ghost":
            raise ValueError(
                f"gradient_filter={privacy.gradient_filter!r} with engine='ghost': expected 'auto', 'vmap' or 'loop'. The "
                "layers of ghost see one set of weights in a step, and the filter takes gradients at two."
            )
        check_secure(
            privacy.secure, seed=privacy.seed, noise_multiplier=privacy.noise_multiplier, engine=self.speed.engine
        )

    @classmethod
    def of(cls, asked: Any) -> Settings:
        """The settings that ``asked``, such as the callback, holds as attributes of the same names."""

        def part(kind: type[PartT]) -> PartT:
            return kind(**{one.name: getattr(asked, one.name) for one in fields(kind)})

        return cls(part(PrivacySettings), part(SpeedSettings), part(DataSettings))

    @property
    def measures(self) -> bool:
        """Whether forms and engines are timed before the first step. By default not where a run is to repeat bit by bit."""
        return self.privacy.seed is None if self.speed.autotune is None else self.speed.autotune

    def to_agree_on(self) -> dict[str, object]:
        """What has to be the same on every rank, by name: all of privacy and data, nothing of speed."""
        return {one.name: getattr(part, one.name) for part in (self.privacy, self.data) for one in fields(part)}
