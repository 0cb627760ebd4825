"""What a training_step writes into its module is found by contents, refused in the user's words, and undone."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DifferentialPrivacy, PreflightError
from lightning_dp.step import contents
from lightning_dp.step.contents import Contents, tensors_of
from lightning_dp.step.undone import undone
from tests.conftest import Regressor, loader, trainer

Write = Callable[[Any], None]


class Teacher(Regressor):
    """A teacher that starts as a copy of the student and is moved towards it, in one of the many ways to write that."""

    write: Write

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("center", torch.zeros(1))
        self.queue = torch.zeros(4)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            type(self).write(self)
        return super().training_step(batch, batch_idx) + nn.functional.mse_loss(
            self.net(batch[0]), self.teacher(batch[0])
        )


def _each(move: Callable[[Tensor, Tensor], object]) -> Write:
    def write(self: Any) -> None:
        for mine, given in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            move(mine, given)

    return write


def _assign(mine: Tensor, given: Tensor) -> None:
    mine.data = 0.9 * mine.data + 0.1 * given.detach()


def _by_numpy(mine: Tensor, given: Tensor) -> None:
    view = mine.numpy()
    view *= 0.9


def _by_state_dict(self: Any) -> None:
    mixed = {name: 0.9 * mine + 0.1 * self.net.state_dict()[name] for name, mine in self.teacher.state_dict().items()}
    self.teacher.load_state_dict(mixed)


WRITES: dict[str, Write] = {
    "mul_": _each(lambda mine, given: mine.mul_(0.9).add_(given, alpha=0.1)),
    "data": _each(lambda mine, given: mine.data.mul_(0.9).add_(given.data, alpha=0.1)),
    "lerp_": _each(lambda mine, given: mine.lerp_(given, 0.1)),
    "copy_": _each(lambda mine, given: mine.copy_(0.9 * mine + 0.1 * given)),
    "assignment to data": _each(_assign),
    "numpy": _each(_by_numpy),
    "load_state_dict": _by_state_dict,
    "foreach": lambda self: torch._foreach_mul_(list(self.teacher.parameters()), 0.9),
}


@pytest.mark.parametrize(
    ("how", "engine"),
    [*((how, "auto") for how in WRITES), *(("assignment to data", engine) for engine in ("ghost", "vmap", "loop"))],
)
def test_a_teacher_moved_in_training_step_is_refused_before_anything_is_released(how: str, engine: Any) -> None:
    class Moved(Teacher):
        write = WRITES[how]

    module = Moved()
    mine = {name: (p, p.detach().clone()) for name, p in module.named_parameters()}
    with pytest.raises(
        PreflightError, match=r"training_step writes into teacher\.0\.weight.*test_writes\.py.*on_train_batch_end"
    ):
        trainer(DifferentialPrivacy(noise_multiplier=1.0, engine=engine)).fit(module, loader())
    assert module.global_step == 0
    for name, parameter in module.named_parameters():
        assert parameter is mine[name][0]
        torch.testing.assert_close(parameter.detach(), mine[name][1], rtol=0, atol=0)


class Late(Teacher):
    """Nothing is written as long as only two examples have been seen."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            if self.global_step >= 2:
                type(self).write(self)
        return Regressor.training_step(self, batch, batch_idx)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (WRITES["data"], r"training_step writes into teacher\.0\.weight"),
        (WRITES["assignment to data"], r"training_step writes into teacher\.0\.weight"),
        (lambda self: self.net[0].bias.data.clamp_(max=-9.0), r"training_step writes into net\.0\.bias"),
        (lambda self: self.center.data.add_(1.0), "training_step changes the buffers center"),
        (lambda self: self.queue.add_(1.0), r"training_step writes into the tensor self\.queue"),
    ],
)
def test_a_write_at_a_later_step_is_refused_before_that_step_is_released(write: Write, message: str) -> None:
    class AtStepTwo(Late):
        pass

    AtStepTwo.write = write
    module = AtStepTwo()
    with pytest.raises(PreflightError, match=rf"{message}.*test_writes\.py:\d+ in"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0, engine="loop")).fit(module, loader())
    assert module.global_step == 2


@pytest.mark.filterwarnings("ignore:engine 'ghost' cannot run some:UserWarning")
@pytest.mark.parametrize("engine", ["auto", "ghost", "vmap"])
def test_memory_of_a_tensor_under_vmap_is_given_to_no_other(engine: Any) -> None:
    """A frozen parameter whose ``.data`` was one would be used after vmap is over: a segmentation fault."""

    class Assigned(Late):
        write = WRITES["assignment to data"]

    module = Assigned()
    before = {name: tensor.clone() for name, tensor in module.teacher.state_dict().items()}
    with pytest.raises(PreflightError, match=r"writes into teacher\.0\.weight.*test_writes\.py"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0, engine=engine)).fit(module, loader())
    assert module.global_step == 2
    torch.testing.assert_close(module.teacher.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("engine", ["auto", "ghost", "vmap", "loop"])
def test_a_buffer_that_is_assigned_what_it_holds_is_no_change(engine: Any) -> None:
    class Same(Teacher):
        @staticmethod
        def write(self: Any) -> None:
            self.center = self.center * 1.0
            self.center.copy_(torch.zeros(1))

    module = Same()
    center = module.center
    trainer(DifferentialPrivacy(noise_multiplier=1.0, engine=engine), max_steps=2).fit(module, loader())
    assert module.center is center


class Everything(nn.Module):
    """Something of each kind that a look could leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
        self.again = self.net
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("seen", torch.zeros(2))
        self.queue, self.bank, self.array = torch.zeros(3), [torch.zeros(2)], np.zeros(2)
        self.generator, self.other = torch.Generator().manual_seed(0), np.random.default_rng(0)
        self.notes, self.count = [1], 0


def _spoil(module: Any) -> None:
    module.frozen.data.mul_(0.248)
    module.seen.data = torch.full((5,), 7.0, dtype=torch.float64)
    module.net[0].weight.data = module.net[0].weight.data.double() * 3
    module.net[0].bias = nn.Parameter(torch.zeros(7))
    module.again = nn.Linear(3, 3)
    module.register_buffer("more", torch.zeros(1), persistent=False)
    module.net[0].weight.requires_grad_(False)
    module.frozen.requires_grad_(True)
    module.net[0].weight.grad = torch.ones(2, 2, dtype=torch.float64)
    module.net.eval()
    module.net.register_forward_hook(lambda *_: None)
    module.queue[0], module.bank[0][1], module.array[1] = 1.0, 1.0, 1.0
    module.notes.append(2)
    module.count = 5
    torch.rand(3, generator=module.generator), module.other.random(3), torch.rand(3), random.random()


@pytest.mark.parametrize("fails", [False, True])
def test_a_look_leaves_a_module_as_it_was_also_when_it_fails_in_mid_write(fails: bool) -> None:
    module = Everything()
    objects = {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors_of(module).items()}
    before = {name: (tensor.clone(), tensor.requires_grad) for name, tensor in tensors_of(module).items()}
    draws = [torch.get_rng_state(), module.generator.get_state(), module.other.bit_generator.state["state"]]
    seeded = random.getstate()

    def look() -> None:
        with undone(module):
            _spoil(module)
            if fails:
                raise RuntimeError("in mid-write")

    if fails:
        with pytest.raises(RuntimeError, match="in mid-write"):
            look()
    else:
        look()
    assert {name: (id(tensor), tensor.data_ptr()) for name, tensor in tensors_of(module).items()} == objects
    for name, tensor in tensors_of(module).items():
        torch.testing.assert_close(tensor.detach(), before[name][0], rtol=0, atol=0)
        assert (tensor.requires_grad, tensor.grad) == (before[name][1], None), name
    assert module.again is module.net
    assert module.net.training
    assert not module.net._forward_hooks
    assert (module.notes, module.count, module.array.tolist()) == ([1], 0, [0.0, 0.0])
    assert torch.equal(torch.get_rng_state(), draws[0])
    assert torch.equal(module.generator.get_state(), draws[1])
    assert module.other.bit_generator.state["state"] == draws[2]
    assert random.getstate() == seeded


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
)
def test_any_change_of_a_tensors_contents_is_seen_and_nothing_else(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "small": torch.randint(2, (3, 2), generator=generator).to(dtype),
        "large": torch.randint(2, (2**20 + 5,), generator=generator).to(dtype),
        "number": torch.ones((), dtype=dtype),
        "none": torch.ones(0, dtype=dtype),
    }
    before = Contents.of(tensors)
    tensors["small"].copy_(tensors["small"].clone())
    assert before.changed() == []
    tensors["large"][-1] = ~tensors["large"][-1] if dtype == torch.bool else tensors["large"][-1] + 1
    assert before.changed() == ["large"]
    moved = Contents.of(tensors)
    assert not torch.equal(tensors["large"], tensors["large"].roll(1))
    tensors["large"].copy_(tensors["large"].roll(1))  # the same numbers at other places
    assert moved.changed() == ["large"]
    turned = Contents.of(tensors)
    tensors["small"].data = tensors["small"].reshape(2, 3)
    assert turned.changed() == ["small"]


def test_what_is_not_a_number_is_a_content_too() -> None:
    tensors = {"x": torch.tensor([float("nan"), -0.0])}
    before = Contents.of(tensors)
    assert before.changed() == []
    tensors["x"].abs_()
    assert before.changed() == ["x"]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.int8, torch.bool])
def test_where_digests_are_kept_in_place_of_copies_a_write_is_found_and_nothing_else(
    kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of what is on a device: one question for all tensors, and the names only if the answer is yes."""
    monkeypatch.setattr(contents, "_can_be_copied", lambda _: False)
    tensors = {name: torch.ones(3, 5).to(kind) for name in ("one", "two", "three")}
    before = contents.Contents.of(tensors)
    assert not before.copies
    assert before.changed() == []
    tensors["two"].data[1, 2] = 0
    assert before.changed() == ["two"]
    tensors["two"].data[1, 2] = 1
    assert before.changed() == []
