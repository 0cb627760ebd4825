"""Runs training steps that give tensors other memory, in a process of its own, and prints a line of JSON for each.

A tensor that exists only while an engine's vmap is open must not be left in a module, where its use would end the process.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp import DifferentialPrivacy
from tests.conftest import Regressor, loader, trainer, weights

ENGINES = ("auto", "ghost", "vmap", "loop")
Step = Callable[[Any, Tensor], Tensor | None]

nn.kept_by_a_library = torch.zeros(8)


class Student(Regressor):
    """Has a teacher and buffers, which its training_step changes from some step on."""

    step: Step
    first: int

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("center", torch.zeros(8))
        self.queue = torch.zeros(8)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        extra = type(self).step(self, batch[0]) if self.global_step >= self.first else None
        loss = super().training_step(batch, batch_idx) + F.mse_loss(self.net(batch[0]), self.teacher(batch[0]))
        return loss if extra is None else loss + extra


def hidden(self: Any, x: Tensor) -> Tensor:
    """Eight numbers of an example, with a gradient."""
    found: Tensor = self.net[1](self.net[0](x))[0]
    return found


def assigns_data(self: Any, x: Tensor) -> None:
    self.teacher[0].weight.data = self.teacher[0].weight.data * 0.99 + self.net[0].weight.data * 0.01


def assigns_data_of_an_example(self: Any, x: Tensor) -> None:
    self.center.data = hidden(self, x).detach()


def exchanges_data(self: Any, x: Tensor) -> None:
    mine, others = self.teacher[0].weight, self.net[0].weight
    mine.data, others.data = others.data, mine.data


def copies_data(self: Any, x: Tensor) -> None:
    self.teacher[0].weight.data.copy_(self.net[0].weight.data * 0.5)


def swaps_a_parameter(self: Any, x: Tensor) -> None:
    half = nn.Parameter(self.net[0].weight.detach() * 0.5, requires_grad=False)
    torch.utils.swap_tensors(self.teacher[0].weight, half)


def swaps_a_buffer(self: Any, x: Tensor) -> None:
    torch.utils.swap_tensors(self.center, hidden(self, x).detach() * 1.0)


def sets_a_parameter(self: Any, x: Tensor) -> None:
    with torch.no_grad():
        self.teacher[0].weight.set_((self.net[0].weight * 0.5).detach())


def sets_a_buffer(self: Any, x: Tensor) -> None:
    with torch.no_grad():
        self.center.set_(hidden(self, x).detach() * 1.0)


def makes_a_parameter(self: Any, x: Tensor) -> None:
    self.teacher[0].weight = nn.Parameter(self.net[0].weight.detach() * 0.5, requires_grad=False)


def loads_with_assign(self: Any, x: Tensor) -> None:
    self.teacher.load_state_dict(self.net.state_dict(), assign=True)


def puts_a_vector_into_parameters(self: Any, x: Tensor) -> None:
    vector = nn.utils.parameters_to_vector(self.net.parameters()).detach() * 0.5
    nn.utils.vector_to_parameters(vector, self.teacher.parameters())


def averages_in_one_call(self: Any, x: Tensor) -> None:
    with torch.no_grad():
        torch._foreach_lerp_(list(self.teacher.parameters()), [p.detach() for p in self.net.parameters()], 0.1)


def adds_to_a_tensor(self: Any, x: Tensor) -> None:
    self.queue += hidden(self, x).detach()


def writes_a_number_into_a_buffer(self: Any, x: Tensor) -> None:
    self.center[0] = 1.0


def writes_out_into_a_buffer(self: Any, x: Tensor) -> None:
    torch.add(self.center, hidden(self, x).detach(), out=self.center)


def changes_a_storage(self: Any, x: Tensor) -> None:
    self.queue.untyped_storage().fill_(1)


def takes_memory_away(self: Any, x: Tensor) -> None:
    self.queue.untyped_storage().resize_(0)


def takes_memory_of_a_parameter_away(self: Any, x: Tensor) -> None:
    self.teacher[0].bias.untyped_storage().resize_(4)
    self.teacher[0].bias.data = torch.zeros(8)


def adds_to_what_a_library_keeps(self: Any, x: Tensor) -> None:
    nn.kept_by_a_library.add_(hidden(self, x).detach())


def assigns_a_gradient(self: Any, x: Tensor) -> None:
    self.net[0].weight.grad = torch.ones_like(self.net[0].weight) * x.mean()
    self.teacher[0].weight.grad = torch.ones(8, 4)


def moves_to_another_type_and_back(self: Any, x: Tensor) -> None:
    self.net.to(torch.float64)
    self.net.to(torch.float32)


def adds_to_its_own(self: Any, x: Tensor) -> Tensor:
    own = torch.zeros(8)
    own += hidden(self, x)
    rows = torch.zeros(2, 8)
    rows[0] = hidden(self, x)
    return own.sum() * rows.sum()


def swaps_its_own(self: Any, x: Tensor) -> Tensor:
    own = torch.zeros(8)
    torch.utils.swap_tensors(own, hidden(self, x).detach() * 1.0)
    return (own * hidden(self, x)).sum()


def gives_its_own_other_memory(self: Any, x: Tensor) -> Tensor:
    own, other = torch.zeros(8), torch.zeros(8)
    own.data = hidden(self, x).detach()
    other.set_(hidden(self, x).detach() * 1.0)
    return (own * other * hidden(self, x)).sum()


def changes_a_copy_of_a_layer(self: Any, x: Tensor) -> Tensor:
    net = copy.deepcopy(self.net)
    net[0].weight.data = net[0].weight.data * 0.5
    return (net(x).detach() * self.net(x)).sum()


REFUSED: dict[Step, str] = {
    assigns_data: "teacher.0.weight",
    assigns_data_of_an_example: "center",
    exchanges_data: "net.0.weight",
    copies_data: "teacher.0.weight",
    swaps_a_parameter: "teacher.0.weight",
    swaps_a_buffer: "center",
    sets_a_parameter: "teacher.0.weight",
    sets_a_buffer: "center",
    makes_a_parameter: "teacher.0.weight",
    loads_with_assign: "teacher.2.bias",
    puts_a_vector_into_parameters: "teacher.2.bias",
    averages_in_one_call: "teacher.2.bias",
    adds_to_a_tensor: "self.queue",
    writes_a_number_into_a_buffer: "center",
    writes_out_into_a_buffer: "center",
    changes_a_storage: "self.queue",
    takes_memory_away: "self.queue",
    takes_memory_of_a_parameter_away: "teacher.0.bias",
    adds_to_what_a_library_keeps: "a tensor that was there before it ran",
}
"""What a refusal must name."""

TRAINED: tuple[Step, ...] = (
    assigns_a_gradient,
    moves_to_another_type_and_back,
    adds_to_its_own,
    swaps_its_own,
    gives_its_own_other_memory,
    changes_a_copy_of_a_layer,
)


RUNS: list[tuple[Step, str, int]] = [
    *((step, engine, 1) for index, step in enumerate(REFUSED) for engine in ("auto", ("ghost", "vmap")[index % 2])),
    *((step, engine, 1) for step in TRAINED for engine in ENGINES),
    *(
        (step, "auto", 0)
        for step in (swaps_a_buffer, makes_a_parameter, takes_memory_away, adds_to_what_a_library_keeps)
    ),
    *((step, "loop", 1) for step in (swaps_a_parameter, loads_with_assign, takes_memory_away)),
]
"""What is run on which engine, from which step on."""


def outcome(step: Step, engine: Any, first: int) -> dict[str, Any]:
    """What comes of two steps, of which the second or both make the change."""
    torch.manual_seed(0)
    module = type(step.__name__, (Student,), {"step": step, "first": first})()
    mine = {name: (tensor, tensor.detach().clone()) for name, tensor in module.state_dict(keep_vars=True).items()}
    found: dict[str, Any] = {"step": step.__name__, "engine": engine, "first": first, "error": None, "text": ""}
    try:
        private = DifferentialPrivacy(noise_multiplier=1.0, engine=engine, seed=3)
        trainer(private, max_steps=2).fit(module, loader(batch_size=4))
    except Exception as error:
        found |= {"error": [one.__name__ for one in type(error).__mro__], "text": str(error)}
    module.net(torch.ones(1, 4))  # whose memory is its own
    now = module.state_dict(keep_vars=True)
    found["steps"] = module.global_step
    found["same tensors"] = all(now[name] is tensor for name, (tensor, _) in mine.items())
    found["as before"] = all(
        torch.equal(now[name], before) for name, (_, before) in mine.items() if not name.startswith("net.")
    )
    found["weights"] = weights(module.net).tolist()
    return found


def main() -> None:
    """Every run, one after the other."""
    warnings.filterwarnings("ignore", message="engine '.*' cannot run some micro-batches")
    os.chdir(tempfile.mkdtemp())
    for step, engine, first in RUNS:
        print(json.dumps({"begins": [step.__name__, engine, first]}), flush=True)
        print(json.dumps(outcome(step, engine, first)), flush=True)


if __name__ == "__main__":
    sys.exit(main())
