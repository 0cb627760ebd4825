"""The private twins have one thing in common, written once, and a new one is a class with a decorator."""

from __future__ import annotations

import inspect
from types import FunctionType
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_dp import DifferentialPrivacy
from lightning_dp import strategy as strategies
from lightning_dp.ranks.lost_ranks import _NAMING
from lightning_dp.strategy import TWINS, PrivateStrategy, make_private, private_twin
from tests.conftest import loader, regressor, trainer, weights

COMMON = {name: one for name, one in vars(PrivateStrategy).items() if isinstance(one, FunctionType)}


@pytest.mark.parametrize("stock", TWINS, ids=lambda stock: stock.__name__)
@pytest.mark.parametrize("name", COMMON)
def test_every_twin_does_what_all_do(stock: type, name: str) -> None:
    twin = TWINS[stock]
    assert twin.__bases__ == (stock,)
    assert twin.private_fit is None
    own = vars(twin)[name]
    assert own.__doc__ == COMMON[name].__doc__ or own.__code__ is not COMMON[name].__code__
    for where, cell in zip(own.__code__.co_freevars, own.__closure__ or (), strict=True):
        assert where != "__class__" or cell.cell_contents is twin


def test_all_of_it_is_there() -> None:
    assert COMMON.keys() >= {"setup", "training_step", "backward", "optimizer_step", "teardown", "reduce", "barrier"}


@pytest.mark.parametrize("twin", TWINS.values(), ids=lambda twin: twin.__name__)
def test_collective_calls_of_every_twin_name_lost_ranks(twin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = []
    for name in ("barrier", "broadcast", "reduce"):
        monkeypatch.setattr(twin.__bases__[0], name, lambda *_, **__: inside.append(_NAMING.get()))
    monkeypatch.setattr(twin, "root_device", torch.device("cpu"))
    one = object.__new__(twin)
    one.barrier(), one.broadcast(3), one.reduce(3)
    assert inside == [True, True, True]


def test_a_new_twin_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "TWINS", dict(TWINS))

    class Stock(SingleDeviceStrategy):
        pass

    @private_twin(Stock)
    class Twin(Stock):
        """Says when it steps."""

        strategy_name = "new"
        seen = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            Twin.seen += 1
            return strategies.fit_of(self).step.training_step(*args, **kwargs)

    assert list(inspect.signature(Twin.load_checkpoint).parameters) == ["self", "checkpoint_path", "weights_only"]
    modules = regressor(), regressor()
    for module, strategy in zip(modules, (Stock(), "auto"), strict=True):
        torch.manual_seed(0)
        made = trainer(DifferentialPrivacy(noise_multiplier=1.0, seed=1), strategy=strategy, max_steps=3)
        made.fit(module, loader())
        assert type(made.strategy) is (Twin if strategy != "auto" else TWINS[SingleDeviceStrategy])
        assert make_private(made.strategy) is made.strategy
    assert Twin.seen == 3
    assert torch.equal(*map(weights, modules))
