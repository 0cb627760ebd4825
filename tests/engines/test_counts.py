"""What a micro-batch and a step take, beside the same without privacy, in numbers that are the same on every machine."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dp.mechanism import put_off
from lightning_dp.step import contents

CEILINGS = {
    "wrn": (3.21, 1.03, 1.70, 1),
    "wrn-ws": (2.46, 1.03, 1.62, 21),
    "wrn40-ws": (2.50, 1.03, 1.63, 53),
    "vit": (2.02, 1.15, 1.53, 1),
    "lm": (2.17, 1.21, 1.46, 1),
}
"""Model → calls, FLOPs and bytes ÷ those of a step without privacy, and host waits, of four examples. They only go down."""

ELSEWHERE = {"wrn": 2.5, "vit": 1.7, "lm": 1.8}
"""Calls ÷ those of a step without privacy on a device that is no CPU, where other forms are taken."""

OF_A_STEP = (4.4, 37)
"""Calls of a Trainer's whole step of the language model ÷ those without privacy, and calls whose result the host sees."""

ON_A_DEVICE = 9
"""The same where what can be written to is on a device. One is for whether it was, one a micro-batch is for what was queued
before the next one, one is Lightning's for what is logged; five are of numbers on the host: seeds, states of generators.
"""

OF_PYTHON = {"mlp": 3.4, "lm": 7.8}
"""Calls of Python functions in a Trainer's step of small modules ÷ those of one without privacy. There is a tenth of slack,
since they depend on the versions of Python, torch and Lightning."""


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("counts")


@pytest.mark.parametrize("model", CEILINGS)
def test_a_micro_batch(model: str, counts: Any) -> None:
    found = counts.of_engines(model, 4, ["ghost"])
    base, ours = found["plain"], found["ghost"]
    calls, flops, most, waits = CEILINGS[model]
    assert ours.total <= calls * base.total, ours.calls.most_common(12)
    assert ours.flops <= flops * base.flops
    assert ours.bytes <= most * base.bytes
    assert ours.waits <= waits


@pytest.mark.parametrize("model", ELSEWHERE)
def test_on_a_device_nothing_is_waited_for_and_every_tensor_is_there(model: str, counts: Any) -> None:
    """On the meta device a value that the host asks for is an error, and so is a tensor of another device beside one of it."""
    found = counts.of_engines(model, 4, ["ghost"], "meta")
    assert found["ghost"].total <= ELSEWHERE[model] * found["plain"].total, found["ghost"].calls.most_common(12)
    assert found["ghost"].waits == 0


def test_a_step_of_a_trainer(counts: Any) -> None:
    found = counts.of_trainer("lm", 4)
    base, ours = found["plain"], found["private"]
    calls, waits = OF_A_STEP
    assert ours.total <= calls * base.total, ours.calls.most_common(12)
    assert ours.waits <= waits


def test_a_step_where_copies_are_digests_and_answers_are_put_off(counts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What holds on an accelerator, on a CPU: the step asks once whether anything was written to, and else nothing."""
    monkeypatch.setattr(contents, "_can_be_copied", lambda _: False)
    monkeypatch.setattr(put_off, "ASKED_AT_ONCE", set())
    found = counts.of_trainer("lm", 4)
    assert found["plain"].waits == 1
    assert found["private"].waits <= ON_A_DEVICE, found["private"].calls


@pytest.mark.parametrize("module", OF_PYTHON)
def test_calls_of_python(module: str, counts: Any) -> None:
    found = counts.python_calls(module, 4)
    assert found["private"] <= OF_PYTHON[module] * found["plain"], found


def test_what_is_counted(counts: Any) -> None:
    """A view is no call, an expanded tensor is read once, a multiplication and addition are two FLOPs, a truth value a wait."""
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    with counts.Counting() as counting:
        product = a.view(2, 3) @ b
        product.add_(torch.ones(1).expand(2, 4)).squeeze_(0)
        assert bool((product > 0).any())
    found = counting.counts
    assert dict(found.calls) == {
        "mm.default": 1, "ones.default": 1, "add_.Tensor": 1, "gt.Scalar": 1, "any.default": 1,
        "_local_scalar_dense.default": 1,
    }  # fmt: skip
    assert found.flops == 2 * 2 * 3 * 4
    assert found.bytes == 4 * (6 + 12 + 8) + 4 + 4 * (8 + 1 + 8) + (4 * 8 + 8) + (8 + 1) + 1
    assert found.waits == 1
