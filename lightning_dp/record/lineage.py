"""What a checkpoint knows about the fits that led to it, and what of their steps cannot be proved to be counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_dp.plan.privacy_plan import MOST_STEPS
from lightning_dp.record.journal_line import FILE_NAME

_FIRST = {"training": str, "file": str, "counted": dict, "lost": int, "found": bool}
_SINCE = {
    "heads": dict,
    "last": str,
    "unclosed": list,
    "proved": bool,
    "resumed": bool,
    "course": str,
    "facts": str,
    "beside": dict,
}
_MOST_FITS, _LONGEST = 10_000, 4096


@dataclass(frozen=True)
class Lineage:
    """What a checkpoint knows about the fits that led to it.

    Args:
        training: name of the training, shared by a first fit and all that resume it.
        file: where the last fit kept its line. It is for people: nothing is read from there or written to it.
        counted: name of a fit → how many of its steps the checkpoint's ledger holds.
        lost: how many of the ledger's steps are in no weights, because they were taken after the checkpoint that was resumed.
        found: whether the last fit's line was found at every resume.
        heads: name of a fit → the digest of its line in the journal.
        last: name of the fit that wrote the checkpoint.
        unclosed: names of fits that were killed, so that nothing says which step was their last.
        proved: whether the journals that were found were whole, and went on from what the checkpoint knew.
        resumed: whether a checkpoint was resumed.
        course: what makes the randomness after a resume another than it would have been without, see
            :mod:`lightning_dp.record.course`.
        facts: digest of what can be seen of the mechanism beside the ledger's numbers.
        beside: name of a fit that went another way and took all the steps it had planned → how many of these are not counted.
    """

    training: str
    file: str
    counted: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    found: bool = True
    heads: dict[str, str] = field(default_factory=dict)
    last: str = ""
    unclosed: list[str] = field(default_factory=list)
    proved: bool = True
    resumed: bool = False
    course: str = ""
    facts: str = ""
    beside: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, raw: object) -> Lineage:
        """The inverse of ``asdict``, also of the first version's.

        Raises:
            ValueError: a part is missing, of another type or out of range.
        """
        kinds = {name: type(value) for name, value in raw.items()} if isinstance(raw, Mapping) else {}
        if not isinstance(raw, Mapping) or kinds not in (_FIRST, {**_FIRST, **_SINCE}):
            raise ValueError(
                f"journal={str(raw)[:400]} in the checkpoint: expected {sorted({**_FIRST, **_SINCE})}. Resume from a whole one."
            )
        counted, heads, unclosed = raw["counted"], raw.get("heads", {}), raw.get("unclosed", [])
        beside = raw.get("beside", {})
        if any(type(name) is not str or not _is_count(steps) for name, steps in [*counted.items(), *beside.items()]):
            raise ValueError(
                f"counted={str(counted)[:400]} in the checkpoint: expected step counts. Resume from a whole one."
            )
        texts: list[Any] = [raw["training"], raw["file"], *counted, *heads, *heads.values(), *unclosed]
        texts += [raw.get(name, "") for name in ("last", "course", "facts")]
        if any(type(text) is not str or len(text) > _LONGEST for text in texts) or len(texts) > 3 * _MOST_FITS:
            raise ValueError("heads, unclosed or counted in the checkpoint: expected names. Resume from a whole one.")
        if not _is_count(raw["lost"]):
            raise ValueError(
                f"lost={str(raw['lost'])[:400]} in the checkpoint: expected a count. Resume from a whole one."
            )
        return cls(**raw)

    @property
    def notes(self) -> tuple[str, ...]:
        """Caveats for the statement."""
        notes = []
        if self.lost:
            notes.append(
                f"training was interrupted: {self.lost} of the steps are in no checkpoint that was resumed from and are "
                "counted, since what was logged of them may have been seen"
            )
        if self.beside:
            number, steps = len(self.beside), sum(self.beside.values())
            fits = "another fit" if number == 1 else f"{number} other fits"
            notes.append(
                f"{fits} went on from a checkpoint of this training to a planned end: {steps} of "
                f"{'its' if number == 1 else 'their'} steps are not counted here but in a statement of their own; whoever has "
                "seen anything of both has to add what these have spent"
            )
        if not self.found:
            notes.append(
                f"{FILE_NAME} of an earlier fit was not found: if that fit was interrupted, its steps after the checkpoint "
                "are not counted"
            )
        if not self.proved:
            notes.append(
                f"a {FILE_NAME} of an earlier fit was cut, edited, put back to an older state, or written by an earlier "
                "version: what it holds is counted, and steps that it does not hold any more are not"
            )
        if self.unclosed:
            number = len(self.unclosed)
            fits = "fit was" if number == 1 else "fits were"
            notes.append(
                f"{number} earlier {fits} killed, or still running, when this training went on: counted are the steps that "
                f"{FILE_NAME} had of them then; a machine that lost its power may have lost the last of them"
            )
        if self.resumed:
            notes.append(
                "training went on from a checkpoint: other runs that went on from it, or from an earlier one, are counted "
                f"only where their {FILE_NAME} lies beside or above the checkpoint or in the Trainer's own folders"
            )
        return tuple(notes)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= MOST_STEPS
