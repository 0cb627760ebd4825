"""What ``benchmarks/gpu.py`` measures, in pieces of some minutes: functions of what each is about, which give plain values."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import engines
import lightning as L
import torch
from compiled import passes
from engine_models import TASKS, loss_of
from gpu_models import parameters_of
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset
from trainer_step import _Module

import lightning_dp.run
from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy
from lightning_dp.batches.transforms import Flip
from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.select import ENGINES

ROOT = Path(__file__).resolve().parents[1]
CLOSE = {"highest": 1e-4, "high": 2e-2, "bf16": 5e-2}
"""Precision → the largest difference from the loop in the same precision, as a part of the norm, that is no error."""

Found = dict[str, Any]


@dataclass(frozen=True)
class Slice:
    """A piece of work.

    Attributes:
        name: what it is called in the results; ``kind:of what``.
        minutes: what it takes on a large GPU, at most: it is not begun with less left, and ended after twice as long.
        work: device, seconds left → what was found; ``{"state": "again"}`` in it asks for another turn.
    """

    name: str
    minutes: float
    work: Callable[[torch.device, float, Path], Found] = field(compare=False)


@contextmanager
def precision(name: str, device: torch.device) -> Iterator[None]:
    """``"highest"`` and ``"high"`` are PyTorch's for products of float32; ``"bf16"`` is autocast."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest" if name == "highest" else "high")
    torch.backends.cudnn.allow_tf32 = name != "highest"
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=name == "bf16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def correct(model: str, size: int) -> Callable[[torch.device, float, Path], Found]:
    """Every engine's clipped sum beside the loop's, in each precision; twice, since an engine keeps what it learnt."""

    def work(device: torch.device, seconds: float, folder: Path) -> Found:
        torch.manual_seed(0)
        net = TASKS[model].model().to(device)
        inputs, targets = (t.to(device) for t in TASKS[model].batch(size, 2 if model.startswith(("wrn", "toy")) else 1))
        rows = []
        for how in CLOSE:
            sums = {}
            for engine in ("loop", *(one for one in ENGINES if one != "loop")):
                with precision(how, device):
                    try:
                        step = engines.ours(engine, net, inputs, targets)
                        step()
                        sums[engine] = {name: g.clone() for name, g in step().items()}
                    except Exception as error:
                        rows.append(
                            {"engine": engine, "precision": how, "error": f"{type(error).__name__}: {error}"[:300]}
                        )
            norm = float(torch.cat([g.flatten() for g in sums["loop"].values()]).norm())
            for engine in (one for one in sums if one != "loop"):
                error = max(float((sums[engine][n] - g).abs().max()) for n, g in sums["loop"].items()) / norm
                rows.append({"engine": engine, "precision": how, "error": error, "holds": error <= CLOSE[how]})
        return {"model": model, "examples": size, "rows": rows}

    return work


def forms(model: str, size: int, rounds: int = 5) -> Callable[[torch.device, float, Path], Found]:
    """Each form in which layers' shares can be computed, where it is offered: its clipped sum beside the loop's, and time.

    In full precision, since norms of the form that is a kernel of this package's are in full in any.
    """

    def work(device: torch.device, seconds: float, folder: Path) -> Found:
        torch.manual_seed(0)
        net = TASKS[model].model().to(device)
        inputs, targets = (t.to(device) for t in TASKS[model].batch(size, 1))
        parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
        engine = GhostEngine(net)

        def loss_function(given: Any, batch: Any) -> tuple[torch.Tensor, Any]:
            return loss_of(lambda x: functional_call(net, dict(given), (x,)), *batch), []

        def summed(of: Any = engine) -> Found:
            found: Found = of.clipped_sum(
                loss_function, parameters, (inputs, targets), size, engines.CLIP_NORM
            ).gradient
            return found

        with precision("highest", device):
            expected = summed(LoopEngine())
            norm = float(torch.cat([g.flatten() for g in expected.values()]).norm())
            with engine.forms.listening() as seen:
                summed()
            names = dict.fromkeys(form for offer in seen.values() for form in offer.offered)
            rows: list[Found] = []
            times: dict[str, list[float]] = {name: [] for name in ("estimated", *names)}
            for turn in range(rounds + 1):
                for name, own in times.items():
                    engine.forms.taken = {key: name for key, offer in seen.items() if name in offer.offered}
                    found: Found = {}
                    own.append(engines.seconds(lambda found=found: found.update(summed()), device))
                    if not turn:
                        error = max(float((found[n] - g).abs().max()) for n, g in expected.items()) / norm
                        layers = len(engine.forms.taken)
                        rows.append(
                            {"form": name, "layers": layers, "error": error, "holds": error <= CLOSE["highest"]}
                        )
        for row in rows:
            pairs = zip(times[row["form"]][1:], times["estimated"][1:], strict=True)
            row["ratio"] = statistics.median(own / base for own, base in pairs)
        return {"model": model, "examples": size, "rows": rows}

    return work


STYLES: dict[str, Found] = {
    "flat": {},
    "vmap": {"engine": "vmap", "clipping": "per_layer"},
    "adapted": {"clipping": "quantile"},
    "per layer": {"clipping": "per_layer"},
    "cut draws": {"max_batch_size": 20},
    "small pieces": {"physical_batch_size": 1},
    "static shapes": {"static_shapes": True},
    "loop": {"engine": "loop"},
}
"""Ways to train that differ in what they do on a device, by name."""


def same_weights(model: str, size: int, styles: int = len(STYLES)) -> Callable[[torch.device, float, Path], Found]:
    """The same run from the same seed on the CPU and on the device: draws, views and noise are functions of the seed alone."""

    def work(device: torch.device, seconds: float, folder: Path) -> Found:
        torch.manual_seed(0)
        data = TensorDataset(*(t[:, 0] for t in TASKS[model].batch(8 * size, 1)))
        rows = []
        for style, options in list(STYLES.items())[:styles]:
            ends = {}
            for where in ("cpu", device.type):
                torch.manual_seed(1)
                module = _OneView(TASKS[model].model())
                private = DifferentialPrivacy(
                    **{"noise_multiplier": 0.5, "seed": 3, "physical_batch_size": 4, **options}
                )
                views = AugmentationMultiplicity(k=2, transform=Flip()) if style == "flat" else None
                trainer = quiet_trainer(where, [private, *([views] if views else [])], 3)
                with precision("highest", device):
                    trainer.fit(module, DataLoader(data, batch_size=4 * size))
                ends[where] = torch.cat([p.detach().cpu().flatten() for p in module.parameters()])
            error = float((ends[device.type] - ends["cpu"]).abs().max())
            rows.append({"style": style, "error": error, "holds": error <= 1e-3})
        return {"model": model, "rows": rows}

    return work


class _OneView(_Module):
    """A batch without an axis of views."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """The benchmark's loss, of a batch or of a batch's views."""
        inputs, targets = batch
        return loss_of(self.net, inputs.unsqueeze(1), targets.unsqueeze(1))


def quiet_trainer(accelerator: str, callbacks: list[Any], steps: int) -> L.Trainer:
    """One device, no files, no bar."""
    return L.Trainer(
        accelerator=accelerator, devices=1, max_steps=steps, max_epochs=-1, callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def ratio(
    case: str, how: str, peers: tuple[str, ...] = (), rounds: int = 5
) -> Callable[[torch.device, float, Path], Found]:
    """Rows of ``engines.py`` for a case: time and memory beside a step without privacy, and the largest difference."""

    def work(device: torch.device, seconds: float, folder: Path) -> Found:
        name, size, *views = case.split(":")
        with precision("high" if how == "bf16" else how, device):
            rows = engines.measure(
                name, int(size), int(*views or [1]), ["ghost", "vmap", *peers], rounds, device, how == "bf16"
            )
        return {
            "case": case,
            "precision": how,
            "parameters": parameters_of(name),
            "rows": [asdict(row) for row in rows],
        }

    return work


def micro_batch(model: str, views: int, batch: int) -> Callable[[torch.device, float, Path], Found]:
    """What the default micro-batch is, how much of the memory it is given, and how long finding it takes."""

    class SettledError(Exception):
        """Nothing after it is of interest."""

    def work(device: torch.device, seconds: float, folder: Path) -> Found:
        found: Found = {"model": model, "views": views, "batch": batch}
        original = lightning_dp.run.settle_physical_batch_size

        def timed(planned: Any, *rest: Any) -> Any:
            before = planned.loader.physical_batch_size
            start = time.perf_counter()
            original(planned, *rest)
            found.update(
                seconds=time.perf_counter() - start, rule_of_thumb=before, size=planned.loader.physical_batch_size
            )
            raise SettledError

        images = TASKS[model].batch(64, 1)
        data = TensorDataset(*(t[:, 0].repeat(batch // 16, *[1] * (t.ndim - 2)) for t in images))
        lightning_dp.run.settle_physical_batch_size = timed
        try:
            callbacks = [
                DifferentialPrivacy(noise_multiplier=1.0),
                AugmentationMultiplicity(k=views, transform=Flip()),
            ]
            trainer = quiet_trainer(device.type, callbacks, 1)
            trainer.fit(_OneView(TASKS[model].model()), DataLoader(data, batch_size=batch))
        except SettledError:
            pass
        finally:
            lightning_dp.run.settle_physical_batch_size = original
        return found

    return work


def profile(case: str) -> Callable[[torch.device, float, Path], Found]:
    """Where a micro-batch's time goes: the ten kernels that take most, how many there are, and what the host waits for."""

    def work(device: torch.device, seconds: float, folder: Path) -> Found:
        name, size = case.split(":")
        torch.manual_seed(0)
        net = TASKS[name].model().to(device)
        step = engines.ours("ghost", net, *(t.to(device) for t in TASKS[name].batch(int(size), 1)))
        for _ in range(3):
            step()
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds) as run:
            step()
        events = run.key_averages()
        on = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        most = sorted(events, key=lambda one: -getattr(one, on))
        total = sum(getattr(one, on) for one in events) or 1
        return {
            "case": case,
            "waits": sum(one.count for one in events if "Synchronize" in one.key),
            "launches": sum(one.count for one in events if "LaunchKernel" in one.key),
            "rows": [{"name": one.key[:80], "calls": one.count, "part": getattr(one, on) / total} for one in most[:10]],
        }

    return work


def compiled(examples: int, rounds: int = 7) -> Callable[[torch.device, float, Path], Found]:
    """What ``torch.compile`` makes of the pass of ``vmap``, beside the engines (``compiled.py``)."""

    def work(device: torch.device, seconds: float, folder: Path) -> Found:
        steps, took = passes(examples, device)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds + 1):
            for name, step in steps.items():
                times[name].append(engines.seconds(step, device))
        return {
            "examples": examples,
            "seconds to compile": took,
            "rows": [
                {
                    "pass": name,
                    "ratio": statistics.median(a / b for a, b in zip(own[1:], times["plain"][1:], strict=True)),
                }
                for name, own in times.items()
            ],
        }

    return work


def hush() -> None:
    """No word of Lightning's, and no warnings: what a slice has to say it returns."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
