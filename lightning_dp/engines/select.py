"""Pick an engine by trying it on a small batch before training, and say which and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.vmap import VmapEngine
from lightning_dp.functional.gradient import Engine
from lightning_dp.functional.microbatch import BatchAxisError

EngineName = Literal["auto", "vmap", "loop"]
ENGINES: dict[str, Callable[[], Engine]] = {"vmap": VmapEngine, "loop": LoopEngine}


class EngineError(RuntimeError):
    """No engine, or not the one asked for, can run the user's training_step."""


@dataclass(frozen=True)
class Selection:
    """The engine chosen, and the reason if it is not the first choice."""

    engine: Engine
    reason: str | None = None


def check_engine_name(engine: str) -> None:
    """Raise ``ValueError`` unless ``engine`` is one of the names of :data:`EngineName`."""
    if engine not in get_args(EngineName):
        raise ValueError(f"engine={engine!r}: expected one of {', '.join(get_args(EngineName))}.")


def select_engine(name: EngineName, trial: Callable[[Engine], None]) -> Selection:
    """The engine to train with.

    Args:
        name: ``"auto"`` tries ``vmap`` and falls back to ``loop``; any other name is taken or refused.
        trial: runs an engine on a small batch and raises if it cannot.

    Raises:
        EngineError: the engine asked for cannot trace the training_step.
        Exception: what the training_step itself raises when even a batch of one fails is passed on as it is.
    """
    if name != "auto":
        engine = ENGINES[name]()
        try:
            trial(engine)
        except BatchAxisError:
            raise
        except Exception as error:
            if name == "loop":
                raise
            raise EngineError(
                f"engine={name!r} cannot run this training_step: {first_line(error)}. "
                "Use engine='auto' or engine='loop', or remove what depends on an example's values in Python."
            ) from error
        return Selection(engine)
    engine = VmapEngine()
    try:
        trial(engine)
    except BatchAxisError:
        raise
    except Exception as refusal:
        fallback = LoopEngine()
        trial(fallback)  # an error here is the training_step's own and is passed on
        return Selection(fallback, reason=f"vmap cannot trace this training_step: {first_line(refusal)}")
    return Selection(engine)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
