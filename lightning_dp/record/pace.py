"""How long a training will take, said once it has been seen to step."""

from __future__ import annotations

import time

from lightning_dp.record.panel import show

FEWEST_STEPS, FEWEST_SECONDS = 3, 5.0
"""Of which a pace is told; the first step is not among them, since much is made ready in it."""
SHORTEST = 60.0
"""Seconds; about what is over sooner nothing is said."""


class Pace:
    """Tells people once how many minutes are left.

    How long a step takes depends on how many examples it draws, which is private, as every progress bar's rate does: it is for
    whoever watches, and written nowhere.
    """

    def __init__(self) -> None:
        self._began: float | None = None
        self._steps, self._told = 0, False

    def step(self, left: int | None) -> None:
        """A step is over.

        Args:
            left: how many are still to be taken, ``None`` if nobody knows.
        """
        if self._told or left is None:
            return
        now = time.monotonic()
        if self._began is None:
            self._began = now
            return
        self._steps += 1
        taken = now - self._began
        if self._steps < FEWEST_STEPS or taken < FEWEST_SECONDS:
            return
        self._told, each = True, taken / self._steps
        if left * each >= SHORTEST:
            pace = f"{each:{'.2g' if each < 99.5 else '.0f'}} s a step, as were the first {self._steps}"
            show("Differential privacy: time", {"left": f"{duration(left * each)} for {left} steps", "pace": pace})


def duration(seconds: float) -> str:
    """For people.

    Example:
        >>> duration(100), duration(5000), duration(60 * 60 * 30)
        ('about 2 minutes', 'about 1 h 23 min', 'about 30 h')
    """
    minutes = max(1, round(seconds / 60))
    if minutes < 60:
        return f"about {minutes} minute{'' if minutes == 1 else 's'}"
    if minutes >= 600:
        return f"about {round(minutes / 60)} h"
    hours, rest = divmod(minutes, 60)
    return f"about {hours} h" + (f" {rest} min" if rest else "")
