"""What a verification found, in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning_dp.audit.compare import Found, Kind

_MEANING: dict[Kind, str] = {
    "state": (
        "It leaves the run in a checkpoint, and the releases that both runs were given do not explain it: it was made from "
        "examples without noise, and no (ε, δ) covers it."
    ),
    "draw": "Whether an example takes part may not depend on any other: the sampling would not be what ε is computed for.",
    "contribution": (
        "Its gradient depends on the example that is away or another, so adding one example moves the sum by more than that "
        "example's own C, and ε is false."
    ),
    "clipping": "One example may move the sum by more than C, and the noise is made for C: ε is false.",
    "engine": "The sum holds something else than each example's own clipped gradient, so nothing bounds what one example adds.",
    "total": "One example moves the sum by more than the noise is made for: ε is false.",
    "noise": "What is released is not the sum with the plan's noise over the plan's divisor: ε is not that of the plan.",
    "steps": "The number of steps tells who is in the data, and no noise covers it.",
}

_REMEDY: dict[Kind, str] = {
    "state": (
        "Let only the optimizer move weights. Compute what is kept from released weights or public data, in a hook such as "
        "on_train_batch_end, or do not keep it."
    ),
    "draw": "Use the package's own sampling; report this if the code is not yours.",
    "contribution": (
        "Let training_step read the weights, its own example and public values only, and draw random numbers for each example "
        "by itself; make each row in the data set or collate_fn from its own record."
    ),
    "clipping": "This is the package's own work: report it, with the recipe.",
    "engine": "Train with DifferentialPrivacy(engine='loop'), which is right and slow, and report this with the recipe.",
    "total": "Look at what is named above; if nothing is, report this with the recipe.",
    "noise": "Release gradients by the package alone; if nothing of yours changes them, report this with the recipe.",
    "steps": "Take the same steps whatever the data are: skip or stop by counters, not by examples.",
}


class VerificationError(RuntimeError):
    """A replay has shown that the run is not as private as it says."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first thing that is wrong.

    Attributes:
        kind: ``"state"``, ``"draw"``, ``"contribution"``, ``"clipping"``, ``"engine"``, ``"total"``, ``"noise"``, ``"steps"``.
        step: in which, from 0; -1 before the first.
        neighbour: the replay in which it was seen.
        example: whose gradient, as in ``"example 12"``, or ``None``.
        name: of the parameter or the state, or ``""``.
        found: what was measured.
        code: the user's line behind it, or as near as can be said; ``""`` if nothing can.
        meaning: what follows for (ε, δ).
        remedy: what to do.
    """

    kind: Kind
    step: int
    neighbour: str
    example: str | None
    name: str
    found: str
    code: str
    meaning: str
    remedy: str

    @classmethod
    def of(cls, found: Found, neighbour: str, example: str | None, code: str) -> Difference:
        """In words."""
        return cls(
            kind=found.kind, step=found.step, neighbour=neighbour, example=example, name=found.name, found=found.text,
            code=code, meaning=_MEANING[found.kind], remedy=_REMEDY[found.kind],
        )  # fmt: skip

    def __str__(self) -> str:
        what = ", ".join(part for part in (self.example, self.name) if part)
        when = f"step {self.step}" if self.step >= 0 else "before the first step"
        lines = [f"{when}, {self.neighbour}: {what + ': ' if what else ''}{self.found}."]
        if self.code:
            lines.append(f"Where: {self.code}")
        return "\n  ".join([*lines, self.meaning, self.remedy])


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What :func:`lightning_dp.verify` found.

    Attributes:
        ok: whether nothing differed.
        steps: how many each replay took.
        examples: how many examples each had.
        precision: in which gradients were compared.
        engine: that made the sums.
        neighbours: the replays that were compared.
        compared: what was compared, in sentences.
        not_compared: what was not.
        difference: the first thing that is wrong, ``None`` if nothing is.
    """

    ok: bool
    steps: int
    examples: int
    precision: str
    engine: str
    neighbours: tuple[str, ...]
    compared: tuple[str, ...]
    not_compared: tuple[str, ...]
    difference: Difference | None

    def check(self) -> None:
        """Raise :class:`VerificationError` unless :attr:`ok`."""
        if not self.ok:
            raise VerificationError(str(self))

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for strict JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.difference is not None:
            return f"violated: {self.difference}"
        lines = [
            f"verified: {self.steps} steps on {self.examples} examples, replayed {', '.join(self.neighbours)}; engine "
            f"{self.engine}, {self.precision}.",
            f"  The same were: {'; '.join(self.compared)}.",
            f"  Not looked at: {'; '.join(self.not_compared)}.",
        ]
        return "\n".join(lines)
