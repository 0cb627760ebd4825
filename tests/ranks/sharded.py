"""Run as a script: trains modules that FSDP2 shards over two gloo ranks, and saves what each run gave."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from lightning_dp import DifferentialPrivacy, ExponentialMovingAverage
from lightning_dp.optim import DPAdamW
from tests.conftest import Regressor, loader, trainer
from tests.guarantees import mutations
from tests.guarantees import mutations_sharded as sharded_mutations
from tests.ranks import layerwise, sharded_optimizers
from tests.ranks.warm import train_once

RANKS = 2
STATES = ("momentum_buffer", "exp_avg", "error")
TORCHRUN = {"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
ENGINES = ("ghost", "vmap", "loop")
BUGS = {
    "two_ranks_add_one_share": mutations.two_ranks_add_one_share,
    "one_share_without_noise": mutations.one_share_without_noise,
    "shards_are_averaged": sharded_mutations.shards_are_averaged,
    "own_shard_without_the_others": sharded_mutations.own_shard_without_the_others,
}


class Sharded(Regressor):
    """Rows that two ranks cannot share equally, a layer of one row, a frozen layer, and nested shards."""

    def __init__(self, hidden: int = 7, **policies: Any) -> None:
        super().__init__(lr=0.3)
        self.net, self.hidden, self.policies = None, hidden, policies
        self.trains_all = False

    def configure_model(self) -> None:
        if self.net is not None:
            return
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(4, self.hidden), nn.Tanh(), nn.Linear(self.hidden, 5), nn.GroupNorm(1, 5), nn.Linear(5, 1)
            )
        self.net[3].requires_grad_(self.trains_all)
        if self.device_mesh is not None:
            self.shard(self.device_mesh["data_parallel"])

    def shard(self, mesh: Any) -> None:
        fully_shard(self.net[0], mesh=mesh, **self.policies)
        fully_shard(self.net, mesh=mesh, **self.policies)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)


class Adaptive(Sharded):
    """With an optimizer that knows the noise, or another."""

    def __init__(self, kind: Any = DPAdamW) -> None:
        super().__init__()
        self.kind = kind

    def configure_optimizers(self) -> Any:
        return self.kind([p for p in self.parameters() if p.requires_grad], lr=0.03)


class Mute(Sharded):
    """Its gradient is zero, so a step of SGD with rate 1 shows the released noise itself."""

    def __init__(self) -> None:
        super().__init__(hidden=15_000)  # three blocks of coordinates
        self.lr, self.trains_all = 1.0, True

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.0 * super().training_step(batch, batch_idx)


class Odd(Sharded):
    """Tied layers that share a group, dropout, and the LightningModule itself as the outermost shard."""

    def configure_model(self) -> None:
        if self.net is not None:
            return
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(4, 4),
                nn.Tanh(),
                nn.Linear(4, 4),
                nn.Linear(4, 3),
                nn.LayerNorm(3),
                nn.Linear(3, 1),
            )
        self.net[2].weight = self.net[0].weight
        if self.device_mesh is not None:
            mesh = self.device_mesh["data_parallel"]
            fully_shard([self.net[0], self.net[2]], mesh=mesh)
            fully_shard(self.net[4], mesh=mesh)
            fully_shard(self, mesh=mesh)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss, "weight": self.net[0].weight}


class Manual(Sharded):
    automatic_optimization = False


class Looking(Sharded):
    """A hook that calls the module between its step and its backward pass."""

    def on_before_backward(self, loss: Tensor) -> None:
        with torch.no_grad():
            self.net(torch.zeros(2, 4))


class HalfSharded(Sharded):
    def shard(self, mesh: Any) -> None:
        fully_shard(self.net[0], mesh=mesh)


def strategy_of(ranks: int, full: bool = False) -> Any:
    sharding = ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=not full)
    return {"devices": ranks, "strategy": sharding} if ranks > 1 else {"devices": 1}


def private(**options: Any) -> DifferentialPrivacy:
    given = {"noise_multiplier": 0.5, "clip_norm": 0.3, "seed": 7, "expected_batch_size": 16}
    return DifferentialPrivacy(**{**given, **options})


def fit(
    case: str,
    folder: Path,
    ranks: int,
    dp: DifferentialPrivacy,
    *,
    module: Any = None,
    ckpt: Any = None,
    val: Any = None,
    **options: Any,
) -> L.Trainer:
    """Train and save the whole weights at the end, and how much of it this rank kept."""
    module = module or Sharded()
    kept: dict[str, Any] = {}

    def start() -> None:
        kept["before"] = whole_weights(module)

    def remember() -> None:
        optimizer = module.trainer.optimizers[0]
        kept["kept"] = sum(local(p).numel() for p in module.parameters())
        kept["state"] = sum(
            local(next(s[name] for name in STATES if name in s)).numel() for s in optimizer.state.values()
        )
        kept["after"] = whole_weights(module)
        kept["carried"] = dp.state_dict()["mechanism"]
        kept["steps"], kept["epsilon"] = dp.ledger.steps, dp.statement().epsilon
        kept["val"] = float(module.trainer.callback_metrics.get("val/loss", 0.0))
        torch.save(kept, folder / f"{case}-{ranks}-{module.trainer.global_rank}.pt")

    module.on_train_start, module.on_train_end = start, remember
    fitted = trainer(*options.pop("callbacks", []), dp, **{"max_steps": 6, **strategy_of(ranks), **options})
    fitted.fit(module, loader(), val, ckpt_path=ckpt)
    return fitted


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_weights(module: nn.Module) -> Tensor:
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([part.detach().clone().flatten() for part in parts])


def refusal(case: str, folder: Path, module: Any, *, callbacks: Any = (), dp: Any = None, **options: Any) -> None:
    try:
        trainer(*callbacks, private(**dp or {}), **{"max_steps": 2, **strategy_of(RANKS), **options}).fit(
            module, loader()
        )
    except Exception as error:
        if int(os.environ["RANK"]) == (case == "layer_reorders"):
            (folder / f"refusal-{case}.txt").write_text(f"{type(error).__name__}: {error}")


def run(folder: Path, ranks: int) -> None:
    """Everything that is compared between one process and two."""
    for engine in ENGINES:
        fit(engine, folder, ranks, private(engine=engine))
    fit("odd", folder, ranks, private(), module=Odd())
    for style in ("quantile", "slaclip"):
        fit(style, folder, ranks, private(clipping=style))
    fit("validated", folder, ranks, private(), val=loader(), val_check_interval=2, check_val_every_n_epoch=None)
    fit("secure", folder, ranks, private(seed=None, secure=True), max_steps=2)
    fit("adamw", folder, ranks, private(), module=Adaptive())
    fit("users", folder, ranks, private(expected_batch_size=8, privacy_unit=[i // 3 for i in range(64)]))
    if ranks == RANKS:
        fit("looked_at", folder, ranks, private(), module=Looking())
        fit("by_name", folder, ranks, private(), strategy="private_fsdp")
    for kind in ("full", "shards") if ranks == RANKS else ("full",):
        options = strategy_of(ranks, full=kind == "full")
        half = fit(f"{kind}_half", folder, ranks, private(), max_steps=3, **options)
        half.save_checkpoint(folder / f"{kind}-{ranks}.ckpt")
        options = strategy_of(ranks, full=kind == "full")
        fit(f"{kind}_resumed", folder, ranks, private(), ckpt=folder / f"{kind}-{ranks}.ckpt", **options)
    if ranks == RANKS:
        half = fit("adamw_half", folder, ranks, private(), module=Adaptive(), max_steps=3, **strategy_of(ranks))
        half.save_checkpoint(folder / "adamw.ckpt")
        fit("adamw_resumed", folder, ranks, private(), module=Adaptive(), ckpt=folder / "adamw.ckpt")
    layerwise.run(fit, private, Mute, folder, ranks)
    sharded_optimizers.run(fit, private, Adaptive, folder, ranks)
    if ranks == RANKS:
        for name in BUGS:
            with BUGS[name]():
                fit(name, folder, ranks, private(noise_multiplier=2.0, clip_norm=0.5), module=Mute(), max_steps=1)
        fit("noise", folder, ranks, private(noise_multiplier=2.0, clip_norm=0.5), module=Mute(), max_steps=1)
        with sharded_mutations.whole_parameters_are_kept():
            fit("stale", folder, ranks, private())
        with sharded_mutations.planned_before_the_checkpoint_is_read():
            apart = {"default_root_dir": folder / "forgotten"}  # or its steps would be found, and counted as lost
            fit("forgotten", folder, ranks, private(), ckpt=folder / "shards-2.ckpt", **apart)
        refusals(folder)


def refusals(folder: Path) -> None:
    refusal("tensor_parallel", folder, Sharded(), strategy=ModelParallelStrategy())
    refusal("filter", folder, Sharded(), dp={"gradient_filter": "disk"}, strategy="private_fsdp_by_layer")
    refusal("not_sharded", folder, HalfSharded())
    refusal("mp_policy", folder, Sharded(mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)))
    refusal("placement", folder, Sharded(shard_placement_fn=lambda p: Shard(1) if p.shape == (7, 4) else Shard(0)))
    refusal("average", folder, Sharded(), callbacks=[ExponentialMovingAverage()])
    refusal("manual", folder, Manual())
    refusal("clip", folder, Sharded(), gradient_clip_val=1.0)
    for name, case in layerwise.refused().items():
        refusal(name, folder, **case)


def in_shards() -> dict[str, Any]:
    return {"devices": 1, "strategy": ModelParallelStrategy(1, 1)}


def rank(number: int, folder: Path, port: int) -> None:
    """One of two processes, as torchrun would start it."""
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS), **TORCHRUN,
        MASTER_PORT=str(port),
    )  # fmt: skip
    run(folder, RANKS)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.chdir(sys.argv[1])
    train_once()
    to = Path(sys.argv[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    several = [get_context("fork").Process(target=rank, args=(number, to, port)) for number in range(RANKS)]
    for process in several:
        process.start()
    run(to, 1)
    for process in several:
        process.join()
    if any(process.exitcode for process in several):
        sys.exit(1)
    fit("full_resumed_alone", to, 1, private(), ckpt=to / "full-2.ckpt")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", **TORCHRUN, MASTER_PORT=str(port))
    fit("shards_resumed_alone", to, 1, private(), ckpt=to / "shards-2.ckpt", **in_shards())
    fit(
        "disk_resumed_alone", to, 1, private(gradient_filter="disk"),
        module=Adaptive(sharded_optimizers.sgd), ckpt=to / "disk.ckpt", **in_shards(),
    )  # fmt: skip
