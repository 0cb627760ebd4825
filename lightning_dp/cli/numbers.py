"""The accountant as a calculator: ``lightning-dp epsilon`` and ``lightning-dp calibrate``."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any, get_args

from lightning_dp.accounting import Phase, epsilon_bound, phases_of, side_by_side
from lightning_dp.accounting.calibrate import noise_for, noise_for_risk
from lightning_dp.accounting.phase import phase_of_numbers
from lightning_dp.accounting.risk import in_lines, risk_of
from lightning_dp.accounting.target import RiskTarget
from lightning_dp.plan.mechanism import Adjacency, check_noise_multiplier
from lightning_dp.plan.privacy_plan import SAMPLING, check_delta, check_epsilon
from lightning_dp.plan.sampling import IN_BLOCKS, SamplingScheme, check_sampling_probability

_NAMES = {
    "prv": "PRV, upper bound       ",
    "prv_accountant": "prv-accountant, bound  ",
    "rdp": "RDP, upper bound       ",
    "pld": "PLD, upper bound       ",
    "pld_low": "PLD, optimistic        ",
    "pld_high": "PLD, pessimistic       ",
}


_ADJACENCY = list(get_args(Adjacency))
_RELATIONS = "  protected               one example: added or removed with N public, or zeroed out with N constant"
"""For plain draws and a fixed clip norm, which are all that the calculator knows, both relations have the same ε."""


def epsilon(words: Sequence[str]) -> None:
    """``lightning-dp epsilon``, of these arguments."""
    parser = _parser("epsilon", "Print an upper bound on ε of DP-SGD.")
    parser.add_argument(
        "--noise-multiplier", type=float, nargs="+", required=True, metavar="S", help="σ, noise over clip norm"
    )
    parser.add_argument(
        "--all", action="store_true", help="also by prv-accountant, RDP and PLD (the last needs dp-accounting)"
    )
    parser.epilog = "Several σ, q or T, one for each phase, are composed; a single one holds for all phases."
    args = _parse_common(parser, words, several=True)
    try:
        for sigma in args.noise_multiplier:
            check_noise_multiplier(sigma)
        phases = phases_of(args.noise_multiplier, args.sampling_probability, args.steps, args.sampling)
        bound, risk = epsilon_bound(phases, args.delta), risk_of(phases)
        others = side_by_side(phases, args.delta) if args.all else {}
    except ValueError as error:
        parser.error(str(error))
    if args.json:
        also: dict[str, Any] = {f"epsilon_{name}": value for name, value in others.items()}
        also |= {"accountant": bound.accountant, "note": bound.note, "adjacency": _ADJACENCY, "risk": risk.to_dict()}
        _print_json(epsilon=bound.epsilon, delta=args.delta, **also)
        return
    count, numbers = len(phases), [args.noise_multiplier, args.sampling_probability, args.steps]
    plan = ", then ".join(
        f"σ = {sigma:g}, q = {q:g}, {steps} steps"
        for sigma, q, steps in zip(*([*one] * (count if len(one) == 1 else 1) for one in numbers), strict=True)
    )
    plan += _drawn(args.sampling)
    note = "; " + bound.note if bound.note else ""
    print(f"ε ≤ {_up(bound.epsilon)} at δ = {args.delta:g}: {plan} ({bound.accountant} accountant{note})")
    for name, value in others.items():
        missing = "it gives up here" if name == "prv_accountant" else "not installed (dp-accounting)"
        missing = missing if args.sampling == "poisson" else "only for Poisson sampling"
        label = _NAMES["pld" if name == "prv" and bound.accountant == "PLD" else name]
        print(f"  {label}  {missing if value is None else _up(value)}")
    print(_RELATIONS)
    print(in_lines(risk))


def calibrate(words: Sequence[str]) -> None:
    """``lightning-dp calibrate``, of these arguments."""
    parser = _parser(
        "calibrate", "Print the smallest noise multiplier σ that keeps DP-SGD within (ε, δ), or within a risk."
    )
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--epsilon", type=float, metavar="E", help="target ε")
    target.add_argument(
        "--advantage", type=float, metavar="A", help="the most that TPR - FPR of a membership test may be"
    )
    target.add_argument(
        "--tpr-at-fpr",
        type=float,
        nargs=2,
        metavar=("TPR", "FPR"),
        help="the most that TPR of a membership test may be at FPR",
    )
    target.add_argument("--mu", type=float, metavar="M", help="target μ of Gaussian differential privacy")
    args = _parse_common(parser, words)
    try:
        risk = RiskTarget.of(args.advantage, args.tpr_at_fpr, args.mu)
        if risk is None:
            check_epsilon(args.epsilon)
        if args.steps < 1:
            raise ValueError(f"steps={args.steps}: expected at least 1 step to calibrate the noise for.")

        def phase(sigma: float) -> Phase:
            return phase_of_numbers(sigma, args.sampling_probability, args.steps, args.sampling)

        sigma = noise_for(args.epsilon, args.delta, phase) if risk is None else noise_for_risk(risk, phase)
        bound, found = epsilon_bound([phase(sigma)], args.delta), risk_of([phase(sigma)])
    except ValueError as error:
        parser.error(str(error))
    if args.json:
        _print_json(
            noise_multiplier=sigma,
            epsilon=bound.epsilon,
            delta=args.delta,
            accountant=bound.accountant,
            note=bound.note,
            adjacency=_ADJACENCY,
            risk=found.to_dict(),
        )
        return
    asked = f"{args.epsilon:g}" if risk is None else str(risk)
    print(
        f"σ = {sigma:.6g} keeps ε ≤ {_up(bound.epsilon)} (target {asked}) at δ = {args.delta:g}: "
        f"q = {args.sampling_probability:g}, {args.steps} steps{_drawn(args.sampling)} ({bound.accountant} accountant)"
    )
    print(_RELATIONS)
    print(in_lines(found))


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"lightning-dp {command}", description=description)


def _parse_common(parser: argparse.ArgumentParser, words: Sequence[str], several: bool = False) -> argparse.Namespace:
    number: dict[str, Any] = {"nargs": "+"} if several else {}
    parser.add_argument(
        "--sampling-probability",
        **number,
        type=_fraction,
        required=True,
        metavar="Q",
        help="q, expected batch size / dataset size, such as 0.1 or 1/12",
    )
    parser.add_argument(
        "--sampling",
        choices=("poisson", *IN_BLOCKS),
        default="poisson",
        help="how samples are drawn; with the others each example is in one of every 1/Q steps, and a part of these counts as "
        "the whole",
    )
    parser.add_argument("--steps", **number, type=int, required=True, metavar="T", help="number of private steps")
    parser.add_argument("--delta", type=float, required=True, metavar="D", help="δ, well below 1 / dataset size")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")
    args = parser.parse_args(words)
    try:
        check_delta(args.delta)
        for q in args.sampling_probability if several else [args.sampling_probability]:
            check_sampling_probability(q)
        for steps in args.steps if several else [args.steps]:
            if steps < 0:
                raise ValueError(f"steps={steps}: expected at least 0.")
    except ValueError as error:
        parser.error(str(error))
    return args


def _fraction(text: str) -> float:
    """A number, also as a fraction: 1/12 has no short decimal."""
    over, _, under = text.partition("/")
    if under and float(under) == 0.0:
        raise ValueError("a fraction over 0")
    return float(over) / float(under) if under else float(over)


def _drawn(sampling: SamplingScheme) -> str:
    return "" if sampling == "poisson" else f", {SAMPLING[sampling]} sampling"


def _up(epsilon: float) -> str:
    """Four decimals, never rounded below the bound."""
    text = f"{epsilon:.4f}"
    return text if float(text) >= epsilon else f"{epsilon + 5e-5:.4f}"


def _print_json(**values: Any) -> None:
    finite = {name: "inf" if value == math.inf else value for name, value in values.items()}
    print(json.dumps(finite, ensure_ascii=False))
