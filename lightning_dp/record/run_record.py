"""privacy.json: one file for each run, which nobody else's run replaces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_dp.record.journal import JournalError
from lightning_dp.record.run_folder import RunFolder
from lightning_dp.record.written import name_of


def text_of(statement: Mapping[str, Any], state: str, fits: Mapping[str, int]) -> str:
    """What stands in the file; arguments are as of :meth:`RunRecord.write`."""
    content = {**statement, "state": state, "fits": dict(fits)}
    return json.dumps(content, allow_nan=False, ensure_ascii=False, indent=2) + "\n"


class RunRecord:
    """The file in which one run says what it has spent.

    A file that is there is replaced only by a statement that counts all steps that the file counts: the run's own later
    ones, and those of a fit that resumes it. Any other run gets the next name that is free. So no statement of a run whose
    weights may be somewhere is lost because another run used the same folder.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._number = 1
        self._written: str | None = None

    @property
    def place(self) -> str:
        """Where the file is, for people."""
        return self.folder.place(name_of(self._number))

    def write(self, statement: Mapping[str, Any], state: str, fits: Mapping[str, int]) -> None:
        """Write the file.

        Args:
            statement: with all that goes with it, ready for strict JSON.
            state: ``"running"``, ``"interrupted"`` or ``"ended"``.
            fits: name of each fit that led here, as in ``privacy.journal`` → how many of its steps the statement counts.

        Raises:
            OSError: it cannot be written; what was there is as it was.
        """
        text = text_of(statement, state, fits)
        for number in count(self._number):
            if self._put(name_of(number), text, fits):
                break
        if number > self._number:
            rank_zero_info(
                f"{self.folder.place(name_of(self._number))} is of another run and stays as it is: what this run has spent is "
                f"in {name_of(number)} beside it."
            )
        self._number, self._written = number, text

    def is_there(self, fits: Mapping[str, int]) -> bool:
        """Whether a process that this one started has left a record that a statement about ``fits`` may replace."""
        for number in count(1):
            found = self._found(name_of(number))
            if found is None or _counts_all_of(fits, found):
                return found is not None
        return False

    def withdraw(self, reason: OSError) -> None:
        """Remove what this run has written, since it says too little now and cannot be replaced.

        Args:
            reason: why it cannot.

        Raises:
            JournalError: it is there still.
        """
        name = name_of(self._number)
        if self._written is None or self._found(name) != self._written:
            return
        try:
            self.folder.remove(name)
        except OSError as error:
            raise JournalError(
                f"{self.place} says less than was spent, and can be neither replaced ({reason}) nor removed ({error}): "
                "expected a folder with room that may be written to. Make room, or give Trainer(default_root_dir=...)."
            ) from error

    def _put(self, name: str, text: str, fits: Mapping[str, int]) -> bool:
        found = self._found(name)
        if found is None:
            return self.folder.create(name, text)
        if found == self._written or _counts_all_of(fits, found):
            self.folder.write(name, text)
            return True
        return False

    def _found(self, name: str) -> str | None:
        try:
            return self.folder.read(name)
        except (OSError, UnicodeDecodeError):
            return ""  # whatever it is, it is not ours


def _counts_all_of(fits: Mapping[str, int], text: str) -> bool:
    try:
        before = json.loads(text)["fits"]
        return bool(before) and all(fits.get(name, -1) >= steps for name, steps in before.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
