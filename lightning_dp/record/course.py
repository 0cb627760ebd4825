"""With a known seed: when a training that goes on needs other randomness than it would have had without the interruption.

Noise is a function of the seed and the number of the step. Two continuations of one checkpoint that sum other gradients at
the same step would release both with the same noise, and the difference of the two would be in the open. So what can be seen
of the mechanism enters the key as soon as it changes. A run that is repeated, or goes on as it was, changes nothing.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from types import CodeType, FunctionType
from typing import Any

import lightning.pytorch as pl
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lightning_dp.lightning_internals import either
from lightning_dp.mechanism.trainable import trainable
from lightning_dp.record.lineage import Lineage

CAVEAT = (
    "noise is a function of the seed and the number of the step, and a checkpoint was gone on with: another continuation of it "
    "has other noise if its public numbers, module, optimizer or schedules are others, and the same noise if it differs in "
    "what cannot be seen here, such as the data, so that what both released must not be put side by side"
)


def course_of(past: Lineage | None, *, lost: bool, steps: int, facts: str) -> str:
    """What enters the key beside the seed; empty for a first fit, and unchanged for one that goes on as it was.

    Args:
        past: of the checkpoint or the fit before, if any.
        lost: whether steps are counted that the weights have not seen.
        steps: how many are counted when it goes on.
        facts: of :func:`facts_of`, for the fit to come.
    """
    if past is None or (not lost and past.facts == facts):
        return "" if past is None else past.course
    return hashlib.sha256(f"{past.course}:{steps}:{facts}".encode()).hexdigest()[:32]


def facts_of(trainer: pl.Trainer, *more: object) -> str:
    """Digest of what can be seen of the gradients to come beside the plan's numbers. All of it is public.

    Where the parameters are is none of it: a training may go on with other ranks, and sharded or whole, as the same mechanism.

    Args:
        trainer: with its module and its optimizers.
        more: arguments of the callback that change what is summed.
    """
    return hashlib.sha256("\n".join(_facts(trainer, more)).encode()).hexdigest()[:32]


def _facts(trainer: pl.Trainer, more: tuple[object, ...]) -> Iterator[str]:
    module = trainer.lightning_module
    yield _plain(more)
    yield f"{module.automatic_optimization} {trainer.precision}"
    for optimizer in trainer.optimizers:
        yield f"{_name(optimizer)} {len(optimizer.param_groups)} {_plain(_defaults(optimizer))}"
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        given = [name for name in inspect.signature(type(scheduler).__init__).parameters if name != "last_epoch"]
        yield f"{_name(scheduler)} {_plain([(name, getattr(scheduler, name, None)) for name in given])}"
    yield _plain([(name, tuple(parameter.shape)) for name, parameter in trainable(module).items()])
    yield _without_shards(module)
    with suppress(Exception):  # hyperparameters that somebody else's code cannot show are left out
        yield _plain(sorted(module.hparams.items()))
    for kind in type(module).__mro__:
        if kind in either(pl.LightningModule):
            break
        if issubclass(kind, FSDPModule):
            continue
        yield f"{kind.__module__}.{kind.__qualname__}"
        yield from (_code(part.__code__) for part in vars(kind).values() if isinstance(part, FunctionType))


def _defaults(optimizer: Optimizer) -> list[tuple[str, Any]]:
    """Its own, without the one that ``load_state_dict`` adds to those that do not have it."""
    own = inspect.signature(type(optimizer).__init__).parameters
    return sorted(
        (name, value) for name, value in optimizer.defaults.items() if name in own or name != "differentiable"
    )


def _code(code: CodeType) -> str:
    inner = [_code(constant) if isinstance(constant, CodeType) else _plain(constant) for constant in code.co_consts]
    return f"{code.co_name} {code.co_code.hex()} {code.co_names} {inner}"


def _without_shards(module: nn.Module) -> str:
    """The module's text, with the names its layers had before ``fully_shard`` gave them classes of its own."""
    text = _plain(module)
    for kind in {type(part) for part in module.modules() if isinstance(part, FSDPModule)}:
        own = next(one for one in kind.__mro__ if not issubclass(one, FSDPModule))
        text = re.sub(rf"\b{re.escape(kind.__name__)}\(", f"{own.__name__}(", text)
    return text


def _plain(value: object) -> str:
    """The same text in every process: no addresses, no order of a set."""
    if isinstance(value, frozenset):
        return str(sorted(map(_plain, value)))
    if isinstance(value, FunctionType):
        return value.__qualname__
    try:
        return re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    except Exception:
        return _name(value)


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
