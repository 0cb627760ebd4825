"""Pick an engine by trying it on a small batch before training, and say which and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from torch import nn

from lightning_dp.batches.microbatch import BatchAxisError
from lightning_dp.engines.explain import OUT_OF_MEMORY, explain
from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import Engine
from lightning_dp.engines.rounded import RoundedEngine
from lightning_dp.engines.uncompiled import compiled_parts
from lightning_dp.engines.vmap import VmapEngine
from lightning_dp.errors import PreflightError
from lightning_dp.plan.html import html_table
from lightning_dp.validate import shown

EngineName = Literal["auto", "ghost", "vmap", "loop"]
ENGINES: dict[str, Callable[[nn.Module], Engine]] = {
    "ghost": GhostEngine,
    "vmap": lambda module: VmapEngine(),
    "loop": lambda module: LoopEngine(),
}
"""Name → makes the engine for the module whose layers the loss calls. ``"auto"`` tries them in this order: fastest first."""


class EngineError(RuntimeError):
    """No engine, or not the one asked for, can run the user's training_step."""


@dataclass(frozen=True)
class Selection:
    """The engine chosen, the reason if it is not the first choice, and the parts it will run uncompiled.

    Attributes:
        engine: the one that runs a step.
        reason: why it is not the first choice.
        uncompiled: parts that it runs without ``torch.compile``.
        slower: engines that run what it cannot, see :mod:`lightning_dp.engines.fall_back`.
        failures: how often in a row each engine has met what it cannot run.
        told: of which of them that was said.
    """

    engine: Engine
    reason: str | None = None
    uncompiled: tuple[str, ...] = ()
    slower: tuple[Engine, ...] = ()
    failures: dict[str, int] = field(default_factory=dict, compare=False)
    told: set[str] = field(default_factory=set, compare=False)

    def describe(self) -> str:
        """What will run, and why, for people: the engine, the rule of each kind of layer, the reason for a fallback."""
        first = f"lightning_dp: engine '{self.engine.name}'" + (f": {self.reason}" if self.reason else "")
        return "\n".join([first, *(f"  {line}" for line in [*self._layers(), *self._notes()])])

    def facts(self) -> dict[str, str]:
        """The same as rows of a panel: ``"engine"``, and ``"layers"`` if each kind has a rule of its own."""
        first = self.engine.name + (f": {self.reason}" if self.reason else "")
        return {"engine": "\n".join([first, *self._notes()]), "layers": "; ".join(self._layers())}

    def _layers(self) -> list[str]:
        return [f"{count} parameters: {how}" for how, count in Counter(self.engine.handled.values()).most_common()]

    def _notes(self) -> list[str]:
        notes = [
            f"training_step {parting.what} ({parting.line}): examples that agree run together."
            for parting in self.engine.partings[:1]
        ]
        if self.uncompiled:
            notes.append(
                f"torch.compile of {', '.join(self.uncompiled[:5])} is not used in training steps: it cannot see through "
                "the engine's torch.func transforms (engine='loop' would use it)."
            )
        if self.engine.is_reference:
            notes.append("It takes one backward pass per example and is slow.")
        return notes

    def _repr_html_(self) -> str:
        """For notebooks: what :meth:`describe` says."""
        counts = Counter(self.engine.handled.values())
        rows: dict[str, object] = {
            "reason": self.reason,
            "runs one example at a time": "yes, which is slow" if self.engine.is_reference else None,
            **{how: f"{count} parameters" for how, count in counts.most_common()},
            "without torch.compile": ", ".join(self.uncompiled) or None,
        }
        return html_table(f"Engine {self.engine.name!r}", rows)


def check_engine_name(engine: str) -> None:
    """Raise ``ValueError`` unless ``engine`` is one of the names of :data:`EngineName`."""
    if not isinstance(engine, str) or engine not in get_args(EngineName):
        raise ValueError(f"engine={shown(engine)}: expected one of {', '.join(get_args(EngineName))}.")


def select_engine(
    name: EngineName, check: Callable[[Engine], None], module: nn.Module, resolution: int | None = None
) -> Selection:
    """The engine to train with.

    Args:
        name: ``"auto"`` tries ``ghost``, ``vmap`` and ``loop``, and takes the first that works; any other name is taken
            or refused.
        check: runs an engine on a small batch and raises if it cannot, or if its gradients are wrong.
        module: the module whose layers the loss calls.
        resolution: Δ, the sensitivity in units of the grid if the noise is discrete. Sums of integers are exact only if every
            example is worked on alone, so it is then the reference, whatever the name, with its gradients rounded.

    Raises:
        EngineError: the engine asked for cannot trace the training_step.
        PreflightError: what training_step does no engine can make right, such as a write into what all examples share.
        Exception: what the training_step itself raises when even a batch of one fails is passed on as it is, and so is want
            of memory.
    """
    if resolution is not None:
        reference = select_engine("loop", check, module)
        return replace(reference, engine=RoundedEngine(reference.engine, resolution))
    if name != "auto":
        engine = make_engine(name, module)
        try:
            check(engine)
        except (PreflightError, BatchAxisError, *OUT_OF_MEMORY):
            raise
        except Exception as error:
            if engine.is_reference:
                raise
            raise EngineError(
                f"engine={name!r} cannot run this training_step: {explain(error, module)}. "
                "Use engine='auto' or engine='loop', or change that line."
            ) from error
        return Selection(engine, uncompiled=_uncompiled(engine, module))
    reasons: dict[str, list[str]] = {}
    for candidate in ENGINES:
        engine = make_engine(candidate, module)
        try:
            check(engine)
        except (PreflightError, BatchAxisError, *OUT_OF_MEMORY):
            raise
        except Exception as refusal:
            if engine.is_reference:
                raise  # an error here is the training_step's own
            reasons.setdefault(f"cannot run this training_step: {explain(refusal, module)}", []).append(candidate)
        else:
            alone = [parting for parting in engine.partings if parting.single]
            if not alone:
                break
            reason = f"would run one by one: training_step {alone[0].what} ({alone[0].line})"
            reasons.setdefault(reason, []).append(candidate)
    texts = [f"{' and '.join(candidates)} {reason}" for reason, candidates in reasons.items()]
    slower = () if engine.is_reference else (LoopEngine(in_place_of_others=True),)
    return Selection(engine, "; ".join(texts) or None, _uncompiled(engine, module), slower)


def _uncompiled(engine: Engine, module: nn.Module) -> tuple[str, ...]:
    return () if engine.is_reference else tuple(compiled_parts(module))


def make_engine(name: str, module: nn.Module) -> Engine:
    """A new engine of that name, for a loss that calls the layers of ``module``."""
    return ENGINES[name](module)


def engine_that_brings_layers(name: str, module: nn.Module) -> Engine | None:
    """A new engine of that name that can do with parameters brought layer by layer, if it can; any for ``"auto"``."""
    made = (ENGINES[one](module) for one in (ENGINES if name == "auto" else (name,)))
    return next((engine for engine in made if engine.brings_layers), None)
