"""What an engine first cannot run in the middle of training: the next engine runs it, and nothing of the attempt stays."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms import RandomErasing

from lightning_dp import DifferentialPrivacy
from lightning_dp.engines import select
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.select import EngineError
from tests.conftest import Notes, Regressor, loader, regressor, trainer, weights

LATE = 2
STEPS = 4


def _numpy(x: Tensor) -> Tensor:
    return x + torch.from_numpy(np.tanh(x.detach().numpy()))


def _shared(x: Tensor) -> Tensor:
    scratch = torch.zeros(1, 4)
    scratch[:, 0] = x[:, 0]
    return x + scratch


def _own_gradient(x: Tensor) -> Tensor:
    given = x.detach().requires_grad_()
    return x + torch.autograd.grad((given**3).sum(), given)[0]


def _one_hot(x: Tensor) -> Tensor:
    return x * nn.functional.one_hot(x.argmax(-1)).sum()


def _python(x: Tensor) -> Tensor:
    return x * random.random() + torch.as_tensor(np.asarray(x.detach()).round())


CONSTRUCTS: dict[str, Callable[[Tensor], Tensor]] = {
    "numpy": _numpy,
    "a shared tensor": _shared,
    "autograd": _own_gradient,
    "one_hot": _one_hot,
    "python's coin": _python,
}


class Late(Regressor):
    """From some step on, its inputs go through something that torch.func cannot run, with a coin of torch before."""

    construct: str

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        self.log("calls", 1.0, reduce_fx="sum")
        if self.global_step >= LATE:
            inputs = CONSTRUCTS[self.construct](inputs * torch.rand(1))
        return super().training_step((inputs, targets), batch_idx)


def trained(construct: str, engine: Any, **options: Any) -> Late:
    module = Late()
    module.load_state_dict(regressor().state_dict())
    module.construct = construct
    privacy = DifferentialPrivacy(noise_multiplier=1.0, engine=engine, seed=3, **options)
    random.seed(5)
    trainer(privacy, max_steps=STEPS).fit(module, loader())
    return module


@pytest.mark.parametrize("construct", list(CONSTRUCTS))
def test_auto_runs_it_with_another_engine_to_the_same_result(construct: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples draw what the engine that is replaced would have drawn."""
    with monkeypatch.context() as patch:
        patch.setitem(select.ENGINES, "loop", lambda module: LoopEngine(in_place_of_others=True))
        expected = trained(construct, "loop")
    with pytest.warns(
        UserWarning, match=r"engine 'ghost' cannot run some micro-batches .*test_fall_back\.py"
    ) as warned:
        found = trained(construct, "auto")
    assert len([one for one in warned if "some micro-batches" in str(one.message)]) == 1
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-4, atol=1e-6)  # float32 in another order
    torch.testing.assert_close(found.trainer.callback_metrics["calls"], expected.trainer.callback_metrics["calls"])


@pytest.mark.filterwarnings("ignore:.*in many ways:UserWarning")
def test_a_transform_that_draws_where_to_cut_for_each_example() -> None:
    class Erasing(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            inputs, targets = batch
            if self.global_step >= LATE:
                erase = RandomErasing(p=0.5, scale=(0.25, 0.5), ratio=(1.0, 1.0))
                inputs = erase(inputs.reshape(1, 2, 2)).reshape(1, 4)
            return super().training_step((inputs, targets), batch_idx)

    module = Erasing()
    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=STEPS).fit(module, loader())
    assert module.global_step == STEPS


@pytest.mark.parametrize("engine", ["ghost", "vmap"])
def test_an_engine_asked_for_by_name_says_what_and_where(engine: Any) -> None:
    module = Late()
    module.construct = "numpy"
    privacy = DifferentialPrivacy(noise_multiplier=1.0, engine=engine)
    with pytest.raises(
        EngineError, match=rf"engine='{engine}' cannot run this training_step any more: .*NumPy.*_numpy"
    ):
        trainer(privacy, max_steps=STEPS).fit(module, loader())
    assert module.global_step == LATE
    assert privacy.ledger is not None
    assert privacy.ledger.steps == LATE


class OwnMistake(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step >= 1:
            raise KeyError("mistake")
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("engine", ["auto", "loop", "ghost", "vmap"])
@pytest.mark.filterwarnings("ignore:engine 'ghost' cannot run some:UserWarning")
def test_the_users_own_error_is_passed_on_with_a_note(engine: Any) -> None:
    with pytest.raises(KeyError, match="mistake") as caught:
        trainer(DifferentialPrivacy(noise_multiplier=1.0, engine=engine)).fit(OwnMistake(), loader())
    assert "a batch of one" in caught.value.__notes__[0]


@pytest.mark.parametrize("engine", ["auto", "ghost", "vmap", "loop"])
@pytest.mark.parametrize("kind", [MemoryError, torch.OutOfMemoryError])
@pytest.mark.parametrize("since", [0, LATE])
def test_want_of_memory_is_no_engines_limit(engine: Any, kind: type[Exception], since: int) -> None:
    """It is passed on as it is, from the engine check and from a step, and no other engine is tried."""

    calls = Notes()

    class Full(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.global_step >= since and (since or torch._C._functorch.maybe_current_level() or engine == "loop"):
                calls.append(1)
                if len(calls) == 1:
                    raise kind("no room")
            return super().training_step(batch, batch_idx)

    privacy = DifferentialPrivacy(noise_multiplier=1.0, engine=engine)
    with pytest.raises(kind, match="no room"):
        trainer(privacy, max_steps=STEPS).fit(Full(), loader())
    assert len(calls) == 1
    assert privacy.ledger is None or privacy.ledger.steps == since
