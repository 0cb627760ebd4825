"""Run as a script: trains with 1, 2, 3 (and 4) gloo ranks and saves what each run gave. Used by test_ranks.py."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy, ExponentialMovingAverage
from lightning_dp.batches.transforms import ViewTransform
from lightning_dp.optim import DPMicroAdam
from tests.conftest import Regressor, loader, regression_data, regressor, trainer, weights
from tests.ranks.warm import train_once
from tests.training.manual_modules import gan


class Mute(Regressor):
    """Its gradient is zero, so a step of SGD with rate 1 shows the released noise itself."""

    def __init__(self) -> None:
        super().__init__(hidden=40_000, lr=1.0)  # four blocks of coordinates

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.0 * super().training_step(batch, batch_idx)


class ZeroRedundant(Regressor):
    """Adam, whose state the ranks divide among themselves where there are several."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.trainer.world_size == 1:
            return torch.optim.Adam(self.parameters(), lr=0.05)
        return ZeroRedundancyOptimizer(self.parameters(), torch.optim.Adam, lr=0.05)


class Synchronised(Regressor):
    """Logs with sync_dist, which is a collective call: every rank must make it or none."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(batch[0]).squeeze(-1), batch[1])
        self.log("train/loss", loss, sync_dist=True, on_step=True, on_epoch=True)
        return loss


class OwnOrder(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        order = torch.randperm(64, generator=torch.Generator().manual_seed(self.trainer.global_rank))
        return loader(torch.utils.data.Subset(regression_data(), order.tolist()))


class FrozenOnOne(Regressor):
    def setup(self, stage: str) -> None:
        self.net[0].bias.requires_grad_(self.trainer.global_rank != 1)


class Validated(Regressor):
    """Validates on 48 examples, which two and three ranks share evenly."""

    def val_dataloader(self) -> Any:
        return loader(regression_data(48, seed=4), 8)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", torch.nn.functional.mse_loss(self.net(batch[0]).squeeze(-1), batch[1]), sync_dist=True)


def refuse_disagreement(folder: Path, ranks: int, module: L.LightningModule, data: Any) -> None:
    fit = on_ranks(ranks, max_steps=2)
    fit.callbacks.append(DifferentialPrivacy(noise_multiplier=1.0))
    try:
        fit.fit(module, datamodule=data) if data is not None else fit.fit(module, loader())
    except Exception as error:
        (folder / f"refusal-{type(module).__name__}-{ranks}.txt").write_text(str(error))


class Shift(ViewTransform):
    """Views of a vector."""

    draws = 4

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        return images + uniforms


def on_ranks(ranks: int, **options: Any) -> Any:
    strategy = options.pop("strategy", "ddp_fork")
    return trainer(devices=ranks, strategy="auto" if ranks == 1 else strategy, **options)


def run(folder: Path, case: str, ranks: int) -> None:
    module: Any = None
    torch.manual_seed(0)  # the same initial weights at every number of ranks
    if case == "equal":
        module = regressor()
        private = DifferentialPrivacy(noise_multiplier=0.5, clip_norm=0.3, seed=7, expected_batch_size=16)
        fit = on_ranks(ranks, max_steps=6)
    elif case == "by_name":
        module = regressor()
        private = DifferentialPrivacy(noise_multiplier=0.5, clip_norm=0.3, seed=7, expected_batch_size=16)
        fit = on_ranks(ranks, max_steps=6, strategy="private_ddp_fork")
    elif case == "different_start":  # every rank would initialise differently: rank 0's weights must win
        module = regressor()
        module.on_fit_start = lambda: None
        module.setup = lambda stage: torch.nn.init.constant_(module.net[0].bias, 0.1 * module.trainer.global_rank)
        private = DifferentialPrivacy(noise_multiplier=0.5, clip_norm=0.3, seed=7, expected_batch_size=16)
        fit = on_ranks(ranks, max_steps=6)
    elif case == "filtered":  # and an optimizer that looks for the largest coordinates
        module = regressor()
        module.configure_optimizers = lambda: DPMicroAdam(module.parameters(), lr=0.01, density=0.3)
        private = DifferentialPrivacy(
            noise_multiplier=0.5, clip_norm=0.3, seed=7, expected_batch_size=16, gradient_filter="disk"
        )
        fit = on_ranks(ranks, max_steps=6)
    elif case == "noise":
        module = Mute()
        private = DifferentialPrivacy(noise_multiplier=2.0, clip_norm=0.5, expected_batch_size=16)
        fit = on_ranks(ranks, max_steps=1)
    elif case == "zero":
        module = ZeroRedundant()
        private = DifferentialPrivacy(noise_multiplier=0.5, clip_norm=0.3, seed=7, expected_batch_size=16)
        fit = on_ranks(ranks, max_steps=6)
    elif case == "storm":  # about one example a step: most ranks are empty most of the time
        module = Synchronised(lr=0.02)
        private = DifferentialPrivacy(noise_multiplier=0.5, seed=7, expected_batch_size=1)
        fit = on_ranks(ranks, max_steps=30)
    elif case == "views":
        module = regressor()
        private = DifferentialPrivacy(noise_multiplier=0.5, clip_norm=0.3, seed=7, expected_batch_size=16)
        fit = on_ranks(ranks, max_steps=6)
        fit.callbacks.append(AugmentationMultiplicity(k=3, transform=Shift(), images=0))
    elif case == "styled":  # everything at once: layers, views, padding, book-keeping
        module = regressor()
        private = DifferentialPrivacy(
            noise_multiplier=0.5, clip_norm=0.3, seed=7, expected_batch_size=16, clipping="per_layer", engine="ghost",
            static_shapes=True, physical_batch_size=5,
        )  # fmt: skip
        fit = on_ranks(ranks, max_steps=6)
        fit.callbacks.append(AugmentationMultiplicity(k=3, transform=Shift(), images=0))
    elif case == "measured":  # every rank finds a size, and all take the least of them
        module = regressor()
        private = DifferentialPrivacy(
            noise_multiplier=0.5, clip_norm=0.3, seed=7, expected_batch_size=16, clipping="automatic",
            static_shapes=True, physical_batch_size="auto",
        )  # fmt: skip
        fit = on_ranks(ranks, max_steps=6)
    elif case == "adapted":  # about three examples a step: now and then a rank has none that says anything of C
        module = regressor()
        private = DifferentialPrivacy(
            noise_multiplier=0.5, clip_norm=0.3, seed=7, expected_batch_size=3, clipping="quantile"
        )  # fmt: skip
        fit = on_ranks(ranks, max_steps=6)
    elif case == "users":  # twelve, with three to six examples, of which four take part
        module = regressor()
        private = DifferentialPrivacy(
            noise_multiplier=0.5, clip_norm=0.3, seed=7, expected_batch_size=5, max_examples_per_unit=4,
            privacy_unit=[index * index % 23 for index in range(64)],
        )  # fmt: skip
        fit = on_ranks(ranks, max_steps=6)
    elif case == "simulated":
        module = regressor()
        private = DifferentialPrivacy(
            noise_multiplier=2.0, clip_norm=0.3, seed=7, expected_batch_size=32, simulate=4, max_batch_size=63
        )
        fit = on_ranks(ranks, max_steps=6)
    elif case == "secret":
        module = regressor()
        private = DifferentialPrivacy(noise_multiplier=0.5)
        fit = on_ranks(ranks, max_steps=3)
    elif case == "gan":
        module = gan()
        private = DifferentialPrivacy(noise_multiplier=0.5, clip_norm=0.3, seed=7, public_optimizers=[0])
        fit = on_ranks(ranks, max_steps=6)
    elif case == "raw":  # every validation twice, on the average and on the weights as trained
        module = Validated()
        private = DifferentialPrivacy(noise_multiplier=0.5, clip_norm=0.3, seed=7, expected_batch_size=16)
        fit = on_ranks(ranks, max_steps=8)
        fit.callbacks.append(ExponentialMovingAverage(0.9, validate_raw=True))
    elif case == "disagree":  # as after a random split that each rank seeds for itself
        refuse_disagreement(folder, ranks, regressor(), OwnOrder())
        return
    elif case == "frozen_on_one":
        refuse_disagreement(folder, ranks, FrozenOnOne(), None)
        return
    else:
        raise ValueError(case)
    before = weights(module)
    state: dict[str, Any] = {}

    def remember() -> None:
        rank = module.trainer.global_rank
        state.update(weights=weights(module).cpu(), before=before, plan_batch=private.plan.expected_batch_size)
        optimizer = module.trainer.optimizers[0]
        state["optimizer"] = sum(len(s) for s in getattr(optimizer, "optim", optimizer).state.values())
        state.update(steps=private.ledger.steps, epsilon=private.statement().epsilon)
        state.update(physical_batch_size=module.trainer.strategy.private_fit.planned.loader.physical_batch_size)
        state.update(metrics={name: float(value) for name, value in module.trainer.callback_metrics.items()})
        torch.save(state, folder / f"{case}-{ranks}-{rank}.pt")

    module.on_train_end = remember
    fit.callbacks.append(private)
    fit.fit(module, loader(regression_data()))
    home = {"steps": private.ledger.steps, "epsilon": private.statement().epsilon, "weights": weights(module)}
    torch.save(home, folder / f"{case}-{ranks}-home.pt")


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    os.chdir(sys.argv[1])
    train_once()
    for case in sys.argv[2].split(","):
        for ranks in (1, 2, 3, 4) if case == "noise" else (1, 2, 3):
            run(Path(sys.argv[1]), case, ranks)
