"""The size of a micro-batch by measuring: it fits, it is fast, and looking for it changes nothing."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_dp.look.batch_size.physical as physical_batch
from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy, run
from lightning_dp.batches.transforms import ViewTransform
from lightning_dp.look.batch_size.memory import UNKNOWN, available_memory, peak_bytes, room_for_micro_batches
from lightning_dp.look.batch_size.physical import largest_useful_size
from lightning_dp.look.batch_size.search import (
    PATIENCE,
    SATURATED,
    Found,
    Measured,
    copies,
    fill_memory,
    measured,
    measured_once,
    search_size,
)
from lightning_dp.look.leaks.examples_apart import Company
from lightning_dp.look.leaks.losses import Reduction
from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.ranks.world import World, world_of
from lightning_dp.step.planned import Planned
from tests.conftest import Notes, Regressor, loader, regressor, trainer, weights

CPU = torch.device("cpu")


@given(
    fixed=st.floats(0, 1e9),
    each=st.floats(0, 1e8),
    start=st.floats(1e-6, 1),
    per_example=st.floats(1e-6, 0.1),
    room=st.integers(1, 2**33),
    most=st.integers(1, 5000),
)
def test_nothing_is_tried_that_would_not_fit_and_nothing_fast_is_missed(
    fixed: float, each: float, start: float, per_example: float, room: int, most: int
) -> None:
    def measure(n: int) -> Measured:
        return Measured(n, fixed + each * n, start + per_example * n)

    found = search_size(measure, room, most)
    assert found is not None
    sizes = [one.examples for one in found.tried]
    assert sizes == sorted(set(sizes))
    assert 1 <= found.examples <= most
    assert all(one.bytes <= room * (1 + 1e-9) for one in found.tried[1:])
    assert found.examples in sizes
    chosen = measure(found.examples)
    fitting = [one for one in found.tried if one.bytes <= room]
    assert all(chosen.seconds / chosen.examples <= 1.06 * one.seconds / one.examples for one in fitting)
    following = min(2 * sizes[-1], most)
    last = fixed + each * sizes[-1]
    predicted = max(fixed + each * following, 1.5 * last)  # half of it may be anything but examples
    stopped_early = sizes[-1] < most and predicted <= room * 0.99 and len(sizes) > 1
    if stopped_early:  # then larger ones were no faster, or it took long enough already
        assert "not faster" in found.because


def test_a_first_size_that_took_too_much_is_not_believed_to_say_that_more_examples_are_free() -> None:
    bytes_of = {1: 60.0, 2: 60.0, 4: 110.0, 8: 210.0}
    found = search_size(lambda n: Measured(n, bytes_of[n], 1.0 / n), room=130, most=64)
    assert found is not None
    assert [one.examples for one in found.tried] == [1, 2, 4]
    flat = search_size(lambda n: Measured(n, 60.0, 1.0), room=120, most=4096)  # nothing grows: then it is seen to
    assert flat is not None
    assert max(one.examples for one in flat.tried) > 2


def test_running_out_of_memory_ends_the_search_with_what_fits() -> None:
    def measure(n: int) -> Measured | None:
        return Measured(n, 1.0, 1.0) if n < 8 else None

    found = search_size(measure, 2**30, 100)
    assert found is not None
    assert found.examples == 4
    assert "did not fit" in found.because
    assert search_size(lambda n: None, 2**30, 100) is None


def test_work_that_runs_out_of_memory_is_no_error() -> None:
    def work() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert measured(work, 1, CPU) is None
    found = measured(lambda: lambda: torch.zeros(1000, dtype=torch.float64) + 1, 3, CPU)
    assert found is not None
    assert 16_000 <= found.bytes < 20_000
    assert found.examples == 3


def test_the_peak_is_what_is_held_at_a_time() -> None:
    def work() -> None:
        one = torch.ones(2**18)
        two = one + one
        del one
        assert float((two + 1).sum()) == 3 * 2**18
        del two

    assert peak_bytes(work, CPU) == pytest.approx(2 * 2**20, rel=0.01)


def test_copies_are_whole_examples() -> None:
    """Labels, masks and lengths of an example stay together: an index that training_step looks up is one that it can."""
    batch = {
        "x": torch.rand(2, 3), "y": torch.tensor([-100, 7]), "mask": torch.tensor([[True], [False]]), "name": ["a", "b"],
        "scale": 2.5, "none": None, "half": torch.zeros(2, 1, dtype=torch.bfloat16),
    }  # fmt: skip
    made = copies(batch, 2, 5)
    for name, leaf in batch.items():
        if isinstance(leaf, Tensor):
            assert torch.equal(made[name], leaf[torch.tensor([0, 1, 0, 1, 0])])
    assert (made["name"], made["scale"], made["none"]) == (["a", "b", "a", "b", "a"], 2.5, None)
    assert len(copies((torch.rand(1, 2),), 1, 4)[0]) == 4


class Meter:
    """A device with so much memory and speed, of which each measuring takes its time."""

    def __init__(self, fixed: float, each: float, start: float, per_example: float, holds: float = math.inf) -> None:
        self.fixed, self.each, self.start, self.per_example, self.holds = fixed, each, start, per_example, holds
        self.time, self.tried = 0.0, list[int]()

    def __call__(self, rows: int) -> Measured | None:
        self.tried.append(rows)
        seconds = max(self.start, self.per_example * rows)  # gaps between kernels, until there are none
        self.time += 2 * seconds
        taken = self.fixed + self.each * rows
        return None if taken > self.holds else Measured(rows, taken, seconds)

    def clock(self) -> float:
        return self.time


@given(
    fixed=st.floats(0, 1e9),
    each=st.floats(1, 1e8),
    start=st.floats(1e-3, 0.2),
    per_example=st.floats(1e-6, 0.1),
    room=st.integers(10**6, 2**36),
    holds=st.floats(0.3, 2),
    most=st.integers(1, 20000),
)
def test_what_is_found_fits_fills_the_memory_and_is_found_in_time(
    fixed: float, each: float, start: float, per_example: float, room: int, holds: float, most: int
) -> None:
    meter = Meter(fixed, each, start, per_example, room * holds)
    found = fill_memory(meter, room, most, meter.clock)
    assert meter.time <= PATIENCE + 2 * max(SATURATED, start, 2 * per_example)
    fits = min(most, int((min(room, room * holds) - fixed) / each))
    if found is None:
        assert fixed + each > room * holds  # not even one
        return
    assert found.examples in meter.tried
    assert 1 <= found.examples <= max(fits, 1)
    if holds >= 1 and fits > 40 and found.examples < most and "fit" in found.because:
        # the line is not believed where it says that examples cost less than half of what the last size took for each
        assert found.examples >= 0.75 * fits


def test_memory_is_filled_in_few_tries() -> None:
    """WRN-40-4 with 32 views, as it is counted: 371 MiB an example, of 0.8 of 80 GB; 5 ms each, beyond the first 60 ms."""
    meter = Meter(2e9, 371 * 2**20, 0.06, 0.005)
    found = fill_memory(meter, int(0.8 * 80e9), 16_384 + 512, meter.clock)
    assert found is not None
    assert 128 <= found.examples <= 160
    assert len(meter.tried) <= 6
    assert meter.time <= PATIENCE
    slow = Meter(0, 1e6, 0.06, 0.01)
    found = fill_memory(slow, int(64e9), 10_000, slow.clock)
    assert found is not None
    assert 64 <= found.examples <= 128
    assert "faster" in found.because
    small = Meter(0, 1e3, 0.01, 1e-6)
    found = fill_memory(small, int(64e9), 300, small.clock)
    assert (found.examples, found.because) == (300, "more than a step draws would be of no use") if found else False


def test_a_size_that_did_not_fit_after_all_is_followed_by_a_smaller_one() -> None:
    meter = Meter(0, 1000, 0.01, 1e-5, holds=40_000)
    found = fill_memory(meter, 100_000, 4096, meter.clock)
    assert found is not None
    assert 20 <= found.examples <= 40
    assert meter.tried[:3] == [2, 8, 96]
    one = Meter(0, 1000, 0.01, 1e-5, holds=1_500)
    found = fill_memory(one, 100_000, 4096, one.clock)
    assert (found.examples, one.tried) == (1, [2, 1]) if found else False
    none = Meter(0, 1000, 0.01, 1e-5, holds=999)
    assert fill_memory(none, 100_000, 4096, none.clock) is None
    much = Meter(0, 1000, 0.01, 1e-5)
    found = fill_memory(much, 500, 4096, much.clock)
    assert (found.examples, found.because) == (1, "a single example takes more") if found else False


def test_by_default_memory_is_filled_where_it_is_measured(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """On CUDA; here with a stand-in for its meter. Nothing of the run is another than with a size that is given."""
    results = {}
    for size in (None, 7):
        with monkeypatch.context() as patch:
            if size is None:
                for module in (physical_batch, run):
                    patch.setattr(module, "measures_by_default", lambda world: True)
                patch.setattr(physical_batch, "room_for_micro_batches", lambda world: 7_900 + 5 * 4 * 49)
                patch.setattr(
                    physical_batch,
                    "measured_once",
                    lambda work, rows, device: work()() and Measured(rows, 1000.0 * rows, 0.01),
                )
            module = regressor()
            private = DifferentialPrivacy(noise_multiplier=0.5, seed=1, physical_batch_size=size)
            fit = trainer(private, max_steps=4)
            fit.fit(module, loader())
        results[size] = weights(module)
    torch.testing.assert_close(results[None], results[7], rtol=0, atol=0)
    assert sum("physical_batch_size=None is 7" in line for line in caplog.messages) == 1
    assert sum("micro-batches of up to 7\n" in line for line in caplog.messages) == 2


def test_by_default_a_long_example_keeps_the_rule_of_thumb(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """What eight short ones leave room for says nothing about it."""

    class Padded(Regressor):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            return super().training_step((batch[0][:, :4], batch[1]), batch_idx)

    for module in (physical_batch, run):
        monkeypatch.setattr(module, "measures_by_default", lambda world: True)
    lengths = [6 if row == 6 else 4 for row in range(64)]
    data = [(torch.randn(length), torch.randn(())) for length in lengths]

    def collate(records: Any) -> Any:
        inputs, targets = zip(*records, strict=True)
        return nn.utils.rnn.pad_sequence(inputs, batch_first=True), torch.stack(targets)

    trainer(DifferentialPrivacy(noise_multiplier=0.5), max_steps=1).fit(Padded(), loader(data, collate_fn=collate))
    assert any("physical_batch_size=None stays at 32" in line and "differ in shape" in line for line in caplog.messages)


def test_memory_and_time_of_two_passes() -> None:
    calls: list[int] = []
    found = measured_once(lambda: lambda: calls.append(1) or torch.zeros(1000, dtype=torch.float64) + 1, 3, CPU)
    assert found is not None
    assert 16_000 <= found.bytes < 20_000
    assert calls == [1, 1]

    def work() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert measured_once(lambda: work, 1, CPU) is None


@pytest.mark.parametrize(
    ("meminfo", "limit", "used", "expected"),
    [
        ("MemTotal: 9 kB\nMemAvailable:   1000 kB\n", None, None, 1_024_000),
        ("MemAvailable:   1000 kB\n", "max", "5", 1_024_000),
        ("MemAvailable:   1000 kB\n", "900000", "100000", 800_000),
        ("MemAvailable:   1000 kB\n", "100000", "100001", 0),
    ],
)
def test_available_memory_is_the_least_that_anybody_grants(
    tmp_path: Path, meminfo: str, limit: str | None, used: str | None, expected: int
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(meminfo)
    (tmp_path / "sys/fs/cgroup").mkdir(parents=True)
    for name, value in (("memory.max", limit), ("memory.current", used)):
        if value is not None:
            (tmp_path / "sys/fs/cgroup" / name).write_text(value + "\n")
    assert available_memory(tmp_path) == expected


def test_memory_is_known_on_every_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_memory(tmp_path) > 0
    monkeypatch.setattr("os.sysconf_names", {})
    assert available_memory(tmp_path) == UNKNOWN
    assert 0 < room_for_micro_batches(world_of(trainer().strategy)) <= 2**32


def test_on_cuda_the_allocator_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the device, which this test does not need to have."""
    held, peak, synchronised = 200, [200], []
    stand_in = {
        "mem_get_info": lambda device: (1000, 2000),
        "memory_reserved": lambda device: 500,
        "memory_allocated": lambda device: held,
        "reset_peak_memory_stats": lambda device: peak.__setitem__(0, held),
        "max_memory_allocated": lambda device: peak[0],
        "synchronize": synchronised.append,
    }
    for name, function in stand_in.items():
        monkeypatch.setattr(torch.cuda, name, function)
    device = torch.device("cuda", 0)
    assert room_for_micro_batches(World(0, 1, device)) == int(0.8 * (1000 + 500 - 200))
    assert peak_bytes(lambda: peak.__setitem__(0, 900), device) == 700
    found = measured(lambda: lambda: peak.__setitem__(0, 900), 3, device)
    assert found is not None
    assert found.bytes == 700
    assert len(synchronised) >= 2 + 2 + 2  # before and after each memory, and after each time
    assert room_for_micro_batches(World(0, 1, torch.device("mps"))) == UNKNOWN


class Random(Regressor):
    """It draws from every global generator, has a buffer, and counts how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("scale", torch.ones(()))
        self.seen: list[int] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(len(batch[0]))
        random.random()
        np.random.rand()
        out = self.net(self.dropout(batch[0]) * self.scale).squeeze(-1)
        loss = nn.functional.mse_loss(out, batch[1])
        self.log("train/loss", loss)
        return loss


def world(module: nn.Module, private: DifferentialPrivacy) -> dict[str, Any]:
    """Everything that looking for a size must leave alone, by name."""
    assert private.ledger is not None
    return {
        **{name: tensor.detach().clone() for name, tensor in [*module.named_parameters(), *module.named_buffers()]},
        "torch's generator": torch.get_rng_state(),
        "NumPy's generator": torch.tensor(np.random.get_state()[1].astype(np.int64)),
        "Python's generator": random.getstate(),
        "gradients": [parameter.grad for parameter in module.parameters()],
        "ledger": private.ledger.state_dict(),
        "modes": [layer.training for layer in module.modules()],
    }


@pytest.mark.filterwarnings("ignore:training_step draws")
@pytest.mark.parametrize(("engine", "found"), [("ghost", None), ("ghost", 3), ("vmap", None), ("loop", None)])
def test_looking_for_a_size_touches_nothing(
    engine: Any, found: int | None, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Whatever is found; a size other than the one that reading has begun with makes the loader begin again."""
    if found:
        monkeypatch.setattr(physical_batch, "search_size", lambda *_: Found(found, "", (Measured(found, 1.0, 1.0),)))
    torch.manual_seed(0)
    module = Random()
    private = DifferentialPrivacy(noise_multiplier=1.0, engine=engine, physical_batch_size="auto", seed=5)
    original, sizes = physical_batch.settle_physical_batch_size, []

    def watched(planned: Any, *rest: Any) -> Any:
        before = world(module, private)
        sizes.append(original(planned, *rest))
        after = world(module, private)
        same = {n: torch.equal(v, after[n]) if isinstance(v, Tensor) else v == after[n] for n, v in before.items()}
        assert [name for name in before if not same[name]] == []
        return sizes[-1]

    monkeypatch.setattr("lightning_dp.run.settle_physical_batch_size", watched)
    fit = trainer(private, max_steps=2)
    fit.fit(module, loader())
    (size,) = sizes
    assert 1 <= size <= 16 + 4 * 4
    told = [line for line in caplog.messages if "physical_batch_size='auto'" in line]
    assert len(told) == 1
    assert re.search(rf"\b{size}\b", told[0])
    assert ("takes one example at a time" in told[0]) == (engine == "loop")


def test_the_size_found_is_the_size_used_and_training_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is found, and also after the loader is made again in the next epoch."""
    results, used = {}, {}
    for size in (None, 3, "auto"):
        monkeypatch.setattr(physical_batch, "search_size", lambda *_: Found(3, "", (Measured(3, 1.0, 1.0),)))
        module, pieces = regressor(), []
        private = DifferentialPrivacy(noise_multiplier=0.5, seed=1, physical_batch_size=size)
        fit = trainer(private, max_steps=9, reload_dataloaders_every_n_epochs=1)
        original = Planned.micro_batches

        def watched(self: Any, *rest: Any, original: Any = original, pieces: Any = pieces) -> Any:
            for batch, examples in original(self, *rest):
                pieces.append(examples)
                yield batch, examples

        with monkeypatch.context() as patch:
            patch.setattr(Planned, "micro_batches", watched)
            fit.fit(module, loader())
        results[size], used[size] = weights(module), pieces
    assert used["auto"] == used[3]
    assert max(used["auto"]) == 3
    assert max(used[None]) > 3
    for size in (3, "auto"):
        torch.testing.assert_close(results[size], results[None], rtol=1e-5, atol=1e-6)


class Shift(ViewTransform):
    draws = 4

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        return images + uniforms


def test_views_are_measured_with_their_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = Notes()
    module = regressor()
    module.net.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    unseen = Company(0, Reduction.UNKNOWN, "nobody looked")
    monkeypatch.setattr("lightning_dp.run.check_examples_stay_apart", lambda *_: unseen)  # no part of measuring
    private = DifferentialPrivacy(noise_multiplier=0.5, physical_batch_size="auto", engine="vmap")
    fit = trainer(private, AugmentationMultiplicity(k=3, transform=Shift(), images=0), max_steps=1)
    fit.fit(module, loader())
    assert {shape[-2] for shape in shapes} == {3}


def test_a_step_that_refuses_copies_gets_the_default(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("these are not pictures.")

    monkeypatch.setattr(physical_batch, "measured", refuse)
    private = DifferentialPrivacy(noise_multiplier=0.5, physical_batch_size="auto")
    fit = trainer(private, max_steps=1)
    fit.fit(regressor(), loader())
    assert any(
        "physical_batch_size='auto' stays at 32 without being measured: copies of the first examples cannot be trained on: "
        "these are not pictures" in line
        for line in caplog.messages
    )
    assert private.statement().steps == 1


@pytest.mark.parametrize("size", [0, -3, "largest", 2.5])
def test_what_is_no_size_is_refused(size: Any) -> None:
    with pytest.raises(ValueError, match=rf"physical_batch_size={size!r}: expected at least 1, 'auto', or None"):
        DifferentialPrivacy(noise_multiplier=1.0, physical_batch_size=size)


def test_no_size_is_larger_than_a_draw_can_be() -> None:
    def most(**numbers: Any) -> int:
        plan = PrivacyPlan(
            **{"noise_multiplier": 1.0, "clip_norm": 1.0, "delta": 1e-5, "dataset_size": 1000, **numbers}
        )
        return largest_useful_size(plan, 1)

    assert most(expected_batch_size=100) == 140
    assert most(expected_batch_size=1000) == 1000
    assert most(expected_batch_size=100, max_batch_size=120) == 120
