"""A training step may decide in Python on an example's values: every example goes the way it would go alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import ClippedSum, LossFunction
from lightning_dp.engines.vmap import VmapEngine
from tests.nearly import assert_nearly

EXAMPLES = 12


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen = nn.Parameter(torch.tensor(0.5), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(0.5))


Step = Callable[[Net, Tensor], Tensor]


def two_ways(net: Net, x: Tensor) -> Tensor:
    return net.up(x) if x.sum() > 0 else net.down(x).tanh()


def several_decisions(net: Net, x: Tensor) -> Tensor:
    if (x[:, 0] > 0).all():
        x = net.up(x)
    if not x.any() or x.max() < x.abs().max():
        x = net.down(x) * 2
    return x


def after_a_gradient(net: Net, x: Tensor) -> Tensor:
    hidden = net.up(x)
    return net.down(hidden) if hidden[0, 0] > 0 else hidden.square()


def on_a_parameter(net: Net, x: Tensor) -> Tensor:
    return net.up(x) * net.scale if net.scale > 0 else net.down(x)


def a_number_of_rounds(net: Net, x: Tensor) -> Tensor:
    for _ in range(int((x > 0).sum())):
        x = torch.tanh(net.up(x))
    return net.down(x)


def as_lists(net: Net, x: Tensor) -> Tensor:
    return net.up(x) * (1 + sum((x > 0).long().tolist()[0]))


def with_item(net: Net, x: Tensor) -> Tensor:
    return net.up(x) * (x > 0.5).sum().item()


def equal(net: Net, x: Tensor) -> Tensor:
    return net.up(x) if torch.equal(x, x.abs()) or torch.allclose(x[:, :1], -x[:, 1:2].abs(), atol=1.0) else net.down(x)


def contained(net: Net, x: Tensor) -> Tensor:
    return net.up(x) if 1 in (x > 1).long() else net.down(x)


def masked(net: Net, x: Tensor) -> Tensor:
    return net.up(x)[x > 0.8]


def masked_otherwise(net: Net, x: Tensor) -> Tensor:
    kept = (x > 0.8).nonzero(as_tuple=True)
    return torch.cat([net.up(x)[kept], torch.masked_select(net.down(x), x > 0.8), x[torch.where(x > 1.0)]])


def swallowed(net: Net, x: Tensor) -> Tensor:
    """Catches everything, which must not make an example go another way when it is in company."""
    try:
        positive = bool(x.sum() > 0)
    except BaseException:
        return net.up(x) * 100
    return net.up(x) if positive else net.down(x)


def changed_in_place(net: Net, x: Tensor) -> Tensor:
    x.mul_(2)
    return net.up(x) if x.sum() > 0 else net.down(x)


def under_transforms_of_its_own(net: Net, x: Tensor) -> Tensor:
    penalty = grad(lambda t: t.square().sum() if bool(x.sum() > 0) else t.sum())(x)
    return net.scale * penalty + vmap(lambda row: row * 2 if x.sum() > 0 else row)(x)


STEPS: list[Step] = [
    two_ways, several_decisions, after_a_gradient, on_a_parameter, a_number_of_rounds, as_lists, with_item, equal,
    contained, masked, masked_otherwise, swallowed, changed_in_place, under_transforms_of_its_own,
]  # fmt: skip


def setting(step: Step) -> tuple[Net, LossFunction, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, batch = Net().double(), torch.randn(EXAMPLES, 4, dtype=torch.float64)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return step(self.net, x)

    whole = Whole()

    def loss(parameters: Any, batch: Tensor) -> tuple[Tensor, Any]:
        given = {f"net.{name}": parameter for name, parameter in parameters.items()}
        return functional_call(whole, given, (batch,)).square().sum(), {"first": batch[:, 0]}

    return net, loss, batch


def run(engine: Any, step: Step) -> ClippedSum:
    net, loss, batch = setting(step)
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    engine = engine(net)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "training_step", UserWarning)
        result: ClippedSum = engine.clipped_sum(loss, parameters, batch, EXAMPLES, 0.5)
    return result


ENGINES = {"vmap": lambda _: VmapEngine(), "ghost": GhostEngine}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_example_goes_the_way_it_goes_alone(step: Step, engine: str) -> None:
    ours, alone = run(ENGINES[engine], step), run(lambda _: LoopEngine(), step)
    assert_nearly(ours, alone)
    assert len(set(alone.norms.tolist())) > EXAMPLES // 2  # the examples differ, so their order is tested as well


@pytest.mark.parametrize("step", [two_ways, masked, a_number_of_rounds], ids=lambda step: step.__name__)
@pytest.mark.parametrize("engine", ENGINES)
def test_padding_goes_no_way_of_its_own_and_adds_nothing(step: Step, engine: str) -> None:
    net, loss, batch = setting(step)
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    counted = EXAMPLES - 3
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "training_step", UserWarning)
        ours = ENGINES[engine](net).clipped_sum(loss, parameters, batch, EXAMPLES, 0.5, counted=counted)
    alone = LoopEngine().clipped_sum(loss, parameters, batch[:counted], counted, 0.5)
    assert_nearly(ours, alone)


@pytest.mark.parametrize("engine", ENGINES)
def test_examples_that_agree_run_together(engine: str) -> None:
    """Two ways are two groups: the whole batch until it parts, and then each group once."""
    sizes = []

    def counted(net: Net, x: Tensor) -> Tensor:
        sizes.append(1)
        return two_ways(net, x)

    run(ENGINES[engine], counted)
    assert len(sizes) == 3


@pytest.mark.parametrize("engine", ENGINES)
def test_examples_none_of_which_agree_run_one_by_one_and_that_is_said_once(engine: str) -> None:
    def reading(net: Net, x: Tensor) -> Tensor:
        return net.up(x) * float(x.sum())

    net, loss, batch = setting(reading)
    parameters = dict(net.named_parameters())
    of = ENGINES[engine](net)
    with pytest.warns(UserWarning, match=r"test_decisions.py:\d+ in reading.*one by one.*same result"):
        of.clipped_sum(loss, parameters, batch, EXAMPLES, 0.5)
    of.clipped_sum(loss, parameters, batch, EXAMPLES, 0.5)


def test_the_users_own_vmap_refuses_as_it_does_alone() -> None:
    def inside(net: Net, x: Tensor) -> Tensor:
        return vmap(lambda row: row * 2 if row.sum() > 0 else row)(net.up(x))

    for engine in (*ENGINES.values(), lambda _: LoopEngine()):
        with pytest.raises(RuntimeError, match="data-dependent control flow"):
            run(engine, inside)
