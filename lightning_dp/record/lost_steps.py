"""The steps of a training that a checkpoint does not hold: found in the journals of its fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_dp.record.course import CAVEAT
from lightning_dp.record.journal_line import FILE_NAME, JournalError, Lines, read_lines
from lightning_dp.record.lineage import Lineage
from lightning_dp.record.run_folder import journal_folder
from lightning_dp.record.written import furthest

_MOST_RUNS = 1000


@dataclass(frozen=True)
class Places:
    """Where journals are looked for; no file names any of them.

    Args:
        own: the Trainer's own folders.
        near: folders beside and above the checkpoint.
        versions: folders of the loggers' other runs.
    """

    own: Sequence[Path] = ()
    near: Sequence[Path] = ()
    versions: Sequence[Path] = ()

    def journals(self) -> Iterator[Lines]:
        """What was found.

        Raises:
            JournalError: a journal beside or above the checkpoint, or in a folder of the Trainer, is damaged.
        """
        first = {(folder / FILE_NAME).absolute() for folder in (*self.near, *self.own)}
        for file in sorted(first):
            yield read_lines(file)
        for file in sorted({(folder / FILE_NAME).absolute() for folder in self.versions} - first):
            try:
                yield read_lines(file)
            except JournalError:  # of some other run, most likely
                yield Lines(whole=False)


def places(trainer: pl.Trainer, ckpt_path: object) -> Places:
    """Where the journals of earlier fits may be. Call it on every rank.

    Args:
        trainer: whose ``log_dir``, ``default_root_dir`` and loggers' folders are looked into.
        ckpt_path: where the checkpoint is that is resumed, if any: its folder and the one above are looked into, and if that
            one is a ``version_N``, the versions beside it.
    """
    own = [journal_folder(folder) for folder in (trainer.log_dir, trainer.default_root_dir) if folder]  # on all ranks
    parents = list(Path(str(ckpt_path)).parents[:2]) if ckpt_path and "://" not in str(ckpt_path) else []
    roots = [Path(root) for logger in trainer.loggers if isinstance(root := getattr(logger, "root_dir", None), str)]
    roots += [folder.parent for folder in parents if folder.name.startswith("version_")]
    return Places(own, parents, [folder for root in dict.fromkeys(roots) for folder in _inside(root)])


def _inside(root: Path) -> list[Path]:
    with suppress(OSError):
        folders = [folder for folder in root.iterdir() if folder.is_dir()]
        return sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True)[:_MOST_RUNS]
    return []


def count_lost(lineage: Lineage, where: Places, *, resumed: bool = True) -> tuple[list[dict[str, Any]], Lineage]:
    """The steps that fits of this training took and the ledger of the checkpoint does not hold.

    These are the steps of interrupted fits after their last checkpoint: their weights, and what was logged of them, are
    releases of the same data. A fit that took all the steps it had planned has a statement of its own; going back behind its
    end makes a second continuation, and the lineage keeps how many steps that leaves uncounted, to say so.

    Args:
        lineage: of the checkpoint, or of the fit before in this process.
        where: to look for journals.
        resumed: whether the lineage was read from a checkpoint.

    Returns:
        Phases for the ledger of the interrupted fits' steps, and the lineage in which they are counted.

    Raises:
        JournalError: a line of a journal was edited or damaged.
    """
    journals = list(where.journals())
    mine = [journal for journal in journals if any(line.training == lineage.training for line in journal.lines)]
    fits = furthest(line for journal in mine for line in journal.lines if line.training == lineage.training)
    counted, phases, heads, beside = dict(lineage.counted), [], dict(lineage.heads), dict(lineage.beside)
    for line in fits.values():
        missing = line.steps - counted.get(line.fit, 0)
        if missing > 0 and line.state == "ended":
            beside[line.fit] = missing
        elif missing > 0:
            phases.append({**line.phase, "steps": missing})
            counted[line.fit] = line.steps
        heads.setdefault(line.fit, line.head)
    if not resumed:  # what this process did itself it knows
        return phases, replace(lineage, counted=counted, lost=lineage.lost + _steps(phases), heads=heads, beside=beside)
    last = fits.get(lineage.last)
    proved = all(line.has_digest and line.head == heads[line.fit] for line in fits.values()) and all(
        journal.whole for journal in mine
    )
    behind = any(line.steps < lineage.counted.get(line.fit, 0) for line in fits.values())
    unclosed = {line.fit for line in fits.values() if not line.closed and line.steps} | set(lineage.unclosed)
    return phases, replace(
        lineage,
        counted=counted,
        heads=heads,
        lost=lineage.lost + _steps(phases),
        found=lineage.found and (last is not None if lineage.last else bool(fits)),
        proved=lineage.proved and bool(lineage.last) and proved and not behind,
        unclosed=sorted(unclosed),
        resumed=True,
        beside=beside,
    )


def caveats(lineage: Lineage | None, phase: dict[str, Any], where: Places, seeded: bool) -> tuple[str, ...]:
    """What a reader of the statement has to know of other fits.

    Args:
        lineage: of the training that goes on, if one does.
        phase: the public numbers of the steps to come.
        where: to look for journals.
        seeded: whether the randomness comes from a seed.
    """
    if lineage is None:
        return uncounted_strangers(None, phase, where)
    same_noise = (CAVEAT,) if seeded and lineage.resumed else ()
    return (*lineage.notes, *same_noise, *uncounted_strangers(lineage, phase, where))


def uncounted_strangers(lineage: Lineage | None, phase: dict[str, Any], where: Places) -> tuple[str, ...]:
    """A caveat for the fits in the same folders that were killed, of other trainings on as many examples.

    A run that is killed before its first checkpoint and started anew is one of these: nothing connects the two.

    Args:
        lineage: of the training that goes on, if one does.
        phase: the public numbers of the steps to come.
        where: to look.
    """
    alike = ("dataset_size", "unit")
    with suppress(JournalError):
        lines = [line for journal in where.journals() for line in journal.lines]
        gone_on = {str(line.origin.get("fit")) for line in lines if line.origin is not None}
        mine = None if lineage is None else lineage.training
        others = (line for line in lines if line.training != mine and line.fit not in gone_on)
        killed = furthest(line for line in others if line.steps and not line.closed)
        steps = [
            line.steps for line in killed.values() if all(line.phase.get(name) == phase.get(name) for name in alike)
        ]
        if steps:
            return (
                f"{FILE_NAME} in the folders of this run names {_fits(len(steps))} of another training, killed or still "
                f"running when this one began: {'its' if len(steps) == 1 else 'their'} {sum(steps)} steps are not counted "
                "here. If that was on the same data and anything of it was seen, add what it has spent",
            )
    return ()


def _fits(number: int) -> str:
    return "1 fit" if number == 1 else f"{number} fits"


def _steps(phases: Iterable[dict[str, Any]]) -> int:
    return sum(phase["steps"] for phase in phases)
