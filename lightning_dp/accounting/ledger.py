"""The ledger: the only place where spent steps are counted, and where a step can be refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lightning_dp.accounting.assumptions import NOTHING_ASSUMED, Assumptions, caveats
from lightning_dp.accounting.entry import (
    REMEDY,
    Entry,
    check_one_relation,
    fresh_stretch,
    merge_entries,
    phases_composed,
)
from lightning_dp.accounting.epsilon import EpsilonBound
from lightning_dp.accounting.notes import notes_on, notes_on_sizes
from lightning_dp.accounting.phase import Phase, merge_phases, phase_of
from lightning_dp.accounting.reserve import ReservedCurve
from lightning_dp.accounting.slack import Slack
from lightning_dp.plan.mechanism import Mechanism
from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.validate import shown

STATE_VERSION = 2
MOST_STEPS = 10**9
"""No count of affordable steps exceeds this."""
MOST_ENTRIES = 10_000
"""More stretches of steps than any training has: reading a ledger takes a bounded time."""


class BudgetExceededError(RuntimeError):
    """The next step would take ε above the target; it was not charged and must not be taken."""


class Ledger:
    """Counts the steps taken and refuses the one that would overspend.

    Charge *before* the step's noise is drawn: a step that was charged and then failed has spent its budget,
    which is the safe way round. ``plan.steps`` is read as the number of steps of the whole training, resumed
    history included (as Lightning's ``max_steps`` counts); it only sizes the accountant's grid and limits
    nothing.

    | case | behaviour |
    |---|---|
    | no target_epsilon | every step can be charged |
    | σ = 0 with a target | no step can be charged |
    | history has already overspent the target | no step can be charged, ``epsilon()`` still tells |
    | σ or q changed on resume | composed phase by phase, and noted |
    | C changed on resume | noted; ε does not depend on C, because σ is relative to it |
    | max_batch_size or the grid changed on resume | each stretch counts with its own slack, and noted |
    | clipping style changed on resume | noted; ε does not depend on it, because C bounds every style's sensitivity |
    | γ of automatic clipping changed on resume | noted, for the same reason |
    | privacy unit changed on resume | refused: the steps before protect another |
    | adjacency changed on resume | refused: a statement names one |
    | what the user vouches for changed on resume | what was vouched for stays in the notes; ε does not depend on it |
    | dataset size changed on resume | composed, which bounds ε for every example in all phases, and noted |

    Args:
        plan: the public numbers of the steps to come.
        assumed: what the user vouches for in them.
        stretch: see :meth:`begins`; ``None`` for randomness of their own.

    Example:
        >>> plan = PrivacyPlan(noise_multiplier=2.0, clip_norm=1.0, delta=1e-5, dataset_size=1000,
        ...                    expected_batch_size=100, steps=50, target_epsilon=8.0)
        >>> ledger = Ledger(plan)
        >>> ledger.charge()
        >>> ledger.steps, ledger.phases
        (1, (Phase(noise_multiplier=2.0, sampling_probability=0.1, steps=1, law='poisson'),))
    """

    def __init__(self, plan: PrivacyPlan, assumed: Assumptions = NOTHING_ASSUMED, stretch: str | None = None) -> None:
        self._plan, self._assumed = plan, assumed
        self._stretch = "" if plan.mechanism.memoryless else stretch or fresh_stretch()
        self._past: tuple[Entry, ...] = ()
        self._charged = 0
        self.witness: Callable[[int], None] | None = None
        self.course = ""
        self._start()

    def _start(self) -> None:
        """Set up the accountant for the plan's steps after the past ones."""
        mine = [entry for entry in self._past if self._goes_on(entry)]
        self._begun = sum(entry.steps for entry in mine)
        self._past_phases = phases_composed(entry for entry in self._past if entry not in mine)
        self._past_steps = sum(entry.steps for entry in self._past)
        planned = self._plan.steps
        foreseen = planned - self._past_steps if planned is not None and planned >= self._past_steps else planned
        self._foreseen = foreseen
        self._curve = ReservedCurve(
            self._past_phases,
            sum((entry.slack() for entry in self._past), Slack()),
            self._plan.mechanism,
            self._plan.delta,
            Entry.of(self._plan, 1).slack(),
            self._begun,
        )
        self._surely_affordable: int | None = None
        self._affordable: int | None = None

    def _goes_on(self, entry: Entry) -> bool:
        """Whether the steps to come share their randomness with these."""
        return entry.stretch == self._stretch != "" and entry.mechanism == Entry.of(self._plan, 0).mechanism

    @classmethod
    def resume(
        cls,
        plan: PrivacyPlan,
        state: Mapping[str, Any],
        assumed: Assumptions = NOTHING_ASSUMED,
        stretch: str | None = None,
    ) -> Ledger:
        """A ledger that continues under ``plan`` after the steps recorded in ``state``.

        Raises:
            ValueError: the state is of another version, incomplete, or holds an impossible number.
        """
        ledger = cls(plan, assumed, stretch)
        ledger.load_state_dict(state)
        return ledger

    @property
    def plan(self) -> PrivacyPlan:
        """The plan of the steps to come."""
        return self._plan

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Every step taken so far, as runs of equal σ and q in order."""
        return self.phases_after(self.steps)

    def phases_after(self, steps: int) -> tuple[Phase, ...]:
        """:attr:`phases` if ``steps`` steps were taken in all, at least those past, the rest of them under the current plan."""
        further = max(0, steps - self._past_steps)
        return merge_phases([*self._past_phases, phase_of(self._plan.mechanism, self._begun + further)])

    @property
    def begun_at(self) -> int:
        """How many steps had been taken when the randomness of those to come began, if they are not memoryless."""
        return self._past_steps - self._begun

    @property
    def last(self) -> Mechanism | None:
        """What the last step taken was; ``None`` if there was none."""
        taken = [entry for entry in self._entries() if entry.steps]
        return taken[-1].mechanism if taken else None

    @property
    def stretches(self) -> tuple[str, ...]:
        """The names of the randomness of the steps before, as :meth:`begins` was told them."""
        return tuple(dict.fromkeys(entry.stretch for entry in self._past if entry.stretch))

    def begins(self, stretch: str) -> None:
        """Name the randomness of the steps to come, before the first of them. Nothing for a memoryless mechanism.

        Args:
            stretch: of steps of the same mechanism and the same name before, these are the continuation; all others draw
                independently of them.
        """
        if self._charged:
            raise RuntimeError(f"begins() after {self._charged} steps: expected to be called before the first.")
        if not self._plan.mechanism.memoryless:
            self._stretch = stretch
            self._start()

    @property
    def steps(self) -> int:
        """How many steps have been charged, resumed history included."""
        return self._past_steps + self._charged

    def slack(self, steps: int) -> Slack:
        """How far ``steps`` steps in all (at least those past) are from what the accountant composes."""
        past = sum((entry.slack() for entry in self._past), Slack())
        return past + Entry.of(self._plan, steps - self._past_steps).slack()

    @property
    def numbers(self) -> dict[str, Any]:
        """The public numbers of the current plan's steps, and how many are charged, as in a state."""
        return self._current().numbers

    @property
    def changed(self) -> str:
        """Empty if all steps so far were under the current plan's numbers; otherwise after how many they became these.

        :attr:`course` is a part of it: what else has changed.
        """
        current, before = Entry.of(self._plan, 0).text(), list(self._past)
        while before and before[-1].text() == current:
            before.pop()
        return (f"{sum(entry.steps for entry in before)}: {current}" if before else "") + self.course

    @property
    def notes(self) -> tuple[str, ...]:
        """What changed between phases and a reader of the guarantee should know."""
        past = [(entry.assumed, entry.steps) for entry in self._past]
        every = [*self._past, self._current()]
        return (*notes_on_sizes(every), *notes_on(self._entries()), *caveats(self._assumed, past))

    @property
    def affordable_steps(self) -> int | None:
        """How many steps in all (those taken included) fit the target ε; ``None`` without a target.

        Found once, by bisection on the accountant's curve, and kept. At most 10⁹. If the history alone
        overspends, this is the number of steps already taken.
        """
        if self._plan.target_epsilon is None:
            return None
        if self._affordable is None:
            self._affordable = self._past_steps + self._last_affordable(self._plan.target_epsilon)
        return max(self._affordable, self.steps)

    def can_charge(self) -> bool:
        """Whether one more step stays within the target ε (always, without a target).

        A comparison of two counts, once the accountant has been asked.
        """
        target = self._plan.target_epsilon
        if target is None:
            return True
        if self._affordable is None:
            if self._charged < self._lower_limit(target):
                return True
            self._affordable = self._past_steps + self._last_affordable(target)
        return self.steps < self._affordable

    def charge(self) -> None:
        """Count one step of the current plan.

        :attr:`witness`, if set, is then told how many these are. If it raises, the step is charged and must not be taken.

        Raises:
            BudgetExceededError: the step would take ε above the target. Nothing is charged.
        """
        if not self.can_charge():
            target = self._plan.target_epsilon
            raise BudgetExceededError(
                f"target_epsilon={target:g}: step {self.steps + 1} would take ε to "
                f"{self.epsilon(self.steps + 1).epsilon:.4g} (δ = {self._plan.delta:g}), after {self.steps} "
                f"steps at ε = {self.epsilon().epsilon:.4g}. Expected training to end here. Stop, raise "
                "epsilon, or plan for more steps so that a larger noise multiplier is found."
            )
        self._charged += 1
        if self.witness is not None:
            self.witness(self._charged)

    def epsilon(self, steps: int | None = None) -> EpsilonBound:
        """The upper bound on ε after ``steps`` steps in all, past or still to come under the current plan.

        Args:
            steps: total steps, resumed history included. Default: those taken so far.

        Raises:
            ValueError: ``steps`` is negative.
        """
        total = self.steps if steps is None else steps
        if total >= self._past_steps:
            return self._curve.at(total - self._past_steps)
        if total < 0:
            raise ValueError(f"steps={total}: expected a non-negative total number of steps.")
        cut: list[Entry] = []
        for entry in self._past:
            cut.append(replace(entry, steps=min(entry.steps, total)))
            total -= cut[-1].steps
        last = cut[-1]
        mine = [
            entry
            for entry in cut
            if last.stretch and (entry.stretch, entry.mechanism) == (last.stretch, last.mechanism)
        ]
        history = phases_composed(entry for entry in cut[:-1] if entry not in mine)
        begun = sum(entry.steps for entry in mine if entry is not last)
        slack = sum((entry.slack() for entry in cut), Slack())
        curve = ReservedCurve(history, slack, last.mechanism, self._plan.delta, Slack(), begun)
        return curve.at(last.steps)

    def __reduce__(self) -> tuple[Any, ...]:
        return Ledger.resume, (
            self._plan,
            self.state_dict(),
            self._assumed,
            self._stretch,
        )  # plain numbers; curves are computed again

    def state_dict(self, steps: int | None = None) -> dict[str, Any]:
        """What has been spent and under which public numbers, as plain numbers, lists and strings.

        Args:
            steps: as if so many were taken in all, at least those past. Default: those taken so far.
        """
        charged = self._charged if steps is None else max(0, steps - self._past_steps)
        entries = merge_entries([*self._past, replace(self._current(), steps=charged)])
        return {"version": STATE_VERSION, "phases": [entry.numbers for entry in entries]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what this ledger has counted by ``state``, and continue under this ledger's plan.

        Raises:
            ValueError: the state is of another version, incomplete, or holds an impossible number.
        """
        version = state.get("version")
        if type(version) is not int or version != STATE_VERSION:
            raise ValueError(f"version={shown(version)} of the ledger's state: expected {STATE_VERSION}. {REMEDY}")
        phases = state.get("phases")
        if not isinstance(phases, list):
            raise ValueError(f"phases={shown(phases)} in the ledger's state: expected a list. {REMEDY}")
        if len(phases) > MOST_ENTRIES:
            raise ValueError(f"{len(phases)} phases in the ledger's state: expected at most {MOST_ENTRIES}. {REMEDY}")
        past = merge_entries(map(Entry.read, phases))
        check_one_relation(past, self._plan.unit, self._plan.mechanism.adjacency)
        self._past = past
        self._charged = 0
        self._start()

    def _entries(self) -> tuple[Entry, ...]:
        return merge_entries([*self._past, self._current()])

    def _current(self) -> Entry:
        """The steps of the current plan that are charged."""
        return replace(Entry.of(self._plan, self._charged), assumed=self._assumed, stretch=self._stretch)

    def _holds(self, steps: int, target: float) -> bool:
        return self._curve.at(steps).epsilon <= target

    def _lower_limit(self, target: float) -> int:
        """A number of steps of the current plan that is affordable, found without a search."""
        if self._surely_affordable is None:
            by_rdp = self._curve.rdp_steps(target)
            limit = MOST_STEPS if math.isinf(by_rdp) else min(int(by_rdp), MOST_STEPS)
            if self._foreseen is not None and self._foreseen > limit and self._holds(self._foreseen, target):
                limit = self._foreseen
            self._surely_affordable = limit
        return self._surely_affordable

    def _last_affordable(self, target: float) -> int:
        """The largest number of steps of the current plan that keeps ε within the target."""
        holds = self._lower_limit(target)
        if holds >= MOST_STEPS:
            return MOST_STEPS
        stride = max(1, holds // 8)
        fails = holds + stride
        while fails < MOST_STEPS and self._holds(fails, target):
            holds, stride = fails, stride * 2
            fails = holds + stride
        interpolate = True
        while fails - holds > 1:
            middle = (holds + fails) // 2
            below, above = self._curve.at(holds).epsilon, self._curve.at(fails).epsilon
            if interpolate and below < target < above < math.inf:
                # The last step that fits the chord; one more, if that was it, so that the bracket closes.
                middle = holds + int((fails - holds) * (target - below) / (above - below))
                middle = min(max(middle, holds + 1), fails - 1)
            width = fails - holds
            if self._holds(middle, target):
                holds = middle
            else:
                fails = middle
            interpolate = fails - holds < width // 2 or not interpolate
        return min(holds, MOST_STEPS)
