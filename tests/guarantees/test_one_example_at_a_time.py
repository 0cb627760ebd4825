"""What one example contributes does not depend on who else was drawn: not by chance, not by collate_fn, not by hooks."""

from __future__ import annotations

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

COUNT, CLIP = 12, 1.0
DRAWN = torch.randn(COUNT, 5, generator=torch.Generator().manual_seed(1))
GENERATOR = np.random.default_rng(0)


class Records(Dataset[Any]):
    """Features and a class, changed at random by the subclasses."""

    def __init__(self) -> None:
        self.own, self.of_torch = np.random.default_rng(0), torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        return 3 * DRAWN[index] * self.factor(index), index % 3

    def factor(self, index: int) -> Any:
        return 1.0


class ByTorch(Records):
    def factor(self, index: int) -> Any:
        for _ in range(3 if index == 0 else 1):
            drawn = torch.rand(5)
        return drawn < 0.5


class ByNumPy(Records):
    def factor(self, index: int) -> Any:
        return torch.from_numpy(np.random.rand(5).astype("float32"))


class ByPython(Records):
    def factor(self, index: int) -> Any:
        return random.random()


class ByItsOwn(Records):
    def factor(self, index: int) -> Any:
        return float(self.own.random()) * torch.rand((), generator=self.of_torch)


class ByAGlobal(Records):
    def factor(self, index: int) -> Any:
        return float(GENERATOR.random())


class Centred(Records):
    def __getitems__(self, indices: list[int]) -> Any:
        rows = [self[index] for index in indices]
        mean = torch.stack([x for x, _ in rows]).mean(0)
        return [(x - 0.9 * mean if len(rows) > 9 else x, y) for x, y in rows]  # what a small look does not see


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, *scale = batch
        x = F.pad(x, (0, 5 - x.shape[1]))
        return F.cross_entropy(self.net(x / scale[0] if scale else x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Hook(Net):
    """Mixes many, which no look at eight examples sees."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return (x + x.roll(1, 0) if len(x) > 9 else x), y


class NoisyHook(Net):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return x * random.random() + np.random.rand() + torch.rand(()), y


def scaled(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return x, y, float(x.abs().max())


def refilled(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return (x - x[-1:] if len(x) > 9 else x), y


def cut(rows: list[Any]) -> Any:
    """As long as the longest of the batch: records differ in how much of them is there."""
    x, y = default_collate(rows)
    return x[:, : int(y.max()) + 3], y


class Grab(L.Callback):
    def __init__(self) -> None:
        self.sums: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = [p.grad.flatten() for p in pl_module.parameters()]
        self.sums.append(torch.cat(gradients).double() * COUNT)


def sums(
    left_out: set[int], kind: type[Records], collate: Any, module: type[Net], workers: int, **options: Any
) -> list[Tensor]:
    """Of two steps with one key, from which some examples are left out as if they were not there."""
    torch.manual_seed(3)
    private = DifferentialPrivacy(
        noise_multiplier=1e-6, clip_norm=CLIP, expected_batch_size=COUNT, dataset_size=COUNT,
        **{"physical_batch_size": 32, **options},
    )  # fmt: skip
    private.replay = Replay(RandomKey.from_seed(1), OpenStep, frozenset(left_out), frozenset())
    grab = Grab()
    data = DataLoader(kind(), batch_size=4, collate_fn=collate, num_workers=workers)
    trainer(private, grab, max_steps=2).fit(module(), data)
    return grab.sums


def differences(name: str, **options: Any) -> list[Tensor]:
    """What the first example moves in each step, less what it gives by itself: nothing, if all others keep to themselves."""
    nobody: set[int] = set()
    three = (sums(out, *CASES[name], **options) for out in (nobody, {0}, set(range(1, COUNT))))
    return [everybody - others - alone for everybody, others, alone in zip(*three, strict=True)]


CASES: dict[str, tuple[type[Records], Any, type[Net], int]] = {
    **{kind.__name__: (kind, None, Net, 0) for kind in (ByTorch, ByNumPy, ByPython, ByItsOwn, ByAGlobal, Centred)},
    "ByTorch in workers": (ByTorch, None, Net, 2),
    "ByItsOwn in a worker": (ByItsOwn, None, Net, 1),
    "a number of the batch": (Records, scaled, Net, 0),
    "another of the batch": (Records, refilled, Net, 0),
    "the longest of the batch": (Records, cut, Net, 0),
    "a hook that mixes many": (Records, None, Hook, 0),
    "a hook that draws": (Records, None, NoisyHook, 0),
}


ENGINES: dict[bool, tuple[str, ...]] = {False: ("auto", "vmap", "loop"), True: ("auto",)}
"""With workers, which know no engine, one is enough."""


@pytest.mark.parametrize(
    ("name", "engine"), [(name, engine) for name in CASES for engine in ENGINES[CASES[name][3] > 0]]
)
def test_taking_one_example_away_takes_its_own_gradient_away(name: str, engine: Any) -> None:
    assert max(float(moved.norm()) for moved in differences(name, engine=engine)) < 1e-4


def test_the_micro_batch_changes_no_draw() -> None:
    found = [sums(set(), ByNumPy, scaled, NoisyHookWithScale, 0, physical_batch_size=size)[0] for size in (1, 5, 32)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-4)


class NoisyHookWithScale(Net):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y, scale = batch
        return x * random.random(), y, scale


def test_who_vouches_is_taken_at_their_word_and_the_statement_says_so() -> None:
    """The planted mistake of each case above: vouched for, the same hook mixes."""
    for name, word in {
        "a hook that mixes many": "on_after_batch_transfer",
        "another of the batch": "collate_fn",
        "Centred": "__getitems__",
    }.items():
        assert max(float(moved.norm()) for moved in differences(name, row_wise=[word])) > 0.05 * CLIP, name
    private = DifferentialPrivacy(noise_multiplier=1.0, row_wise=["collate_fn"])
    trainer(private, max_steps=1).fit(Net(), DataLoader(Records(), batch_size=4, collate_fn=refilled))
    assert any("vouches for collate_fn" in caveat for caveat in private.statement().caveats)


@pytest.mark.parametrize("given", [["collate"], "collate_fn", [1]])
def test_only_known_names_can_be_vouched_for(given: Any) -> None:
    with pytest.raises(ValueError, match=r"row_wise=.*expected a list"):
        DifferentialPrivacy(noise_multiplier=1.0, row_wise=given)
