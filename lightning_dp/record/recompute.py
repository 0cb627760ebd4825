"""A run's statement, computed again from what its journal says was charged, and what of it does not hold.

Two questions are answered apart. Do the file's numbers follow from the steps that it counts? Its plan and its ledger are given
to the accountant again, and every number is compared. And did it count all steps? The journal, which was written step by step
before each release, has to have the same. Whoever can write both files can make them agree: this finds what is damaged, mixed
up, forgotten or edited in one of them, and says nothing of the code that ran (for that there are ``verify`` and ``audit``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lightning_dp.accounting import Ledger, Statement
from lightning_dp.accounting.entry import Entry
from lightning_dp.accounting.ledger import STATE_VERSION
from lightning_dp.accounting.prv import prv_accountant_interval
from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.record.written import Charged, Written, charged_of, digest_of

CLOSE = 1e-6
"""By which part a number that was computed on another machine may differ."""

_NUMBERS = (
    "delta", "target_epsilon", "sampling_probability", "dataset_size", "expected_batch_size", "noise_multiplier", "clip_norm",
    "max_batch_size", "clipping", "automatic_gamma", "adaptation", "gradient_filter", "unit",
)  # fmt: skip
"""What describes the mechanism, by the names of the statement."""
_WORDS = ("accountant", "neighbouring_relation", "sampling", "noise", "simulation")
"""What is said of it, in this version's words."""


@dataclass(frozen=True)
class Recomputed:
    """A statement beside what its steps come to.

    Args:
        record: as it was written.
        statement: computed again.
        interval: between which numbers ε lies by the package ``prv-accountant``; ``None`` where it has no law of the steps.
        fits: of how many fits the journal had the steps; ``None`` if it was not looked for.
        wrong: what does not hold, one sentence each; empty if all does.
        notes: what is as it may be, and a reader should know.
    """

    record: Written
    statement: Statement
    interval: tuple[float, float] | None
    fits: int | None
    wrong: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether nothing is wrong."""
        return not self.wrong


def recompute(file: Path, journals: Sequence[Path] = (), *, without_journal: bool = False) -> Recomputed:
    """What the steps behind a record come to.

    Args:
        file: ``privacy.json``.
        journals: where its fits have their lines; none to look beside the file and above it.
        without_journal: whether to take the file's word for its steps.

    Raises:
        ValueError: a file is missing, torn or of another kind, or the journals do not know the run.
    """
    record = Written.read(file)
    charged = None if without_journal else charged_of(record, journals)
    journal = None if charged is None else _charged_entries(record, charged)
    entries = _entries(record, journal)
    ledger = _ledger(record, entries)
    randomness = _randomness(record)
    statement = Statement.of(ledger, randomness=randomness, risk=record.content.get("risk") is not None)
    interval = prv_accountant_interval(ledger.phases, float(record.content["delta"]))
    wrong = [*_of_journal(record, entries, journal, charged), *_of_numbers(record, statement, interval)]
    fits = None if charged is None else len(charged.lines)
    return Recomputed(record, statement, interval, fits, tuple(wrong), tuple(_notes(record, statement, charged)))


def _charged_entries(record: Written, charged: Charged) -> list[Entry]:
    """What the journal says was charged, as far as the record has to count it.

    A fit that took all steps it had planned may go on from a checkpoint of its middle: then what it took after that has a
    statement of its own. All other steps count.
    """
    entries = []
    for line in charged.lines:
        counted = line.steps if record.fits is None else record.fits[line.fit]
        if line is charged.lines[-1] or line.state != "ended":
            counted = max(counted, line.steps)
        entries.append(Entry.read({**line.phase, "steps": min(counted, line.steps)}))
    return entries


def _entries(record: Written, journal: Sequence[Entry] | None) -> list[Entry]:
    """What the file counts, by its own ledger; in a file without one by its journal, or by the numbers of its statement."""
    if record.phases is not None:
        return [Entry.read(phase) for phase in record.phases]
    if journal:
        more = record.steps - sum(entry.steps for entry in journal)
        return [*journal[:-1], replace(journal[-1], steps=max(0, journal[-1].steps + more))]
    said = record.content
    plain = said.get("noise", "Gaussian noise in floating point") == "Gaussian noise in floating point"
    composed = any(str(caveat).startswith("composed of") for caveat in said.get("caveats", ()))
    if composed or not plain or said.get("sampling") not in ("Poisson", "truncated Poisson") or said.get("simulation"):
        raise ValueError(
            f"{record.file}: expected a run of one σ and one q with plain Poisson sampling, since a file of an earlier version "
            "does not hold the rest. Give the journal, with --journal."
        )
    names = (
        "steps",
        "noise_multiplier",
        "sampling_probability",
        "clip_norm",
        "expected_batch_size",
        "dataset_size",
        "delta",
    )
    numbers = {name: math.inf if said[name] == "inf" else said[name] for name in names}
    optional = {name: said.get(name) for name in ("max_batch_size", "automatic_gamma")}
    kept = {
        "clipping": said.get("clipping", "flat"),
        "unit": said.get("unit", "example"),
        **(said.get("adaptation") or {}),
    }
    return [Entry.read({**numbers, **optional, **kept, "resolution": None, "coordinates": None})]


def _ledger(record: Written, entries: Sequence[Entry]) -> Ledger:
    plan = _plan(record, entries)
    taken = [entry for entry in entries if entry.steps]
    state = {"version": STATE_VERSION, "phases": [entry.numbers for entry in taken]}
    if not taken:
        return Ledger(plan)
    return Ledger.resume(plan, state, taken[-1].assumed, taken[-1].stretch or None)


def _plan(record: Written, entries: Sequence[Entry]) -> PrivacyPlan:
    if record.plan is not None:
        try:
            return PrivacyPlan(**record.plan)
        except TypeError as error:
            raise ValueError(f"{record.file}: expected the numbers of a plan ({error}).") from error
    if not entries:
        raise ValueError(f"{record.file}: expected a run that has taken a step, or a file that holds its plan.")
    target = record.content.get("target_epsilon")
    return PrivacyPlan(entries[-1].mechanism, delta=float(record.content["delta"]), target_epsilon=target)


def _randomness(record: Written) -> Literal["secret", "reproducible"]:
    return "reproducible" if record.content.get("randomness") == "reproducible" else "secret"


# --- what does not hold --------------------------------------------------------------------------------------------------


def _of_journal(
    record: Written, entries: Sequence[Entry], journal: Sequence[Entry] | None, charged: Charged | None
) -> Iterator[str]:
    counted = sum(entry.steps for entry in entries)
    if counted != record.steps:
        yield f"steps={record.steps}: the ledger in the file has {counted}."
    if journal is None or charged is None:
        return
    if not charged.whole and not any("was cut, edited" in str(one) for one in record.content.get("caveats", ())):
        yield "privacy.journal: a line was cut off or taken away, so that steps of this training may be missing in it."
    for line in charged.lines:
        said = line.steps if record.fits is None else record.fits[line.fit]
        if said > line.steps:
            yield f"fits: the file counts {said} steps of {line.fit}, and the journal has {line.steps}."
    there = sum(entry.steps for entry in journal)
    elsewhere = 0 if record.fits is None else max(0, record.steps - sum(record.fits.values()))
    if record.steps < there:
        yield f"steps={record.steps}: expected at least {there}, which the journal says were charged."
    elif record.state != "running" and record.steps > there + elsewhere:
        yield f"steps={record.steps}: expected {there + elsewhere}, since the journal has no more of these fits."
    if record.phases is not None and record.steps >= there:
        yield from _mechanisms(entries, journal)


def _mechanisms(entries: Sequence[Entry], journal: Sequence[Entry]) -> Iterator[str]:
    """Steps that the journal has under other numbers than the file."""
    file = Counter[Entry]()
    for entry in entries:
        file[replace(entry, steps=0)] += entry.steps
    for entry in journal:
        kind = replace(entry, steps=0)
        taken = min(entry.steps, file[kind])
        file[kind] -= taken
        if taken == entry.steps:
            continue
        left = [one for one, steps in file.items() if steps > 0 and one != kind]
        other = left[0].numbers if left else {}
        what = ", ".join(
            f"{name}={value} (in the file {other[name]})"
            for name, value in kind.numbers.items()
            if name in other and other[name] != value
        )
        yield f"ledger: the journal has {entry.steps - taken} steps that the file does not, with {what or 'the same numbers'}."


def _of_numbers(record: Written, statement: Statement, interval: tuple[float, float] | None) -> Iterator[str]:
    said, found = record.content, statement.to_dict()
    for name in _NUMBERS:
        if name in said and not _same(said[name], found[name]):
            yield f"{name}={said[name]}: expected {found[name]}, which is what was charged."
    if record.phases is not None:
        for name in _WORDS:
            if said.get(name) != found[name]:
                yield f"{name}={said.get(name)!r}: expected {found[name]!r}."
        run = said.get("run") or {}
        if run.get("plan") != digest_of(dict(record.plan or {})):
            yield f"run.plan={run.get('plan')}: expected {digest_of(dict(record.plan or {}))}, the digest of the plan."
        if record.state != "running":
            for caveat in found["caveats"]:
                if caveat not in said.get("caveats", ()):
                    yield f"caveats: expected also {caveat!r}."
    if said.get("randomness") not in ("secret", "reproducible"):
        yield f"randomness={said.get('randomness')!r}: expected 'secret' or 'reproducible'."
    for name, value, expected in _bounds(said, found):
        if not _number(value) >= expected * (1.0 - CLOSE) - 1e-12:
            yield f"{name}={value}: expected at least {expected:.6g}, which the steps come to."
    if interval is not None and not _number(said["epsilon"]) >= interval[0]:
        yield f"epsilon={said['epsilon']}: expected at least {interval[0]:.6g}, by the package prv-accountant."


def _bounds(said: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[tuple[str, Any, float]]:
    """Upper bounds in the statement: name, what is said, what the steps come to."""
    yield "epsilon", said["epsilon"], _number(found["epsilon"])
    risk, again = said.get("risk"), found["risk"]
    if not isinstance(risk, Mapping) or again is None:
        return
    for name, value in again.items():
        if isinstance(value, Mapping):
            given = risk.get(name)
            for key, one in value.items():
                yield f"risk.{name}.{key}", given.get(key) if isinstance(given, Mapping) else None, _number(one)
        elif name != "mu_regret":
            yield f"risk.{name}", risk.get(name), _number(value)


def _notes(record: Written, statement: Statement, charged: Charged | None) -> Iterator[str]:
    said = record.content
    if record.state == "running":
        yield (
            f"the run was killed or is still running: {record.steps} steps are an upper bound, and the journal has the exact "
            "count"
        )
    looser = [
        f"{name}={_number(value):.6g} for {expected:.6g}"
        for name, value, expected in _bounds(said, statement.to_dict())
        if _number(value) > expected * (1.0 + CLOSE) + 1e-12
    ]
    if looser:
        yield f"said is more than the steps come to now, which is an upper bound all the same: {', '.join(looser)}"
    if charged is None:
        yield "the steps are the file's own word: no journal was looked at"
        return
    elsewhere = 0 if record.fits is None else record.steps - sum(record.fits.values())
    if elsewhere > 0 and record.state != "running":
        yield f"{elsewhere} of the steps are of fits that the file does not name, such as those of a callback that was copied"
    for line in charged.others:
        yield f"fit {line.fit} of the same training has charged {line.steps} steps, which a statement of its own has to count"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, float) or isinstance(b, float):
        return _number(a) == _number(b) or math.isclose(_number(a), _number(b), rel_tol=1e-9)
    return type(a) is type(b) and bool(a == b)


def _number(value: Any) -> float:
    """A number as JSON has it, ``nan`` for anything else."""
    if value == "inf":
        return math.inf
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
