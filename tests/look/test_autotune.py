"""What is timed before the first step changes how fast a run is, and nothing that it does beyond rounding."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy, run
from lightning_dp.engines.forms import Key, Offer
from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.ghost.contribution import Written
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.vmap import VmapEngine
from lightning_dp.look import autotune
from lightning_dp.look.autotune import FASTER, PATIENCE, fastest_forms
from lightning_dp.settings import Settings
from tests.conftest import trainer, weights
from tests.engines.against_loop import build, same

CPU = torch.device("cpu")


class _Sequences(nn.Module):
    """A layer over positions, a kernel of one, small and large kernels, groups, standardised weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 1, stride=2)
        self.grouped, self.large = nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 48, 2)
        self.over, self.wide = nn.Linear(48, 9), nn.Linear(9, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.large(torch.tanh(self.grouped(torch.tanh(self.one(torch.tanh(self.first(x)))))))
        return self.wide(torch.tanh(self.over(x.flatten(2).transpose(1, 2))))


def offered() -> tuple[GhostEngine, dict[Key, Offer], Callable[[Any], Any]]:
    module, x = build(_Sequences, 0, 4, 2, 9, 10)

    def loss(parameters: Any, batch: Tensor) -> tuple[Tensor, Any]:
        output = functional_call(module, dict(parameters), (batch,))
        return torch.sin(output).pow(2).mean(), {"output": output}

    def summed(engine: Any) -> Any:
        return engine.clipped_sum(loss, dict(module.named_parameters()), x, len(x), 0.1)

    engine = GhostEngine(module)
    with engine.forms.listening() as seen:
        summed(engine)
    return engine, seen, summed


def test_every_form_of_every_layer_gives_what_the_loop_gives() -> None:
    engine, seen, summed = offered()
    assert len(seen) == 6
    expected, tried = summed(LoopEngine()), set()
    for key, offer in seen.items():
        assert offer.estimated in offer.offered
        for form in offer.offered:
            engine.forms.taken = {key: form}
            same(summed(engine), expected)
            tried.add(form)
    assert tried == {"factors", "written", "slices", "groups", "patches"}
    assert pickle.loads(pickle.dumps(dict.fromkeys(seen, "written"))) == dict.fromkeys(seen, "written")


def test_a_form_holds_for_any_number_of_examples_and_for_its_layer_alone() -> None:
    engine, seen, _ = offered()
    key, other = list(seen)[:2]
    engine.forms.taken = {key: "patches"}
    for examples in (1, 3):
        x, g = (torch.ones(examples, *one.shape[1:], dtype=one.dtype) for one in seen[key].like)
        given = engine.forms.choose(key[0], x, g, "slices", {"slices": _name("slices"), "patches": _name("patches")}, 0)
        assert given == "patches"
    x, g = seen[other].like
    assert engine.forms.choose(other[0], x, g, "slices", {"slices": _name("slices")}, 0) == "slices"


def _name(form: str) -> Any:
    return lambda *_: form


class _Clock:
    """Seconds that pass only where a form is computed."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.now, self.computed = seconds, 0.0, list[str]()

    def __call__(self) -> float:
        return self.now

    def offer(self, forms: Any, key: Key, estimated: str) -> Offer:
        def compute(x: Tensor, g: Tensor) -> Written:
            form = forms.taken[key]
            self.computed.append(form)
            self.now += self.seconds[form]
            return Written(x)

        return Offer(compute, (torch.ones(1, 2), torch.ones(1, 2)), estimated, tuple(self.seconds))


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        ({"slices": 1.0, "groups": 2.0}, None),
        ({"slices": 1.0, "groups": (1 - FASTER / 2)}, None),  # not worth another rounding
        ({"slices": 1.0, "groups": (1 - 2 * FASTER), "patches": 0.9}, "groups"),
        ({"slices": 1.0}, None),
    ],
)
def test_the_fastest_form_is_taken_if_it_is_faster_than_the_estimate(
    seconds: dict[str, float], found: str | None
) -> None:
    engine, clock, key = GhostEngine(nn.Linear(1, 1)), _Clock(seconds), ("a layer",)
    before = engine.forms.taken
    taken = fastest_forms(engine.forms, {key: clock.offer(engine.forms, key, "slices")}, 3, CPU, clock)
    assert taken == ({} if found is None else {key: found})
    assert engine.forms.taken is before
    assert len(clock.computed) == (0 if len(seconds) < 2 else autotune.ROUNDS * len(seconds))


def test_what_is_much_slower_is_timed_once_and_all_of_it_ends_after_a_while() -> None:
    engine, clock = GhostEngine(nn.Linear(1, 1)), _Clock({"slices": PATIENCE / 4, "groups": PATIENCE})
    offers = {(place,): clock.offer(engine.forms, (place,), "slices") for place in range(3)}
    assert fastest_forms(engine.forms, offers, 2, CPU, clock) == {}
    assert clock.computed == ["slices", "groups", "slices", "slices"]


def test_a_form_that_does_not_run_or_gives_other_norms_is_left_out_where_kernels_are_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However fast it is: norms that are too small would let an example count for more than C."""
    monkeypatch.setattr(autotune, "COMPILING", {"cpu"})
    engine, clock, key = GhostEngine(nn.Linear(1, 1)), _Clock({}), ("a layer",)
    seconds = {"slices": 1.0, "short": 0.1, "raises": 0.1, "groups": 0.5}

    def compute(x: Tensor, g: Tensor) -> Written:
        form = engine.forms.taken[key]
        if form == "raises":
            raise RuntimeError("no compiler")
        clock.now += seconds[form]
        return Written(x * (0.9 if form == "short" else 1.0))

    offer = Offer(compute, (torch.ones(1, 2), torch.ones(1, 2)), "slices", tuple(seconds))
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert fastest_forms(engine.forms, {key: offer}, 3, CPU, clock) == {key: "groups"}
    assert torch.equal(torch.get_rng_state(), state)


def test_what_takes_long_to_compile_does_not_count_as_time_and_ends_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(autotune, "COMPILING", {"cpu"})
    engine, clock = GhostEngine(nn.Linear(1, 1)), _Clock({})
    compiled: set[Key] = set()

    def offer(key: Key) -> Offer:
        def compute(x: Tensor, g: Tensor) -> Written:
            form = engine.forms.taken[key]
            clock.now += 0.6 * autotune.PREPARING if form == "fused" and key not in compiled else 0.01
            clock.now += 0.04 * (form == "groups")
            compiled.update([key] if form == "fused" else [])
            return Written(x)

        return Offer(compute, (torch.ones(1, 2), torch.ones(1, 2)), "groups", ("groups", "fused"))

    keys: list[Key] = [(place,) for place in range(4)]
    found = fastest_forms(engine.forms, {key: offer(key) for key in keys}, 2, CPU, clock)
    assert found == dict.fromkeys(keys[:2], "fused")


def test_a_rank_without_the_form_that_rank_zero_measured_takes_the_estimate() -> None:
    engine, seen, _ = offered()
    key = next(iter(seen))
    engine.forms.taken = {key: "fused"}
    x, g = seen[key].like
    assert engine.forms.choose(key[0], x, g, "slices", {"slices": _name("slices")}, 0) == "slices"


class _Images(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Dropout(0.2), nn.Flatten(2), nn.Linear(9, 2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trained(module: L.LightningModule, *shape: int, **options: Any) -> tuple[DifferentialPrivacy, Tensor]:
    """Two steps from the same weights on the same data."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    privacy, data = DifferentialPrivacy(noise_multiplier=1.0, **options), TensorDataset(torch.randn(24, *shape))
    trainer(privacy, max_steps=2).fit(module, DataLoader(data, batch_size=8))
    return privacy, weights(module)


def final(seed: int | None, autotuned: bool | None) -> tuple[DifferentialPrivacy, Tensor]:
    return trained(_Images(), 1, 5, 5, seed=seed, autotune=autotuned)


def test_by_default_a_run_with_a_seed_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, given, measured in ((1, None, False), (None, None, True), (1, True, True), (None, False, False)):
        asked = DifferentialPrivacy(noise_multiplier=1.0, seed=seed, autotune=given)
        assert Settings.of(asked).measures == measured
    called: list[int] = []
    monkeypatch.setattr(autotune, "fastest_forms", lambda *_: called.append(1) or {})
    final(1, None)
    assert not called
    final(1, True)
    assert called


class _Recurrent(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.drop, self.head = nn.GRU(3, 4, batch_first=True), nn.Dropout(0.5), nn.Linear(4, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.head(self.drop(self.cells(batch[0])[0][:, -1])).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def recurrent_run(monkeypatch: pytest.MonkeyPatch, fastest: str, **options: Any) -> tuple[str, Tensor]:
    """Two steps in which the clock says that one engine is faster than the others."""
    now = [0.0]
    monkeypatch.setattr(autotune, "clock_of", lambda _: lambda: now[0])
    for kind in (GhostEngine, VmapEngine, LoopEngine):
        usual = kind.clipped_sum

        def slow(self: Any, *given: Any, usual: Any = usual, **named: Any) -> Any:
            now[0] += 0.0001 if self.name == fastest else 0.1
            return usual(self, *given, **named)

        monkeypatch.setattr(kind, "clipped_sum", slow)
    taken: list[str] = []

    def noted(*given: Any) -> Any:
        found = autotune.autotuned(*given)
        taken.append(found.engine.name)
        return found

    monkeypatch.setattr(run, "autotuned", noted)
    found = trained(_Recurrent(), 5, 3, seed=1, **options)[1]
    return taken[0], found


def test_auto_takes_the_fastest_engine_for_a_recurrent_module_and_its_draws_stay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        name, usual = recurrent_run(patch, "loop", autotune=False)
    assert name == "ghost"
    with monkeypatch.context() as patch:
        name, found = recurrent_run(patch, "loop", autotune=True)
    assert name == "loop"
    torch.testing.assert_close(found, usual)


def test_an_engine_asked_for_by_name_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recurrent_run(monkeypatch, "loop", autotune=True, engine="vmap")[0] == "vmap"


def test_all_ranks_take_what_rank_zero_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 times nothing, and takes what it is sent; one that is to measure nothing takes part all the same."""
    found: list[Any] = []
    told: dict[Key, str] = {("a layer",): "patches"}

    class _Sends:
        def broadcast(self, value: Any) -> Any:
            assert value == ({}, "ghost")
            return told, "ghost"

    def as_rank_one(planned: Any, selection: Any, loss: Any, wanted: bool, asked: Any) -> Any:
        world = replace(planned.world, rank=1, size=2, _strategy=_Sends())
        for measures in (True, False):
            selection.engine.forms.taken = {}
            autotune.autotuned(replace(planned, world=world), selection, loss, measures, asked)
            found.append(selection.engine.forms.taken)
        selection.engine.forms.taken = {}
        return selection

    def never(*_: Any) -> Any:
        raise AssertionError("rank 1 times something")

    monkeypatch.setattr(run, "autotuned", as_rank_one)
    monkeypatch.setattr(autotune, "fastest_forms", never)
    final(1, True)
    assert found == [told, {}]


def test_what_is_measured_leaves_everything_as_it_was_and_the_run_is_the_same() -> None:
    """Draws, samples, noise and ledger are those of the run that measures nothing."""
    (plain, before), (tuned, after) = (final(7, measured) for measured in (False, True))
    assert str(plain.statement()) == str(tuned.statement())
    torch.testing.assert_close(after, before)
