"""One training run, with canaries, and what it says about ε."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
from torch.utils.data import DataLoader

from lightning_dp.audit.bound import Guesses, check_confidence, epsilon_lower_bound, guess, planned_guesses
from lightning_dp.audit.canaries import Canaries, let_in, loader_with_canaries
from lightning_dp.audit.expected import plan_p_value
from lightning_dp.audit.observer import Observer
from lightning_dp.callbacks.augmentation import views_of
from lightning_dp.callbacks.differential_privacy import DifferentialPrivacy
from lightning_dp.loading.columns import with_batch_size
from lightning_dp.look.loader import check_loader
from lightning_dp.validate import number, whole

CONSISTENT, VIOLATED = "consistent", "violated"
NOT_THE_PLAN = 1e-6
"""Guesses less likely than this under the plan are taken for a violation of it."""


MOST_CANARIES = 10**7
"""Each gradient-space canary is one more coordinate of the gradient."""


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What an audit found.

    Args:
        epsilon_lower: with ``confidence``, the run is not (ε, δ)-private for any ε below this.
        confidence: of ``epsilon_lower``, both attacks together.
        epsilon_claimed: the upper bound that the run's statement claims.
        delta: δ of both.
        plan_p_value: how likely the white-box guesses, or better ones, are if every step follows the plan; ``None``
            where there were none, or the plan has no noise.
        verdict: ``"violated"`` if the lower bound exceeds the claim or ``plan_p_value`` is below :data:`NOT_THE_PLAN`,
            ``"consistent"`` otherwise.
        attacks: the guesses of each attack.
    """

    epsilon_lower: float
    confidence: float
    epsilon_claimed: float
    delta: float
    plan_p_value: float | None
    verdict: str
    attacks: tuple[Guesses, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for strict JSON (an infinite ε is ``"inf"``)."""
        return {name: "inf" if value == math.inf else value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        tried = "; ".join(
            f"{g.attack}: {g.correct} of {g.guesses} guesses right, {g.canaries} canaries" for g in self.attacks
        )
        told = "" if self.plan_p_value is None else f"guesses this good under the plan: p = {self.plan_p_value:.2g} "
        return (
            f"{self.verdict}: {self.epsilon_lower:.3f} ≤ ε with confidence {self.confidence:g}, claimed "
            f"ε ≤ {self.epsilon_claimed:.4g} at δ = {self.delta:g}; {told}({tried})"
        )


def check_options(gradient_canaries: int, input_canaries: int, confidence: float, seed: int | None) -> None:
    """Raise ``ValueError`` unless :func:`audit` can work with these."""
    check_confidence(number("confidence", confidence))
    for name, count in (("gradient_canaries", gradient_canaries), ("input_canaries", input_canaries)):
        whole(name, count, low=0, high=MOST_CANARIES)
    if max(gradient_canaries, input_canaries) < 2:
        raise ValueError(
            f"gradient_canaries={gradient_canaries}, input_canaries={input_canaries}: expected at least two of one kind."
        )
    if seed is not None:
        whole("seed", seed, low=0)


def audit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    train_dataloader: DataLoader[Any] | None = None,
    datamodule: pl.LightningDataModule | None = None,
    *,
    gradient_canaries: int = 2000,
    input_canaries: int = 200,
    confidence: float = 0.95,
    seed: int | None = None,
) -> AuditResult:
    """Train once with canaries among the data and bound ε from below by guessing which of them were in.

    The run is ``trainer.fit`` as ever, with the plan that it would have had without canaries: N and B, and so q, σ and
    the number of steps, are those of the user's data; the canaries that are in are drawn with the same q. Gradient-space
    canaries are attacked by someone who sees every released gradient (white box), input-space ones (one example's input
    with another's target) by someone who sees the model at the end (black box).

    Args:
        trainer: with a :class:`~lightning_dp.DifferentialPrivacy` callback, on one device.
        module: trained, and changed (:func:`lightning_dp.audit.canaries.let_in`): do not use it afterwards.
        train_dataloader: the training data, unless a datamodule or the module has them.
        datamodule: likewise.
        gradient_canaries: m₁; each is one more coordinate of every per-example gradient.
        input_canaries: m₂.
        confidence: of the lower bound.
        seed: of the coins; ``None`` for the operating system's entropy.

    Raises:
        ValueError: several devices, no privacy callback, no canary, or a number out of range.

    Source: Steinke, Nasr and Jagielski (2023), arXiv 2305.08846.
    """
    check_options(gradient_canaries, input_canaries, confidence, seed)
    if trainer.world_size != 1:
        raise ValueError(f"world_size={trainer.world_size}: expected 1. Audit on one device (Trainer(devices=1)).")
    private = next((one for one in trainer.callbacks if isinstance(one, DifferentialPrivacy)), None)  # type: ignore[attr-defined]  # set where type checkers do not see it
    if private is None:
        raise ValueError(
            "no DifferentialPrivacy among the Trainer's callbacks: expected one, whose claim is to be audited. Add it."
        )
    if private.privacy_unit is not None:
        raise ValueError(
            "privacy_unit with an audit: expected None. A canary is one example, of nobody who has others; audit the run "
            "without a privacy unit, whose step is otherwise the same."
        )
    observer = Observer(private)
    canaries: list[Canaries] = []
    generator = np.random.default_rng(seed)

    def with_canaries(loader: object) -> DataLoader[Any]:
        loader = check_loader(with_batch_size(loader))
        size = len(loader.dataset)  # type: ignore[arg-type]  # preflight saw that it has a length
        if not canaries:
            canaries.append(Canaries.draw(generator, gradient_canaries, input_canaries, size))
            private.dataset_size = private.dataset_size or size
            private.expected_batch_size = private.expected_batch_size or loader.batch_size
        observer.loader = loader_with_canaries(loader, canaries[0])
        return observer.loader

    private.log_train_metrics = False
    trainer.callbacks.append(observer)  # type: ignore[attr-defined]  # set where type checkers do not see it
    given = None
    if train_dataloader is not None:
        given = with_canaries(train_dataloader)
    else:
        owner = module if datamodule is None else datamodule
        original = owner.train_dataloader
        owner.train_dataloader = lambda: with_canaries(original())  # type: ignore[method-assign]  # the audit's own loader, on purpose
    views = views_of(trainer)
    let_in(module, gradient_canaries, 1 if views is None else views.total)
    trainer.fit(module, train_dataloaders=given, datamodule=datamodule)
    return _judge(observer, canaries[0], private, confidence)


def _judge(observer: Observer, canaries: Canaries, private: DifferentialPrivacy, confidence: float) -> AuditResult:
    statement = private.statement()
    runs = [
        (name, scores, members)
        for name, scores, members in (
            ("white box, gradient canaries", observer.white_box, canaries.gradient),
            ("black box, input canaries", observer.black_box, canaries.inputs),
        )
        if len(members) > 1
    ]
    each = 1.0 - (1.0 - confidence) / len(runs)  # Bonferroni: the largest of the bounds holds with ``confidence``
    attacks = tuple(
        guess(
            name,
            scores[: len(members)],
            members,
            planned_guesses(len(members), statement.epsilon, statement.delta, each),
        )
        for name, scores, members in runs
    )
    lower = max(epsilon_lower_bound(a.canaries, a.guesses, a.correct, statement.delta, each) for a in attacks)
    assert private.ledger is not None
    under_plan = plan_p_value(
        observer.white_box[: len(canaries.gradient)], canaries.gradient, private.ledger.plan, private.ledger.steps
    )
    unlikely = under_plan is not None and under_plan < NOT_THE_PLAN
    return AuditResult(
        epsilon_lower=lower,
        confidence=confidence,
        epsilon_claimed=statement.epsilon,
        delta=statement.delta,
        plan_p_value=under_plan,
        verdict=VIOLATED if lower > statement.epsilon or unlikely else CONSISTENT,
        attacks=attacks,
    )
