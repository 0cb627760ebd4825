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
from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy
from lightning_dp.batches.transforms import ViewTransform
from lightning_dp.look.batch_size.memory import UNKNOWN, available_memory, peak_bytes, room_for_micro_batches
from lightning_dp.look.batch_size.physical import largest_useful_size
from lightning_dp.look.batch_size.search import Found, Measured, measured, random_rows, search_size
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


def test_random_rows_have_shapes_types_and_ranges_of_the_first_examples() -> None:
    torch.manual_seed(0)
    batch = {
        "x": torch.rand(2, 3), "y": torch.tensor([4, 7]), "mask": torch.tensor([[True], [False]]), "name": ["a", "b"],
        "scale": 2.5, "none": None, "half": torch.zeros(2, 1, dtype=torch.bfloat16), "byte": torch.full((2, 4), 250).byte(),
        "nan": torch.tensor([[math.nan], [math.inf]]), "complex": torch.zeros(2, dtype=torch.complex64),
    }  # fmt: skip
    before = torch.get_rng_state()
    rows = random_rows(batch, 50)
    assert torch.equal(torch.get_rng_state(), before)
    for name, leaf in batch.items():
        if isinstance(leaf, Tensor):
            assert (rows[name].dtype, rows[name].shape) == (leaf.dtype, (50, *leaf.shape[1:]))
    assert 0 <= rows["x"].min() < rows["x"].max() <= batch["x"].max()
    assert set(rows["y"].tolist()) == {4, 5, 6, 7}
    assert set(rows["mask"].flatten().tolist()) == {True, False}
    assert set(rows["byte"].flatten().tolist()) == {250}
    assert rows["nan"].isfinite().all()
    assert (rows["name"], rows["scale"], rows["none"]) == (["a"] * 50, 2.5, None)


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
        np.random.rand()  # noqa: NPY002 (the generator that must be left alone is the legacy one)
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
        "NumPy's generator": torch.tensor(np.random.get_state()[1].astype(np.int64)),  # noqa: NPY002 (the same)
        "Python's generator": random.getstate(),
        "gradients": [parameter.grad for parameter in module.parameters()],
        "ledger": private.ledger.state_dict(),
        "modes": [layer.training for layer in module.modules()],
    }


@pytest.mark.filterwarnings("ignore:training_step draws")
@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
def test_looking_for_a_size_touches_nothing(engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
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


def test_a_step_that_refuses_random_data_gets_the_default(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def refuse(*_: Any) -> None:
        raise ValueError("these are not pictures.")

    monkeypatch.setattr(physical_batch, "measured", refuse)
    private = DifferentialPrivacy(noise_multiplier=0.5, physical_batch_size="auto")
    fit = trainer(private, max_steps=1)
    fit.fit(regressor(), loader())
    assert any(
        "physical_batch_size='auto' stays at 32 without being measured: random data cannot be trained on: these are not "
        "pictures" in line
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
