"""What processes started by the Trainer tell the callback that stayed behind in the process that started them.

With the start methods ``spawn`` and ``fork`` (``ddp_spawn``, ``ddp_notebook``, …) training happens in children, and Lightning
brings weights, metrics and the Trainer's state home. What was spent travels with that state.
"""

from __future__ import annotations

import uuid
import weakref
from typing import Any, Protocol

import lightning.pytorch as pl
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

_waiting: weakref.WeakValueDictionary[str, Recipient] = weakref.WeakValueDictionary()


class Recipient(Protocol):
    """Who waits at home."""

    def receive(self, news: dict[str, Any]) -> None:
        """Take over what happened in the child."""


def register(recipient: Recipient, address: str | None = None) -> str:
    """An address at which ``recipient`` can be reached from children of this process.

    Args:
        recipient: kept only as long as somebody else holds it.
        address: the one it had where it was pickled. It stays valid in a child; a copy made in this process, where the
            original still waits, gets another.
    """
    if address is None or _waiting.get(address, recipient) is not recipient:
        address = uuid.uuid4().hex
    _waiting[address] = recipient
    return address


def send_home(trainer: pl.Trainer, address: str, news: dict[str, Any]) -> None:
    """Have ``news`` delivered when Lightning brings the Trainer's state home; nothing to do if this process is home."""
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        trainer.state.letter = _Letter(address, news)  # type: ignore[attr-defined]  # one more attribute to travel along


class _Letter:
    """Delivers itself when it is unpickled."""

    def __init__(self, address: str, news: dict[str, Any]) -> None:
        self._address, self._news = address, news

    def __deepcopy__(self, memo: Any) -> _Letter:
        return self  # Lightning copies the state on its way out

    def __reduce__(self) -> tuple[Any, ...]:
        return _deliver, (self._address, self._news)


def _deliver(address: str, news: dict[str, Any]) -> None:
    recipient = _waiting.get(address)
    if recipient is not None:
        recipient.receive(news)
