"""What a checkpoint says of spent budget: with a digest when it is written, read without running code, refused when damaged."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed.checkpoint.api import CheckpointException

from lightning_dp.engines.user_code import warn_user
from lightning_dp.errors import PreflightError
from lightning_dp.mechanism.state import NOTHING, MechanismState
from lightning_dp.record.course import course_of
from lightning_dp.record.lineage import Lineage
from lightning_dp.record.lost_steps import Places, count_lost
from lightning_dp.record.sharded_checkpoint import check_sharded_checkpoint, is_sharded

_REMEDY = (
    "Resume from a checkpoint that is whole and unedited; spent budget cannot be guessed. To start from public weights, load "
    "them into the module (for instance with load_from_checkpoint) and call fit without ckpt_path."
)


@dataclass(frozen=True)
class Spent:
    """What earlier fits of a training have spent.

    Args:
        ledger: the state of their ledger.
        lineage: which fits they were, and where they kept their journal; ``None`` if they kept none.
        world_size: how many ranks took the last steps; ``None`` if nobody knows.
        unused_samples: how many samples were drawn and not stepped on.
        resumed: whether all this was read from a checkpoint.
        carried: what the mechanism carries to the next step.
    """

    ledger: dict[str, Any]
    lineage: Lineage | None = None
    world_size: int | None = None
    unused_samples: int = 0
    resumed: bool = field(default=False, compare=False)
    carried: MechanismState = NOTHING

    @property
    def notes(self) -> tuple[str, ...]:
        """Caveats for the statement."""
        return () if self.lineage is None else self.lineage.notes


def of_a_copy(spent: Spent | None) -> Spent | None:
    """What a copy of a callback goes on from: all that is spent, as a training of its own from here on.

    What the original does later is not the copy's, and the other way round.
    """
    if spent is None or spent.lineage is None:
        return spent
    own = replace(spent.lineage, training=secrets.token_hex(8), counted={}, heads={}, last="")
    return replace(spent, lineage=own)


def with_digest(spent: Spent) -> dict[str, Any]:
    """The state of the callback in a checkpoint: plain numbers, strings, lists and dicts, and a digest of them.

    The digest notices damage and edits by hand. It is no signature: whoever can edit a checkpoint on purpose can write
    another, and can say whatever they like about ε anyway.
    """
    journal = None if spent.lineage is None else asdict(spent.lineage)
    content = {"ledger": spent.ledger, "journal": journal, "world_size": spent.world_size}
    content["unused_samples"] = spent.unused_samples
    content["mechanism"] = spent.carried.state_dict()
    return {**content, "digest": _digest(content)}


def read_with_digest(state: object) -> Spent:
    """The inverse of :func:`with_digest`.

    Raises:
        PreflightError: there is no ledger, or it is not what was written.
    """
    if not isinstance(state, Mapping) or not state.get("ledger"):
        raise PreflightError(
            "ckpt_path without a privacy ledger: expected a checkpoint of a private run. Its steps saw the data without "
            "protection, which no later step can undo. To start from public weights, load them into the module "
            "(for instance with load_from_checkpoint) and call fit without ckpt_path."
        )
    names = ("ledger", "journal", "world_size", "unused_samples", "mechanism")
    content = {name: state.get(name) for name in names if name != "mechanism" or name in state}  # older ones have none
    if set(state) != {*content, "digest"} or state["digest"] != _digest(content) or not state["digest"]:
        raise PreflightError(f"the privacy ledger in the checkpoint was changed after it was written: {_REMEDY}")
    try:
        lineage = None if content["journal"] is None else Lineage.read(content["journal"])
        carried = MechanismState.read(content.get("mechanism"))
    except ValueError as error:
        raise PreflightError(str(error)) from error
    return Spent(state["ledger"], lineage, state["world_size"], state["unused_samples"], resumed=True, carried=carried)


def spent_of(checkpoint: Mapping[str, Any], key: str) -> Spent:
    """What the checkpoint of a private run has spent.

    Args:
        checkpoint: as Lightning has read it.
        key: the callback's ``state_key``.

    Raises:
        PreflightError: there is no ledger, it was changed, or it counts fewer steps than the weights have seen.
    """
    callbacks = checkpoint.get("callbacks")
    spent = read_with_digest(callbacks.get(key) if isinstance(callbacks, Mapping) else None)
    phases, taken = spent.ledger.get("phases"), checkpoint.get("global_step")
    if type(taken) is not int or taken < 0:
        raise PreflightError(f"global_step={taken!r} in the checkpoint: expected a number of steps. {_REMEDY}")
    if isinstance(phases, list) and all(isinstance(phase, Mapping) for phase in phases):
        steps = [phase.get("steps") for phase in phases]
        taken -= _manual_steps(checkpoint)
        if all(type(count) is int for count in steps) and sum(steps) < taken:  # what else is wrong the ledger finds
            raise PreflightError(
                f"global_step={taken} in a checkpoint whose ledger counts {sum(steps)} steps: expected at least as many, since "
                f"every step of the optimizer is a private step. {_REMEDY}"
            )
    return spent


def lost_since(spent: Spent | None, where: Places, facts: str = "") -> tuple[list[dict[str, Any]], Lineage | None]:
    """The steps of this training that the checkpoint does not hold, as phases, and the lineage that counts them.

    Args:
        spent: of the checkpoint, or of the fit before in this process, if there was any.
        where: to look for journals.
        facts: what is seen of the gradients to come, see :mod:`lightning_dp.record.course`.

    Raises:
        JournalError: a journal was edited or damaged.
    """
    if spent is None or spent.lineage is None:
        return [], None
    phases, lineage = count_lost(spent.lineage, where, resumed=spent.resumed)
    steps = sum(lineage.counted.values())
    course = course_of(spent.lineage, lost=bool(phases), steps=steps, facts=facts)
    return phases, replace(lineage, course=course, facts=facts)


def with_lost_steps(spent: Spent, lost: tuple[list[dict[str, Any]], Lineage | None]) -> Spent:
    """``spent``, with what :func:`lost_since` has found charged too, and a warning that says so."""
    phases, lineage = lost
    if not phases:
        return replace(spent, lineage=lineage)
    rank_zero_only(warn_user)(
        f"An interrupted fit took {sum(phase['steps'] for phase in phases)} steps after the checkpoint: they are counted as "
        "spent, since what was logged of them may have been seen. Save checkpoints more often to lose fewer."
    )
    return replace(spent, ledger={**spent.ledger, "phases": [*spent.ledger["phases"], *phases]}, lineage=lineage)


def read_checkpoint(
    load: Callable[..., dict[str, Any]], path: object, weights_only: bool | None, *, weights_apart: bool = False
) -> dict[str, Any]:
    """Read a checkpoint without running what it holds, and say plainly when it is no whole checkpoint.

    Args:
        load: the strategy's own ``load_checkpoint``.
        path: the file.
        weights_only: as given to ``fit``. ``None`` is ``True`` here, also for an address: tensors and plain values are read,
            and a file that would run code on being read is refused. ``False`` unpickles it, at the caller's own risk.
        weights_apart: whether ``load`` puts the weights into the module itself and returns the rest.

    Raises:
        PreflightError: the file is torn, or no checkpoint of Lightning, or holds more than tensors and plain values.
        FileNotFoundError, IsADirectoryError, PermissionError: there is no such file, or it may not be read.
    """
    with _naming(path):
        checkpoint = load(path, weights_only=True if weights_only is None else weights_only)
    if not isinstance(checkpoint, dict) or not (weights_apart or isinstance(checkpoint.get("state_dict"), Mapping)):
        raise PreflightError(
            f"ckpt_path={path} holds a {type(checkpoint).__name__} without a state_dict: expected a checkpoint of Lightning. "
            "For weights alone, load them into the module and call fit without ckpt_path."
        )
    return checkpoint


def check_before_reading(path: Path) -> None:
    """Refuse a sharded checkpoint that would run code on being read; torch itself unpickles parts of it unasked.

    Raises:
        PreflightError: as of :func:`read_checkpoint`. Nothing was loaded.
    """
    if is_sharded(path):
        with _naming(path):
            check_sharded_checkpoint(path)


@contextmanager
def _naming(path: object) -> Iterator[None]:
    """Say plainly which checkpoint cannot be read."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, PermissionError, MemoryError):
        raise
    except (
        Exception,
        CheckpointException,
    ) as error:  # torch tells a torn file by errors of many types: RuntimeError, EOFError, OSError, ...
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PreflightError(
            f"ckpt_path={path} cannot be read ({first[:200]}): expected a whole checkpoint of tensors and plain values. It was "
            "cut short or damaged (a full disk, an interrupted copy), or it holds objects, which are not unpickled since that "
            "runs code. Resume from another checkpoint: steps that it does not hold are counted from privacy.journal. If you "
            "wrote objects into it yourself, fit(..., weights_only=False) reads them."
        ) from error


def _manual_steps(checkpoint: Mapping[str, Any]) -> int:
    """How many of ``global_step`` were made by hand: several optimizers may step on one private gradient."""
    node: object = checkpoint.get("loops")
    for name in ("fit_loop", "epoch_loop.manual_optimization.optim_step_progress", "total", "completed"):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node if type(node) is int and node > 0 else 0


def _digest(content: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(content, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return ""  # not what was written: only plain values were
    return hashlib.sha256(text.encode()).hexdigest()
