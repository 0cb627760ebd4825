"""Cases of tests/ranks/sharded.py in which parameters are brought together layer by layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from lightning_dp import DifferentialPrivacy, PrivateModelParallelStrategy
from lightning_dp import run as run_module
from lightning_dp.look.engine_check_in_shards import select_in_shards
from lightning_dp.ranks import lost_ranks
from tests.conftest import Regressor
from tests.guarantees import mutations_layerwise as bugs
from tests.guarantees.mutations import patched

Fit = Callable[..., Any]

NOISE_BUGS = {
    "layer_without_noise": bugs.no_shard_gets_noise,
    "layer_noise_twice": bugs.noise_is_added_twice,
    "layer_same_noise": bugs.every_shard_gets_the_same_noise,
}
SUM_BUGS = {
    "layer_forgets_idle": bugs.an_idle_rank_forgets_what_it_receives,
    "layer_one_pass_alone": bugs.the_last_pass_alone_counts,
}
NOISY = {"noise_multiplier": 2.0, "clip_norm": 0.5}
FEW = {"expected_batch_size": 2}


class Block(Regressor):
    """Layers with and without a rule, a frozen one between trained ones, a tied one, and rows that ranks share unequally."""

    def __init__(self) -> None:
        super().__init__(lr=0.3)
        self.net = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.ModuleList([nn.Linear(4, 7), nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 1)])
            self.conv, self.slope = nn.Conv1d(1, 3, 2), nn.Parameter(torch.ones(3, 1))
        self.net[2].weight = self.net[1].weight
        self.net[1].requires_grad_(self.net_trained)
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            fully_shard([self.net[1], self.net[2]], mesh=mesh)
            fully_shard(self, mesh=mesh)

    net_trained = True

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.net[0](inputs))
        if self.uses_the_middle():
            hidden = hidden + torch.tanh(self.net[2](torch.tanh(self.net[1](hidden))))
        folded = (self.conv(hidden.unsqueeze(1)) * self.slope).mean((1, 2))
        return self.net[3](hidden).squeeze(-1) + folded

    def uses_the_middle(self) -> bool:
        return True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)


class Thaws(Block):
    """Frozen layers are trained from the fourth step on."""

    net_trained = False

    def on_train_batch_start(self, *_: Any) -> None:
        if self.global_step == 3:
            self.net[1].requires_grad_(True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Mixed(Block):
    """A frozen layer, layers left out at every other step, examples that go different ways, and a loss with a weight in it.

    That weight is then whole for the step, for it gets a gradient for each example.
    """

    net_trained = False

    def uses_the_middle(self) -> bool:
        return self.global_step % 2 == 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx) + self.net[3].weight.square().sum()
        return 2.0 * loss if batch[0].sum() > 0.5 else loss


class Reorders(Block):
    """From the third step on the last layer runs first, on one rank."""

    def forward(self, inputs: Tensor) -> Tensor:
        early = self.net[3](torch.zeros(7)) if self.global_step >= 2 and os.environ.get("RANK") == "1" else 0.0
        return super().forward(inputs) + early


class Reads(Block):
    """Its loss looks at a weight without calling the layer, and so that the engine sees no gradient of it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.net[0].weight.detach().square().sum()


SAME = {"block": Block, "mixed": Mixed, "thaws": Thaws}


@contextmanager
def noted() -> Iterator[list[bool]]:
    """Whether the engine was found without whole parameters."""
    tried: list[bool] = []

    def select(*arguments: Any) -> Any:
        found = select_in_shards(*arguments)
        tried.append(found is not None)
        return found

    with patched((run_module, "select_in_shards", select)):
        yield tried


def by_layer(ranks: int) -> dict[str, Any]:
    strategy = PrivateModelParallelStrategy(ranks, gather="layer")
    return {"devices": ranks, "strategy": strategy} if ranks > 1 else {"devices": 1}


def run(fit: Fit, private: Callable[..., DifferentialPrivacy], mute: Any, folder: Path, ranks: int) -> None:
    """What one process and several have to agree on, and what must not go unnoticed."""

    def case(name: str, module: Any, dp: DifferentialPrivacy | None = None, **options: Any) -> Any:
        return fit(name, folder, ranks, dp or private(), module=module, **{**by_layer(ranks), **options})

    for name, module in SAME.items():
        with noted() as tried:
            case(f"layer_{name}", module())
        torch.save(tried, folder / f"tried-{name}-{ranks}.pt")
    case("layer_slaclip", Block(), private(clipping="slaclip"))
    uneven = 1 + int(os.environ["RANK"]) if ranks > 1 else None
    case("layer_few", Block(), private(**FEW, physical_batch_size=uneven), max_steps=12)
    case("layer_quantile", Block(), private(**FEW, physical_batch_size=uneven, clipping="quantile"), max_steps=8)
    if ranks == 1:
        return
    fit("thaws", folder, ranks, private(), module=Thaws())
    half = case("layer_half", Block(), max_steps=3)
    half.save_checkpoint(folder / "layer-half.ckpt")
    case("layer_resumed", Block(), ckpt=folder / "layer-half.ckpt")
    case("layer_noise", mute(), private(**NOISY), max_steps=1)
    for name, bug in NOISE_BUGS.items():
        with bug():
            case(name, mute(), private(**NOISY), max_steps=1)
    for name, bug in SUM_BUGS.items():
        with bug():
            case(name, Block(), private(**FEW, physical_batch_size=uneven), max_steps=12)


def refused() -> dict[str, dict[str, Any]]:
    """Case → what :func:`tests.ranks.sharded.refusal` is given."""
    lost_ranks.PATIENCE = timedelta(seconds=1)  # for the one that goes on when the other has given up
    rank = int(os.environ["RANK"])
    by_one = PrivateModelParallelStrategy(2, gather=("step", "layer")[rank])
    cases: dict[str, dict[str, Any]] = {
        "layer_on_one": {"strategy": by_one},
        "layer_engine_on_one": {"dp": {"engine": ("ghost", "loop")[rank]}},
        "layer_engine": {"dp": {"engine": "vmap"}},
        "layer_secure": {"dp": {"seed": None, "secure": True}},
        "layer_reads": {"module": Reads()},
        "layer_reorders": {"module": Reorders(), "max_steps": 4},
    }
    return {name: {"module": Block(), **by_layer(2), **case} for name, case in cases.items()}
