"""What an example draws in training_step is a function of its own seed, in every engine, in any company and place."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_dp.batches.seeded import seeded
from lightning_dp.engines.decisions import answered_for_all
from lightning_dp.engines.drawing import Drawing
from lightning_dp.engines.ghost.engine import GhostEngine
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import Engine
from lightning_dp.engines.row_draws import RowDraws
from lightning_dp.engines.vmap import VmapEngine

COUNT = 7
SEEDS = np.arange(1, COUNT + 1, dtype=np.uint64) * np.uint64(0xDEADBEEFCAFE1234)
IMAGES = torch.randn(COUNT, 6, generator=torch.Generator().manual_seed(0))


class Random(nn.Module):
    """A hidden layer whose output ``change`` changes at random."""

    def __init__(self, change: Callable[[Random, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.change = nn.Linear(6, 8), change
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, 2, dropout=0.4, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.change(self, self.first(x)))


def three(h: Tensor) -> Tensor:
    return h[:, None].expand(-1, 3, -1)


def attended(h: Tensor) -> Tensor:
    q = h.reshape(len(h), 1, 2, 4)
    return F.scaled_dot_product_attention(q, q, q, dropout_p=0.3).reshape(len(h), 8)


TORCH: dict[str, Callable[[Random, Tensor], Tensor]] = {
    "dropout": lambda net, h: F.dropout(h, 0.5),
    "dropout of channels": lambda net, h: F.dropout2d(h.reshape(-1, 8, 1, 1), 0.5).flatten(1),
    "dropout of a weight": lambda net, h: F.linear(h, F.dropout(net.recurrent.weight_hh_l0[:8], 0.5)),
    "alpha dropout": lambda net, h: F.alpha_dropout(h, 0.5, training=True),
    "attention": lambda net, h: attended(h),
    "multi-head attention": lambda net, h: net.attention(three(h), three(h), three(h))[0][:, 0],
    "recurrent": lambda net, h: net.recurrent(three(h))[0][:, -1],
    "rand": lambda net, h: h * torch.rand(8),
    "rand in bfloat16": lambda net, h: h * torch.rand(8, dtype=torch.bfloat16).float(),
    "randn in float64": lambda net, h: h * torch.randn(8, dtype=torch.float64).float(),
    "randn_like": lambda net, h: h + torch.randn_like(h),
    "randint": lambda net, h: h * torch.randint(-4, 5, (8,)),
    "randint_like": lambda net, h: h * torch.randint_like(h, 7),
    "randperm": lambda net, h: h[:, torch.randperm(8)],
    "bernoulli": lambda net, h: h * (0.5 + torch.bernoulli(h.sigmoid())),
    "uniform_": lambda net, h: h * torch.empty_like(h).uniform_(-1, 2),
    "cauchy_": lambda net, h: h + torch.empty_like(h).cauchy_(),
    "an empty tensor, filled": lambda net, h: h * (1 + torch.empty(len(h), 8).bernoulli_(0.5)),
    "multinomial": lambda net, h: F.pad(h.gather(1, torch.multinomial(h.softmax(-1), 4)), (0, 4)),
    "poisson": lambda net, h: h * torch.poisson(h.exp().detach()),
    "normal": lambda net, h: torch.normal(h, 1.0) * h,
    "a normal distribution": lambda net, h: torch.distributions.Normal(h, 1.0).rsample(),
    "a gamma distribution": lambda net, h: h * torch.distributions.Gamma(h.exp(), 1.0).rsample(),
    "Gumbel softmax": lambda net, h: h * F.gumbel_softmax(h),
    "a coin that decides": lambda net, h: h if torch.rand(()) < 0.5 else h.flip(1),
}
OTHERS: dict[str, Callable[[Random, Tensor], Tensor]] = {
    "NumPy": lambda net, h: h * np.random.rand(),
    "random": lambda net, h: h * random.random(),
    "a generator": lambda net, h: h * torch.rand(8, generator=torch.Generator().manual_seed(len(h))),
}
ALONE = {
    "rrelu": lambda net, h: F.rrelu(h, training=True),
    "checkpoint": lambda net, h: checkpoint(
        lambda t: F.dropout(t.tanh(), 0.5) * F.dropout(t, 0.5), h, use_reentrant=False
    ),
    "reentrant checkpoint": lambda net, h: checkpoint(lambda t: F.dropout(t.tanh(), 0.5) * t, h, use_reentrant=True),
}
"""What vmap cannot run."""

ENGINES: dict[str, Callable[[nn.Module], Engine]] = {
    "loop": lambda net: LoopEngine(),
    "loop in the place of others": lambda net: LoopEngine(in_place_of_others=True),
    "vmap": lambda net: VmapEngine(),
    "ghost": GhostEngine,
}
QUIET = pytest.mark.filterwarnings(
    "ignore:training_step (draws|takes a value)", "ignore:There is a performance drop", "ignore:dropout2d"
)

SAME = ("loop in the place of others", "vmap", "ghost")
"""These draw the same numbers."""


def norms(engine: Engine, net: nn.Module, places: list[int], images: Tensor = IMAGES) -> Tensor:
    def loss_function(parameters: Any, x: Tensor) -> tuple[Tensor, Any]:
        return functional_call(net, dict(parameters), (x,)).square().sum(), {}

    batch = seeded(images[places], SEEDS[places], 77)
    return engine.clipped_sum(loss_function, dict(net.named_parameters()), batch, len(places), 1.0).norms


@pytest.mark.filterwarnings(
    "ignore:training_step (draws|takes a value)", "ignore:There is a performance drop", "ignore:dropout2d"
)
@pytest.mark.parametrize("name", [*TORCH, *OTHERS, *ALONE])
def test_an_example_draws_the_same_alone_and_in_company_and_in_every_engine(name: str) -> None:
    net = Random({**TORCH, **OTHERS, **ALONE}[name])
    found = {}
    for engine, make in ENGINES.items():
        if name in ALONE and engine in ("vmap", "ghost"):
            continue
        together = norms(make(net), net, list(range(COUNT)))
        once_seen = make(net)  # an engine that expects draws from its second micro-batch on
        alone = torch.cat([norms(once_seen, net, [place]) for place in range(COUNT)])
        others = norms(once_seen, net, [6, 2, 4])
        torch.testing.assert_close(alone, together, rtol=1e-3, atol=1e-5, msg=engine)
        torch.testing.assert_close(others, together[[6, 2, 4]], rtol=1e-3, atol=1e-5, msg=engine)
        found[engine] = together
    for engine in SAME[1:]:
        if engine in found:
            torch.testing.assert_close(found[engine], found[SAME[0]], rtol=1e-3, atol=1e-5, msg=engine)


@pytest.mark.parametrize("name", [name for name in (*TORCH, *OTHERS) if name != "a generator"])
@pytest.mark.filterwarnings(
    "ignore:training_step (draws|takes a value)", "ignore:There is a performance drop", "ignore:dropout2d"
)
def test_two_examples_draw_different_numbers(name: str) -> None:
    """The same image under seven seeds has several gradients."""
    net = Random({**TORCH, **OTHERS}[name])
    for make in ENGINES.values():
        found = norms(make(net), net, list(range(COUNT)), IMAGES[:1].expand(COUNT, -1))
        assert len({round(float(norm), 3) for norm in found}) > 1


def drawn(change: Callable[[], Tensor], seeds: int = 4000) -> np.ndarray[Any, Any]:
    """The first number of each of many examples, which draw together."""
    torch.manual_seed(1)
    numbers = torch.arange(seeds)

    def one(number: Tensor) -> Tensor:
        with answered_for_all(number), RowDraws(numbers, 1):
            return change() + 0 * number

    return np.asarray(torch.func.vmap(one, randomness="different")(numbers).double())


LAWS: dict[str, tuple[Callable[[], Tensor], Any]] = {
    "rand": (lambda: torch.rand(3)[0], stats.uniform()),
    "uniform_": (lambda: torch.rand(3).mul(3.0).sub(1.0)[1], stats.uniform(-1, 3)),
    "randn": (lambda: torch.randn(3)[2], stats.norm()),
    "normal": (lambda: torch.normal(2.0, 3.0, (3,))[0], stats.norm(2, 3)),
    "exponential": (lambda: torch.empty(3).exponential_(2.0)[1], stats.expon(scale=0.5)),
    "gamma": (lambda: torch.distributions.Gamma(torch.tensor(2.0), torch.tensor(1.0)).rsample(), stats.gamma(2)),
    "cauchy": (lambda: torch.empty(2).cauchy_()[0], stats.cauchy()),
}


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_what_is_drawn_for_many_has_the_law(name: str) -> None:
    change, law = LAWS[name]
    assert stats.kstest(drawn(change), law.cdf).pvalue > 1e-6


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_coins_permutations_and_choices_have_the_law() -> None:
    dropped = drawn(lambda: F.dropout(torch.ones(5), 0.25)[3])
    assert set(np.unique(dropped).round(4)) == {0.0, 1.3333}
    assert stats.binomtest(int((dropped == 0).sum()), len(dropped), 0.25).pvalue > 1e-6
    for change, chances in (
        (lambda: torch.randperm(5)[0].double(), [0.2] * 5),
        (lambda: torch.randint(0, 5, (2,))[1].double(), [0.2] * 5),
        (lambda: torch.multinomial(torch.tensor([0.1, 0.6, 0.3]), 1)[0].double(), [0.1, 0.6, 0.3]),
    ):
        counts = np.bincount(drawn(change, 1000).astype(int), minlength=len(chances))
        assert stats.chisquare(counts, 1000 * np.asarray(chances)).pvalue > 1e-6


def test_a_step_that_draws_nothing_is_run_once_and_one_that_draws_is_expected_to() -> None:
    """The second pass of the first micro-batch is the only one that is made twice."""
    for change, expected in ((lambda net, h: h, [1, 1]), (TORCH["dropout"], [2, 1])):
        net, calls = Random(change), 0
        original = net.forward

        def counted(x: Tensor, original: Any = original) -> Tensor:
            nonlocal calls
            calls += 1
            return original(x)

        net.forward = counted
        engine, found = VmapEngine(), []
        for _ in range(2):
            calls = 0
            norms(engine, net, [0, 1, 2])
            found.append(calls)
        assert found == expected


@pytest.mark.filterwarnings("ignore:training_step draws")
def test_after_a_seed_of_the_users_all_examples_draw_the_same() -> None:
    """A random projection that is meant to be fixed stays fixed."""
    net = Random(lambda net, h: F.dropout(h, 0.5) * (torch.manual_seed(3) and torch.rand(8)))
    torch.manual_seed(3)
    fixed = torch.rand(8)
    same = Random(lambda net, h: F.dropout(h, 0.5) * fixed)
    for make in ENGINES.values():
        torch.testing.assert_close(
            norms(make(net), net, [0, 1, 2]), norms(make(same), same, [0, 1, 2]), rtol=1e-3, atol=1e-5
        )


def test_the_operating_system_is_asked_for_one_example_at_a_time() -> None:
    """One fresh number for a whole micro-batch would tie its examples to each other."""
    net = Random(lambda net, h: h * float(np.random.default_rng().random()))
    with pytest.warns(UserWarning, match="training_step draws from NumPy's or Python's generators"):
        found = norms(VmapEngine(), net, [0] * COUNT)
    assert len({round(float(norm), 4) for norm in found}) == COUNT


def test_a_batch_without_seeds_draws_from_the_global_generators() -> None:
    assert Drawing().one_pass([1], lambda batch, draws: batch) == [1]
