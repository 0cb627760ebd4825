"""What an example draws inside training_step does not depend on who else was drawn, on the engine or on the micro-batch."""

from __future__ import annotations

import random
import secrets
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_dp
from lightning_dp import DifferentialPrivacy
from tests.conftest import trainer
from tests.guarantees.test_one_example_at_a_time import Grab

COUNT, CLIP, STEPS = 12, 1.0, 3
IMAGES = torch.randn(COUNT, 5, generator=torch.Generator().manual_seed(1))


class Net(L.LightningModule):
    """Subclasses draw in ``changed``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.own = nn.Linear(5, 8), nn.Linear(8, 3), torch.Generator().manual_seed(4)

    def changed(self, hidden: Tensor) -> Tensor:
        return hidden

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return 4 * F.cross_entropy(self.last(self.changed(self.first(x))), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Dropout(Net):
    def changed(self, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, 0.5)


class SometimesMore(Net):
    """One example draws more than the others."""

    def changed(self, hidden: Tensor) -> Tensor:
        if len(hidden) == 1 and hidden.sum() > 0.5:
            hidden = hidden + torch.randn(8)
        return F.dropout(hidden, 0.5)


class Coin(Net):
    def changed(self, hidden: Tensor) -> Tensor:
        return hidden.flip(1) if torch.rand(()) < 0.5 else hidden * torch.rand(8)


class ByNumPy(Net):
    def changed(self, hidden: Tensor) -> Tensor:
        return hidden * float(np.random.beta(0.4, 0.4))


class ByPython(Net):
    def changed(self, hidden: Tensor) -> Tensor:
        return hidden * random.random()


class ByItsOwn(Net):
    def changed(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rand(8, generator=self.own)


KINDS: tuple[type[Net], ...] = (Dropout, SometimesMore, Coin, ByNumPy, ByPython, ByItsOwn)


def sums(kind: type[Net], count: int, **options: Any) -> list[Tensor]:
    torch.manual_seed(3)
    module = kind()
    L.seed_everything(count, verbose=False)
    private = DifferentialPrivacy(
        noise_multiplier=1e-6, clip_norm=CLIP, expected_batch_size=COUNT, dataset_size=COUNT,
        **{"physical_batch_size": 32, **options},
    )  # fmt: skip
    grab = Grab()
    data = TensorDataset(IMAGES[:count], torch.arange(count) % 3)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)
    trainer(private, grab, max_steps=STEPS).fit(module, DataLoader(data, batch_size=4))
    return grab.sums


QUIET = pytest.mark.filterwarnings(
    "ignore:training_step (draws|takes|changes self.own)", "ignore:engine .* cannot run", "ignore:engine=.auto. took"
)


@QUIET
@pytest.mark.parametrize("engine", ["auto", "ghost", "vmap", "loop"])
@pytest.mark.parametrize("kind", KINDS)
def test_taking_one_example_away_moves_the_sum_by_at_most_the_clip_norm(
    kind: type[Net], engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one secret key, so that both runs make the same draws. The last example is away: the others keep their numbers."""
    monkeypatch.setattr(secrets, "token_bytes", lambda size: bytes(range(size)))
    pairs = zip(*(sums(kind, count, engine=engine) for count in (COUNT, COUNT - 1)), strict=True)
    assert max(float((one - other).norm()) for one, other in pairs) <= CLIP * 1.001


@QUIET
@pytest.mark.parametrize("kind", KINDS)
def test_speed_options_change_no_draw(kind: type[Net], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the micro-batch nor which of the two fast engines runs it, nor padding to one shape."""
    monkeypatch.setattr(secrets, "token_bytes", lambda size: bytes(range(size)))
    found = [
        sums(kind, COUNT, **options)
        for options in (
            {"engine": "ghost"}, {"engine": "vmap"}, {"engine": "ghost", "physical_batch_size": 5},
            {"engine": "vmap", "static_shapes": True, "physical_batch_size": 5},
        )
    ]  # fmt: skip
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-4, atol=1e-4)


@QUIET
@pytest.mark.parametrize("kind", [Dropout, ByNumPy])
def test_another_step_and_another_key_draw_other_numbers(kind: type[Net]) -> None:
    """Nothing moves the weights here, so equal draws would give equal sums. ``seed_everything`` fixes none of it."""
    first, again = sums(kind, COUNT, engine="ghost"), sums(kind, COUNT, engine="ghost")
    assert float((first[0] - first[1]).norm()) > 1e-3
    assert float((first[0] - again[0]).norm()) > 1e-3


@QUIET
@pytest.mark.parametrize("engine", ["auto", "vmap", "loop"])
def test_verify_has_nothing_to_say_of_dropout(engine: Any) -> None:
    torch.manual_seed(3)
    private = DifferentialPrivacy(noise_multiplier=1.0, clip_norm=CLIP, expected_batch_size=6, engine=engine)
    data = DataLoader(TensorDataset(IMAGES, torch.arange(COUNT) % 3), batch_size=4)
    result = lightning_dp.verify(trainer(private, max_steps=STEPS), SometimesMore(), data)
    assert result.ok, str(result)
