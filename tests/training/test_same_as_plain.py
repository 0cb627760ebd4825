"""Modules whose parameters are reached in other ways than through their one name, trained as without privacy.

Without noise and clipping, with every example in every step, the private step is Lightning's own: each engine moves the
weights as a plain Trainer does, or says why it cannot.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from lightning_dp import DifferentialPrivacy, ExponentialMovingAverage
from lightning_dp.engines.select import EngineError
from tests.conftest import loader, trainer, weights

N = 8
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
"""float32: the examples' gradients are added up in another order."""


class Base(L.LightningModule):
    """A small network that is always the same at first."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.build()

    def build(self) -> None:
        self.net = nn.Linear(4, 4)
        self.head = nn.Linear(4, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.head(self.net(batch[0]).tanh()), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)


class Criterion(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("weight", torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return ((self.net(x) - y) ** 2 * self.weight).mean()


class TwoNames(Base):
    """A submodule under two names, with a constant buffer beside it."""

    def build(self) -> None:
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.loss = Criterion(self.net)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.loss(*batch)
        return loss


class ThreeNames(TwoNames):
    """Nested ones, a tied weight, and a recurrent layer."""

    def build(self) -> None:
        self.cell = nn.GRU(4, 4, batch_first=True)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.net[2].weight = self.net[0].weight
        self.loss = Criterion(self.net)
        self.again = nn.ModuleList([self.loss, nn.ModuleDict({"cell": self.cell})])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs, _ = self.again[1]["cell"](batch[0].unsqueeze(1))
        loss: Tensor = self.again[0](outputs.squeeze(1), batch[1])
        return loss


class KeptElsewhere(Base):
    """A weight that the loss reads from a list, beside its layer: torch.func's copies of it are not there."""

    def build(self) -> None:
        super().build()
        self.kept = [self.net.weight]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.3 * sum((w**2).sum() for w in self.kept)


class Reentrant(Base):
    """Adapters behind activation checkpointing, as ``transformers`` made it for long: the graph of the loss hides them."""

    def build(self) -> None:
        super().build()
        self.adapter = nn.Linear(4, 4)
        self.net.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = self.net(batch[0]).requires_grad_()

        def block(x: Tensor) -> Tensor:
            return x + self.adapter(x).tanh()

        hidden = checkpoint(block, x, use_reentrant=True)
        assert isinstance(hidden, Tensor)
        return nn.functional.mse_loss(self.head(hidden), batch[1])


class Masked(Base):
    """Some rows of a weight are held by a hook, others scaled."""

    def build(self) -> None:
        super().build()
        mask = torch.tensor([[0.0], [1.0], [0.5], [0.0]])
        self.net.weight.register_hook(lambda gradient: gradient * mask)
        self.seen: list[Tensor] = []
        self.head.weight.register_post_accumulate_grad_hook(self._halve)

    def _halve(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(0.5)


class Sparse(Base):
    def build(self) -> None:
        super().build()
        self.words = nn.Embedding(5, 4, sparse=True)
        self.table = nn.Parameter(torch.randn(5, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens = (batch[0][:, :3].abs() * 2).long().clamp(max=4)
        more = nn.functional.embedding(tokens, self.table, sparse=True).mean(1)
        return super().training_step((batch[0] + self.words(tokens).sum(1) + more, batch[1]), batch_idx)


def data(targets: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(N, 4, generator=generator), torch.randn(N, targets, generator=generator))


def trained(module: Base, *callbacks: L.Callback, steps: int = 2) -> Base:
    targets = 4 if isinstance(module, TwoNames) else 1
    trainer(*callbacks, max_steps=steps).fit(module, loader(data(targets), batch_size=N))
    return module


def private(engine: Any = "auto", **options: Any) -> DifferentialPrivacy:
    given: dict[str, Any] = {
        "noise_multiplier": 0,
        "clip_norm": float("inf"),
        "expected_batch_size": N,
        "engine": engine,
    }
    return DifferentialPrivacy(**{**given, **options})


EVERY = ("ghost", "vmap", "loop", "auto")
CASES = [
    (TwoNames, EVERY),
    (ThreeNames, EVERY),
    (KeptElsewhere, ("loop", "auto")),
    (Reentrant, ("loop", "auto")),
    (Masked, EVERY),
    (Sparse, EVERY),
]


@pytest.mark.parametrize(("make", "engines"), CASES)
def test_the_weights_move_as_without_privacy(make: type[Base], engines: tuple[str, ...]) -> None:
    plain = trained(make())
    assert not torch.equal(weights(plain), weights(make())), "nothing to compare"
    for engine in EVERY:
        module = make()
        mine = dict(module.named_parameters())
        if engine in engines:
            trained(module, private(engine))
            torch.testing.assert_close(weights(module), weights(plain), **CLOSE, msg=lambda m, e=engine: f"{e}: {m}")
        else:
            with pytest.raises(EngineError, match=f"engine='{engine}' cannot run this training_step"):
                trained(module, private(engine))
            torch.testing.assert_close(weights(module), weights(make()), rtol=0, atol=0)
        assert all(p is mine[name] and p.dtype == torch.float32 for name, p in module.named_parameters())


def test_a_submodule_under_two_names_by_every_other_way() -> None:
    """Sizing, the average of the weights, clipping and noise: nothing of them leaves a trace in the module."""
    module = TwoNames()
    mine = dict(module.named_parameters())
    average = ExponentialMovingAverage(decay=0.9)
    trained(module, private(clip_norm=1.0, noise_multiplier=1.0, physical_batch_size="auto"), average)
    assert all(p is mine[name] and p.dtype == torch.float32 for name, p in module.named_parameters())
    assert sorted(module.state_dict()) == sorted(TwoNames().state_dict())
