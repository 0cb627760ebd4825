"""What is drawn for one example depends on nobody else, wherever the generator is kept and whoever draws."""

from __future__ import annotations

import functools
import random
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate

from lightning_dp import DifferentialPrivacy
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.step.open_step import OpenStep, Replay
from tests.conftest import trainer
from tests.guarantees import helper_of_a_user as helper

COUNT, CLIP = 8, 1.0
DRAWN = torch.randn(COUNT, 5, generator=torch.Generator().manual_seed(1))
OWN = np.random.default_rng(0)


class Records(Dataset[Any]):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        return DRAWN[index] * self.factor(index), index % 3

    def factor(self, index: int) -> Any:
        return 1.0


class Nested:
    """As a library's transform keeps its generator."""

    def __init__(self) -> None:
        self.kept = [{"generator": np.random.RandomState(0)}]

    def __call__(self) -> float:
        return float(self.kept[0]["generator"].rand())


class InAnObject(Records):
    def __init__(self) -> None:
        self.steps = [Nested(), functools.partial(random.Random(0).uniform, 0, 1)]

    def factor(self, index: int) -> Any:
        return 1 + sum(step() for step in self.steps)


class InAnotherFile(Records):
    def factor(self, index: int) -> Any:
        return 1 + helper.GENERATOR.random() + helper.drawn()


class InCodeWithinCode(Records):
    def factor(self, index: int) -> Any:
        return sum([OWN.random() for _ in range(2 + index % 2)])


class InAProperty(Records):
    def __init__(self) -> None:
        generator = random.Random(0)
        type(self).now = property(lambda self: generator.random())

    def factor(self, index: int) -> Any:
        return 1 + self.now


class MadeAtFirst(Records):
    generator: Any = None

    def factor(self, index: int) -> Any:
        if self.generator is None:
            self.generator = np.random.default_rng(3)
        return 1 + self.generator.random()


class BehindMuch(Records):
    def __init__(self) -> None:
        self.much = [{"path": str(number), "size": [number]} for number in range(300)]
        self.kept = [[{"more": [number]} for number in range(60)] for _ in range(30)]
        self.rng = np.random.default_rng(0)

    def factor(self, index: int) -> Any:
        return 1 + self.rng.random()


class ByTorch(Records):
    def factor(self, index: int) -> Any:
        return torch.rand(())


class ByNumPy(Records):
    def factor(self, index: int) -> Any:
        return np.random.rand()


class ByPython(Records):
    def factor(self, index: int) -> Any:
        return random.random()


BY = {"torch": ByTorch, "numpy": ByNumPy, "random": ByPython, "own": InAnObject}


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Noisy:
    """Draws from everything that people draw from, more for some examples than for others."""

    def __init__(self) -> None:
        self.kept = [np.random.default_rng(0), random.Random(0), torch.Generator().manual_seed(0)]

    def __call__(self, x: Tensor) -> Tensor:
        array, python, of_torch = self.kept
        for _ in range(1 + int(x.sum() > 0)):
            factor = torch.rand(()) + np.random.rand() + random.random()
            factor = factor + array.random() + python.random() + torch.rand((), generator=of_torch)
        return x * factor / 9


class BeforeTransfer(Net):
    def __init__(self) -> None:
        super().__init__()
        self.noisy = Noisy()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.noisy(batch[0]), batch[1]


class AtBatchStart(Net):
    def __init__(self) -> None:
        super().__init__()
        self.noisy = Noisy()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        batch[0].copy_(self.noisy(batch[0]))


class CallbackAtBatchStart(L.Callback):
    def __init__(self) -> None:
        self.noisy = Noisy()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch[0].copy_(self.noisy(batch[0]))


class Both(AtBatchStart):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.noisy(batch[0]), batch[1]


class Shared(Net):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] * (torch.rand(()) + np.random.rand() + OWN.random()), batch[1]


class Grab(L.Callback):
    def __init__(self) -> None:
        self.sums: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.sums.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]).double() * COUNT)


def noisy_collate(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return NOISY(x), y


NOISY = Noisy()


def shared_collate(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return x * (random.random() + torch.rand(()) + OWN.random()), y


CASES: dict[str, dict[str, Any]] = {
    **{
        kind.__name__: {"data": kind}
        for kind in (InAnObject, InAnotherFile, InCodeWithinCode, InAProperty, MadeAtFirst, BehindMuch)
    },
    "MadeAtFirst in a worker": {"data": MadeAtFirst, "workers": 1},
    "InAnotherFile in workers": {"data": InAnotherFile, "workers": 2},
    "collate_fn": {"collate": noisy_collate},
    "before transfer": {"module": BeforeTransfer},
    "at batch start": {"module": AtBatchStart},
    "a callback at batch start": {"callback": CallbackAtBatchStart},
    "both": {"module": Both},
    **{
        f"{name}, each": {**case, "batch_axis": "each"}
        for name, case in {
            "data": {"data": InAnObject},
            "collate_fn": {"collate": noisy_collate},
            "before transfer": {"module": BeforeTransfer},
            "at batch start": {"module": AtBatchStart},
            "both": {"module": Both},
        }.items()
    },
}


def sums(
    left_out: set[int],
    *,
    data: type[Records] = Records,
    module: type[Net] = Net,
    callback: Any = None,
    collate: Any = None,
    workers: int = 0,
    key: int = 5,
    user_seed: int = 0,
    **options: Any,
) -> list[Tensor]:
    L.seed_everything(user_seed, workers=True, verbose=False)
    private = DifferentialPrivacy(
        noise_multiplier=1e-9, clip_norm=CLIP, expected_batch_size=COUNT, dataset_size=COUNT,
        **{"physical_batch_size": 5, **options},
    )  # fmt: skip
    private.replay = Replay(RandomKey.from_seed(key), OpenStep, frozenset(left_out), frozenset())
    grab = Grab()
    loader = DataLoader(data(), batch_size=4, collate_fn=collate, num_workers=workers)
    more = [] if callback is None else [callback()]
    torch.manual_seed(3)
    trainer(private, grab, *more, max_steps=2).fit(module(), loader)
    return grab.sums


@pytest.mark.parametrize("name", CASES)
def test_a_sum_is_what_each_example_gives_alone(name: str) -> None:
    """With the first, less without it, is the first by itself: all others draw what they drew."""
    everybody, others = sums(set(), **CASES[name]), sums({0}, **CASES[name])
    alone = sums(set(range(1, COUNT)), **CASES[name])
    for both, rest, one in zip(everybody, others, alone, strict=True):
        torch.testing.assert_close(both - rest, one, rtol=0, atol=1e-5)
    assert float(torch.stack(alone).norm()) > 0.1
    assert float((everybody[0] - everybody[1]).norm()) > 1e-3  # each step draws anew


def test_what_is_vouched_for_draws_for_the_step_and_not_for_the_first_of_it() -> None:
    """A factor that a whole batch shares is the same whoever is in it, and in each of its micro-batches."""
    for case in ("a vouched hook", "a vouched collate_fn"):
        given: dict[str, Any] = {"module": Shared, "row_wise": ["on_before_batch_transfer"]}
        if case == "a vouched collate_fn":
            given = {"data": InAnObject, "collate": shared_collate, "row_wise": ["collate_fn"]}
        everybody, others, alone = (sums(out, **given) for out in (set(), {0}, set(range(1, COUNT))))
        for both, rest, one in zip(everybody, others, alone, strict=True):
            torch.testing.assert_close(both - rest, one, rtol=0, atol=1e-5, msg=case)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("source", ["torch", "numpy", "random", "own"])
def test_no_seed_of_the_users_fixes_what_is_drawn(source: str, workers: int) -> None:
    """Each by itself: under another key everything else would be the same."""
    given = {"data": BY[source], "workers": workers}
    first, second = (sums(set(), key=key, **given)[0] for key in (1, 2))
    assert float((first - second).norm()) > 1e-3
    if not workers:
        torch.testing.assert_close(first, sums(set(), key=1, user_seed=7, **given)[0], rtol=0, atol=1e-6)
