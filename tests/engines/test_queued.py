"""A step on a device makes every tensor there, and asks the device nothing before the next micro-batch is queued.

On the meta device, see :mod:`tests.engines.queued`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_dp.batches.mixing import MixSelf
from lightning_dp.batches.seeded import seeded
from lightning_dp.batches.transforms import Compose, Crop, Flip
from lightning_dp.batches.views import Views
from lightning_dp.engines import accumulate as accumulation
from lightning_dp.engines.protocol import Engine
from lightning_dp.engines.select import EngineName, make_engine
from lightning_dp.loading.form import ExampleForm
from lightning_dp.mechanism import gaussian
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.release import release
from lightning_dp.plan.mechanism import Mechanism
from lightning_dp.step.tally import Tally
from tests.conftest import loader, regressor, trainer
from tests.engines.queued import DEVICE, WaitError, WrongDeviceError, queued

SIZES = 3, 2
"""Examples of the micro-batches of a step."""
DRAWS = "-dropout"
"""Suffix of a model that draws random numbers."""
VIEWED = "wrn", "wrn-ws"
"""Models of images that are trained on two views of each."""


class _No:
    """No, to all that was put off; on a device it is waited for behind what was queued before it."""

    asked = 0

    def __init__(self, flags: Sequence[Tensor]) -> None:
        assert {flag.device.type for flag in flags} == {DEVICE.type}

    def __bool__(self) -> bool:
        _No.asked += 1
        return False


def _drawn_there(like: Tensor, *_: Any) -> Tensor:
    """Noise as it is drawn on CUDA."""
    return torch.randn(like.shape, dtype=like.dtype, device=like.device)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("engine_models")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulation, "Answer", _No)
    monkeypatch.setattr(gaussian, "standard_normal", _drawn_there)
    monkeypatch.setattr(_No, "asked", 0)


@pytest.fixture(scope="module")
def module() -> L.LightningModule:
    attached = regressor()
    trainer(max_steps=1).fit(attached, loader())  # so that it has a Trainer, whose transfer of batches is used
    return attached


def sum_and_release(
    model: nn.Module, engine: Engine, form: ExampleForm, batches: Sequence[list[Tensor]], loss_of: Any
) -> Tensor:
    """A step from batches on the host to new weights: how many gradients were not finite. The last batch is padded."""
    parameters, key = dict(model.named_parameters()), RandomKey.from_seed(0)

    def loss(given: Any, example: Any) -> tuple[Tensor, Any]:
        inputs, targets = form.to_user(example)
        return loss_of(lambda x: functional_call(model, dict(given), (x,)), inputs[:, None], targets), []

    def micro_batches() -> Iterator[tuple[Any, int]]:
        for batch in batches:
            examples = np.arange(len(batch[0]))
            for alike in form.groups(batch, len(examples), 1, list, int):  # no hook draws
                rows = form.in_units(form.with_views(alike.batch, examples, 0), len(examples), 1)
                yield seeded(rows, key.seeds(Stream.DROPOUT, 0, examples), 0), len(examples)

    mechanism = Mechanism.of(noise_multiplier=1.0, clip_norm=1.0, dataset_size=40, expected_batch_size=4)
    total = accumulation.accumulate(engine, loss, parameters, micro_batches(), mechanism.clipping, pad_to=max(SIZES))
    tally = Tally()
    tally.broken = tally.broken + total.broken
    gradient = release(total.gradient, mechanism, key, 0).gradient
    for name, parameter in parameters.items():
        parameter.grad = gradient[name]
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).step()
    assert isinstance(tally.broken, Tensor)
    return tally.broken


@pytest.mark.parametrize("engine", ["ghost", "vmap"])
@pytest.mark.parametrize("name", ["wrn", "wrn-ws", "vit", "lm", "lm" + DRAWS])
@pytest.mark.usefixtures("asked")
def test_a_step_makes_every_tensor_there_and_waits_for_nothing(
    name: str, engine: EngineName, module: L.LightningModule, benchmarks: Any
) -> None:
    task = benchmarks.TASKS[name.removesuffix(DRAWS)]
    model = nn.Sequential(task.model(), nn.Dropout(0.1 if name.endswith(DRAWS) else 0.0))
    views = Views(2, Compose([Crop(), Flip()]), mix=(MixSelf(1),)) if name in VIEWED else None
    batches = [[part.squeeze(1).clone() for part in task.batch(size, 1)] for size in SIZES]
    made: Any = make_engine(engine, model)
    if (
        engine == "ghost" and name == "wrn-ws"
    ):  # standardised weights are recognised once, for which the host has to know
        sum_and_release(model, made, ExampleForm(module, torch.device("cpu"), views=views), batches, benchmarks.loss_of)
        known = made._recognised._known
        known.update({of: replace(one, lengths=one.lengths.to(DEVICE)) for of, one in known.items()})
        assert known
    model.to(DEVICE).zero_grad()
    with queued():
        broken = sum_and_release(model, made, ExampleForm(module, DEVICE, views=views), batches, benchmarks.loss_of)
    assert _No.asked <= len(SIZES)  # once behind each micro-batch, when the next is queued
    assert {one.device.type for one in [*model.parameters(), broken]} == {DEVICE.type}


HOST, THERE = torch.zeros(2), torch.zeros(2, device=DEVICE)
WAITS: dict[str, Callable[[], Any]] = {
    "item": lambda: THERE.sum().item(),
    "bool": lambda: bool(THERE.any()),
    "tolist": lambda: THERE.tolist(),
    "cpu": THERE.cpu,
    "transfer": lambda: HOST.to(DEVICE),
    "written": lambda: THERE.clone().copy_(HOST),
    "made of numbers": lambda: torch.tensor([1.0, 2.0], device=DEVICE),
    "mask": lambda: THERE[THERE > 0],
}
QUEUED: dict[str, Callable[[], Any]] = {
    "transfer": lambda: HOST.to(DEVICE, non_blocking=True),
    "written": lambda: THERE.clone().copy_(HOST, non_blocking=True),
    "on the host": lambda: (HOST + 1).sum().item(),
    "a number": lambda: THERE * torch.tensor(2.0),
}


@pytest.mark.parametrize("call", WAITS)
def test_a_wait_is_an_error(call: str) -> None:
    with queued(), pytest.raises(WaitError):
        WAITS[call]()


@pytest.mark.parametrize("call", [lambda: THERE + torch.zeros(2), lambda: torch.cat([THERE, HOST])])
def test_a_tensor_on_the_wrong_device_is_an_error(call: Callable[[], Any]) -> None:
    with queued(), pytest.raises(WrongDeviceError):
        call()


@pytest.mark.parametrize("call", QUEUED)
def test_what_does_not_wait_is_none(call: str) -> None:
    with queued():
        QUEUED[call]()
