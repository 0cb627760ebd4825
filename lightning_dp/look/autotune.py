"""What is timed before the first step: the forms of each layer's share, and whole engines where a module is recurrent.

As ``torch.backends.cudnn.benchmark`` does for convolutions, on the device, in the type and at the shapes at hand. Nothing of
it is kept but names of forms. Forms and engines give the same sums, to rounding, so what a clock says may change the last
digits of a run and nothing else: not the samples, not the noise, not what an example draws, and no number of the plan. Layers
are timed on ones, engines on copies of the first examples, which the look before step 0 sees anyway.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_debug
from torch import nn

from lightning_dp.batches.microbatch import Apart
from lightning_dp.batches.seeded import seeded
from lightning_dp.engines.forms import Forms, Key, Offer
from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.together import Together
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import Engine, LossFunction
from lightning_dp.engines.select import EngineError, EngineName, Selection
from lightning_dp.errors import PreflightError
from lightning_dp.look.batch_size.search import copies
from lightning_dp.look.engine_check import check_engines
from lightning_dp.mechanism.complex import as_real_pairs
from lightning_dp.mechanism.full_precision import full_precision
from lightning_dp.mechanism.seeded_globals import globals_put_back
from lightning_dp.mechanism.trainable import trainable
from lightning_dp.step.contents import check_nothing_written
from lightning_dp.step.planned import Planned
from lightning_dp.step.undone import undone

PATIENCE = 2.0
"""Seconds that timing the forms of all layers may take; what was not timed by then stays as estimated."""

ROUNDS = 3
"""Each form is timed so often, in turn with the others, and its least time counts: a machine is never idle."""

MORE_ROUNDS, SHORT = 10, 0.05
"""So often if all of them together take less than so many seconds."""

FASTER = 0.1
"""What is estimated stays unless another takes less time by this part."""

AT_ONCE = {"cpu": 16}
"""Examples that are timed at once, if a micro-batch has as many; on a CPU nothing changes beyond."""

AT_ONCE_ELSEWHERE = 64

PREPARING = 20.0
"""Seconds that trying all forms may take beforehand where kernels are compiled; what is not tried is not timed."""

COMPILING = {"cuda"}
"""Devices on which forms are tried first: kernels are compiled, and what does not run or gives other norms is left out."""

ALIKE = 0.02
"""By this part of them norms of two forms may differ, for some are of products rounded to TF32 or bfloat16, as the user set."""

IN_A_RACE = 256
"""Examples that engines are timed with, if a micro-batch has as many."""


def autotuned(
    planned: Planned, selection: Selection, loss_function: LossFunction, wanted: bool, asked: EngineName
) -> Selection:
    """The engine to train with, with the fastest form for each layer. A collective call: rank 0 measures, all take the same.

    Parameters, buffers, gradients and random generators are as before when it returns, and where something cannot be
    measured, what was estimated stands.

    Args:
        planned: the run, whose first examples are used.
        selection: the engine that was found to work.
        loss_function: the user's training_step on one example.
        wanted: whether anything is measured.
        asked: the engine asked for; only ``"auto"`` is free to take another.

    Raises:
        PreflightError: training_step changes a tensor of the module.
    """
    world, engine = planned.world, selection.engine
    measures = wanted and world.rank == 0 and world.gather == "step"
    forms: Mapping[Key, str] = {}
    if measures and engine.forms is not None:
        forms = _forms(planned, engine, engine.forms, loss_function)
    fastest = engine.name
    contenders = {engine.name: selection}
    free = wanted and asked == "auto" and not engine.is_reference and recurrent(planned.module)
    if free and world.gather == "step":
        contenders |= _others(planned, selection, loss_function)
    if measures and len(contenders) > 1:
        fastest = _race(planned, contenders, loss_function)
    forms, fastest = world.broadcast((forms, fastest))
    if wanted and engine.forms is not None:
        engine.forms.taken = forms
    taken = contenders.get(fastest, selection)
    if taken is selection:
        return selection
    return replace(taken, reason=f"measured to be faster than {engine.name} for this recurrent module")


def recurrent(module: nn.Module) -> bool:
    """Whether it has a layer that goes through a sequence step by step, which no engine does for all examples by one kernel."""
    return any(isinstance(layer, nn.RNNBase) for layer in module.modules())


def _forms(planned: Planned, engine: Engine, forms: Forms, loss_function: LossFunction) -> dict[Key, str]:
    """The fastest forms of the calls that a micro-batch of at most two examples makes."""
    module, rows = planned.module, planned.loader.physical_batch_size
    try:
        with undone(module) as before, torch.enable_grad(), forms.listening() as seen:
            _passes(planned, loss_function, min(rows, 2))(engine)
            examples = min(rows, AT_ONCE.get(planned.world.device.type, AT_ONCE_ELSEWHERE))
            found = fastest_forms(forms, dict(seen), examples, planned.world.device)
            if found and not _worth_it(planned, engine, forms, found, loss_function, examples):
                found = {}
            check_nothing_written(module, before)
        return found
    except PreflightError:
        raise
    except Exception as error:  # whatever a training_step has against it; the estimate is safe
        rank_zero_debug(f"lightning_dp: forms of layers are estimated, not measured: {error}")
        return {}


def _worth_it(
    planned: Planned,
    engine: Engine,
    forms: Forms,
    found: Mapping[Key, str],
    loss_function: LossFunction,
    examples: int,
) -> bool:
    """Whether a whole pass is faster with what was found, where layers share caches and memory."""
    clock, passes = clock_of(planned.world.device), _passes(planned, loss_function, examples)
    least = {False: math.inf, True: math.inf}
    for _ in range(ROUNDS):
        for tuned in least:
            forms.taken = found if tuned else {}
            begun = clock()
            passes(engine)
            least[tuned] = min(least[tuned], clock() - begun)
    forms.taken = {}
    told = "taken" if least[True] < least[False] else "left"
    rank_zero_debug(
        f"lightning_dp: a pass takes {least[True]:.3g} s so, and {least[False]:.3g} s as estimated: {told}."
    )
    return least[True] < least[False]


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds, once a device has done what it was asked. On a CPU with one thread, those that this thread was at work."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.thread_time
    if device.type != "cuda":
        return time.perf_counter

    def waited() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return waited


def fastest_forms(
    forms: Forms,
    offers: Mapping[Key, Offer],
    examples: int,
    device: torch.device,
    clock: Callable[[], float] | None = None,
) -> dict[Key, str]:
    """Call → the form that was fastest there, of the calls where that is not the estimated one.

    Args:
        forms: of the engine; as before when it returns.
        offers: what can be chosen.
        examples: how many are computed at once.
        device: on which.
        clock: seconds; ``None`` for those of the device.
    """
    clock = clock or clock_of(device)
    start, prepared, found, before = clock(), 0.0, dict[Key, str](), forms.taken
    buffers = Buffers(forms)
    try:
        for key, offer in offers.items():
            if len(offer.offered) < 2 or clock() - start - prepared > PATIENCE or prepared > PREPARING:
                continue
            offered, began = offer.offered, clock()
            if device.type in COMPILING:
                offered = _that_hold(forms, key, offer, examples, device)
                prepared += clock() - began
            x, g = (torch.ones(examples, *one.shape[1:], dtype=one.dtype, device=device) for one in offer.like)
            seconds: dict[str, list[float]] = {name: [] for name in offered}
            begun_with, rounds = clock(), 0
            while rounds < ROUNDS or (rounds < MORE_ROUNDS and clock() - begun_with < SHORT):
                for name, times in seconds.items():
                    if times and min(times) > 2 * min(min(other) for other in seconds.values() if other):
                        continue
                    forms.taken = {key: name}
                    begun = clock()
                    _compute(offer, x, g, buffers)
                    times.append(clock() - begun)
                rounds += 1
            least = {name: min(times) for name, times in seconds.items()}
            best = min(least, key=lambda name: least[name])
            if least[best] < (1 - FASTER) * least[offer.estimated]:
                found[key] = best
            told = ", ".join(f"{name} {1e3 * least[name]:.3g} ms" for name in offered)
            rank_zero_debug(f"lightning_dp: {key}: {told} for {examples} examples; {found.get(key, offer.estimated)}.")
    finally:
        forms.taken = before
    return found


def _that_hold(forms: Forms, key: Key, offer: Offer, examples: int, device: torch.device) -> tuple[str, ...]:
    """The forms that run, and whose norms of random numbers (of a generator of their own) are those of the estimated one."""
    generator = torch.Generator(device).manual_seed(0)
    x, g = (
        torch.randn(examples, *one.shape[1:], generator=generator, device=device).to(one.dtype) for one in offer.like
    )
    forms.taken = {key: offer.estimated}
    expected, holding = _norms_of(offer, x, g, forms), [offer.estimated]
    for name in offer.offered:
        if name == offer.estimated:
            continue
        forms.taken = {key: name}
        try:
            holds = torch.allclose(_norms_of(offer, x, g, forms), expected, rtol=ALIKE, atol=0)
        except Exception as error:  # no compiler, no memory, a shape that a kernel does not take
            rank_zero_debug(f"lightning_dp: {key}: {name} does not run: {error}")
            continue
        if holds:
            holding.append(name)
        else:
            rank_zero_debug(f"lightning_dp: {key}: {name} gives other norms, and is left out.")
    return tuple(holding)


def _norms_of(offer: Offer, x: torch.Tensor, g: torch.Tensor, forms: Forms) -> torch.Tensor:
    with torch.no_grad():
        together = Together({"": offer.compute(x, g)}, {"": ""}, Buffers(forms))
        with full_precision():
            return together.norms()[""].values


def _compute(offer: Offer, x: torch.Tensor, g: torch.Tensor, buffers: Buffers) -> None:
    """All that a contribution costs: it is made, and its norms and its weighted sum."""
    with torch.no_grad():
        contribution = offer.compute(x, g)
        with full_precision():  # as a step does
            together = Together({"": contribution}, {"": ""}, buffers)
            norms = together.norms()[""].values
            for _ in together.weighted_sums({"": norms}):
                pass
    buffers.take_back()


def _others(planned: Planned, selection: Selection, loss_function: LossFunction) -> dict[str, Selection]:
    """The engines behind the one that was taken, which were not tried, if they work."""
    found: dict[str, Selection] = {}
    others: tuple[EngineName, ...] = ("vmap", "loop") if selection.engine.name == "ghost" else ("loop",)
    for name in others:
        try:
            one = check_engines(planned, name, loss_function)
        except EngineError:
            continue
        if one.engine.is_reference:  # each example draws what it draws under the other engines
            found[name] = replace(one, engine=LoopEngine(in_place_of_others=True))
        else:
            found[name] = replace(one, slower=selection.slower)
    return found


def _race(planned: Planned, contenders: Mapping[str, Selection], loss_function: LossFunction) -> str:
    """The name of the engine that is fastest on a micro-batch. One that takes examples one by one is timed on two of them."""
    module, clock = planned.module, clock_of(planned.world.device)
    rows = min(planned.loader.physical_batch_size, IN_A_RACE)
    seconds: dict[str, float] = {}
    try:
        with undone(module) as before, torch.enable_grad():
            for name, one in contenders.items():
                count = min(rows, 2) if one.engine.is_reference else rows
                passes, times = _passes(planned, loss_function, count), []
                for _ in range(ROUNDS):
                    begun = clock()
                    passes(one.engine)
                    times.append((clock() - begun) * rows / count)
                seconds[name] = min(times)
            check_nothing_written(module, before)
    except PreflightError:
        raise
    except Exception as error:
        rank_zero_debug(f"lightning_dp: engines are not timed: {error}")
        return next(iter(contenders))
    first = next(iter(contenders))
    best = min(seconds, key=lambda name: seconds[name])
    told = ", ".join(f"{name} {1e3 * took:.3g} ms" for name, took in seconds.items())
    rank_zero_debug(f"lightning_dp: {told} for a micro-batch of {rows} examples.")
    return best if seconds[best] < (1 - FASTER) * seconds[first] else first


def _passes(planned: Planned, loss_function: LossFunction, rows: int) -> Callable[[Engine], object]:
    """Runs an engine on so many copies of the first examples."""
    loader, form = planned.loader, planned.form
    raw, examples = loader.first_examples(len(loader.first_indices(min(2, rows))))
    if isinstance(raw, Apart):
        raise NotImplementedError("examples are collated one by one")
    batch = form.with_views(form.to_engine(raw), np.arange(examples), 0)
    copied = seeded(copies(batch, examples, rows), np.arange(rows, dtype=np.uint64), 0)
    parameters = as_real_pairs(trainable(planned.module))

    def once(engine: Engine) -> object:
        with globals_put_back(planned.world.device):
            return engine.clipped_sum(loss_function, parameters, copied, rows, loader.plan.clipping_rule)

    return once
