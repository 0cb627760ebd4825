"""A contract for each private name of Lightning: where it is, and that nobody else in the package knows it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities import cloud_io, distributed
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.overrides import distributed as overrides
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, launchers
from torch import nn
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

import lightning_dp
from lightning_dp import PreflightError, lightning_internals
from lightning_dp.lightning_internals import KEPT_BY_LIGHTNING, METRICS, PROGRESS, PURPOSES, LightningMovedError
from lightning_dp.look.trainer import check_strategy
from tests.conftest import Regressor, loader, trainer


def connector() -> Any:
    return trainer()._logger_connector


WHERE: dict[str, Callable[[], Any]] = {
    "_DatasetSamplerWrapper": lambda: distributed,
    "_IndexBatchSamplerWrapper": lambda: overrides,
    "_MultiProcessingLauncher": lambda: launchers.multiprocessing,
    "_apply_batch_transfer_handler": pl.LightningModule,
    "_average_model": WeightAveraging,
    "_callback_metrics": connector,
    "_checkpoint_io": SingleDeviceStrategy,
    "_combined_loader": lambda: trainer().fit_loop,
    "_compiler_ctx": pl.LightningModule,
    "_current_fx_name": pl.LightningModule,
    "_data_parallel_size": ModelParallelStrategy,
    "_default_root_dir": trainer,
    "_ddp_comm_hook": DDPStrategy,
    "_ddp_comm_state": DDPStrategy,
    "_is_local_file_protocol": lambda: cloud_io,
    "_lightning_optimizers": SingleDeviceStrategy,
    "_logged_metrics": connector,
    "_logger_connector": trainer,
    "_model_averaging_period": DDPStrategy,
    "_on_before_batch_transfer": pl.LightningModule,
    "_param_requires_grad_state": pl.LightningModule,
    "_progress_bar_metrics": connector,
    "_results": trainer,
    "_root_device": SingleDeviceStrategy,
    "_sampler": lambda: distributed._DatasetSamplerWrapper(SequentialSampler(range(3))),
    "_seen_batches_per_dataloader": lambda: trainer().fit_loop.epoch_loop.val_loop,
    "_sync_module_states": lambda: overrides,
    "_tensor_parallel_size": ModelParallelStrategy,
}


@pytest.mark.parametrize("name", sorted(PURPOSES))
def test_lightning_still_has_the_name(name: str) -> None:
    assert name in WHERE, f"no contract says where Lightning has {name}"
    owner = WHERE[name]()
    owner = owner() if inspect.isclass(owner) else owner
    assert hasattr(owner, name), f"lightning {pl.__version__} no longer has {name}, by which {PURPOSES[name]}"


def test_a_contract_is_for_a_name_that_is_used() -> None:
    assert WHERE.keys() <= PURPOSES.keys()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: lightning_internals.attribute(object(), "_ddp_comm_hook"), "object._ddp_comm_hook"),
        (lambda: lightning_internals.imported("lightning.pytorch", "_sync_module_states"), "lightning.pytorch._sync_"),
        (lambda: lightning_internals.imported("lightning.moved", "_sync_module_states"), "lightning.moved._sync_"),
        (lambda: lightning_internals.set_device(object(), torch.device("cpu")), "object._root_device"),
    ],
)
def test_a_name_that_has_moved_is_said(call: Callable[[], Any], name: str) -> None:
    with pytest.raises(
        LightningMovedError, match=rf"no longer has {re.escape(name)}.*, by which .*expected lightning>=2.6"
    ):
        call()


def test_ddp_arguments_that_could_not_be_honoured_are_found_or_missed_aloud() -> None:
    check_strategy(DDPStrategy(), (DDPStrategy,))
    for arguments in ({"ddp_comm_hook": print}, {"ddp_comm_state": object()}, {"model_averaging_period": 4}):
        with pytest.raises(PreflightError, match=rf"DDPStrategy\({next(iter(arguments))}=...\): expected none"):
            check_strategy(DDPStrategy(**arguments), (DDPStrategy,))
    for name in ("_ddp_comm_hook", "_ddp_comm_state", "_model_averaging_period"):
        strategy = DDPStrategy()
        del strategy.__dict__[name]
        with pytest.raises(LightningMovedError, match=rf"DDPStrategy.{name}, by which .* is refused"):
            check_strategy(strategy, (DDPStrategy,))


def test_what_the_names_do() -> None:
    module, inner = Regressor(), RandomSampler(range(4))
    wrapped = distributed.DistributedSamplerWrapper(inner, num_replicas=1, rank=0)
    assert lightning_internals.sampler_within(wrapped) is inner
    assert lightning_internals.sampler_within(inner) is inner
    indexed = lightning_internals.index_batch_samplers()[0](BatchSampler(inner, 2, False))
    assert isinstance(indexed, overrides._IndexBatchSamplerWrapper)
    assert lightning_internals.has_no_loader_yet(trainer())
    assert lightning_internals.wrapped_optimizers(SingleDeviceStrategy()) == []
    assert lightning_internals.current_hook(module) is None
    assert {"_param_requires_grad_state", "_current_fx_name", "_trainer", "log"} <= KEPT_BY_LIGHTNING
    assert lightning_internals.is_local("/tmp")
    assert not lightning_internals.is_local("memory://runs")
    strategy = ModelParallelStrategy(tensor_parallel_size=1)
    lightning_internals.share_over(strategy, 4)
    assert strategy._data_parallel_size == 4
    single = SingleDeviceStrategy()
    lightning_internals.set_device(single, torch.device("meta"))
    assert single.root_device == torch.device("meta")
    assert {name: type(getattr(connector(), name)) for name in METRICS} == dict.fromkeys(METRICS, dict)
    assert all(hasattr(trainer().fit_loop.epoch_loop.val_loop, name) for name in PROGRESS)


def test_self_optimizers_are_the_wrapped_ones() -> None:
    fitted = Regressor()
    made = trainer()
    made.fit(fitted, loader())
    assert all(isinstance(one, LightningOptimizer) for one in lightning_internals.wrapped_optimizers(made.strategy))
    assert lightning_internals.wrapped_optimizers(made.strategy)[0] is fitted.optimizers()


class Counts(Regressor):
    """Logs the step's number after each step, by ``self.log`` or in the shorter way."""

    def __init__(self, shorter: bool) -> None:
        super().__init__()
        self.shorter, self.seen, self.again = shorter, [], 0

    def on_train_batch_end(self, *_: Any) -> None:
        step = float(self.trainer.global_step)
        if self.shorter and lightning_internals.logged_again(self, "count", step):
            self.again += 1
        else:
            self.log("count", step, prog_bar=True, batch_size=1)
        metrics = self.trainer.callback_metrics, self.trainer.progress_bar_metrics
        self.seen.append([float(found["count"]) for found in metrics])

    def on_train_epoch_end(self) -> None:
        self.seen.append(sorted(self.trainer.callback_metrics))


class ByItself(Counts):
    """With a ``log`` of its own, which has to be called."""

    def log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        super().log(name, value + 100.0, *args, **options)


def test_a_number_that_is_logged_again_is_found_wherever_the_first_one_was(tmp_path: Path) -> None:
    found = []
    for shorter in (False, True):
        torch.manual_seed(0)
        fitted, logger = Counts(shorter), CSVLogger(tmp_path / str(shorter))
        trainer(max_steps=-1, max_epochs=2, log_every_n_steps=2, logger=logger).fit(fitted, loader())
        found.append((fitted.seen, (Path(logger.log_dir) / "metrics.csv").read_text()))
    assert found[0] == found[1]
    assert fitted.again == len(loader()) * 2 - 2, "once an epoch the whole way"
    fitted = ByItself(shorter=True)
    trainer(max_steps=3).fit(fitted, loader())
    assert fitted.seen[:3] == [[101.0, 101.0], [102.0, 102.0], [103.0, 103.0]]
    assert not fitted.again


PACKAGE = Path(lightning_dp.__file__).parent
LIGHTNING = Path(lightning.__file__).parent

OWN = {
    "_capture", "_compute", "_computed", "_dtype", "_error", "_group", "_iterator", "_lock", "_metrics", "_module", "_name",
    "_offset", "_parser", "_process_dataloader", "_records", "_run", "_schedule", "_start", "_step", "_strategy", "_trainer",
    "_world_size",
}  # fmt: skip
"""Names of this package's own attributes and functions that Lightning happens to use too."""

TORCH = {"_backward_hooks", "_forward_cache", "_modules", "_version"} | set(vars(nn.Module()))
"""Names of torch and torchmetrics that Lightning uses too."""

ELSEWHERE = {("engines/uncompiled.py", "_compiler_ctx")}
"""Engines know modules of torch, and not who wrote their classes; the attribute is only there on Lightning's."""


def private(name: str) -> bool:
    return bool(re.fullmatch(r"_[A-Za-z]\w*", name))


def names_in(folder: Path) -> set[str]:
    """Every private name that the sources in a folder define or set."""
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return {name for name in found if private(name)}


def names_used(tree: ast.Module) -> Iterator[str]:
    """Every private name that a file defines, imports, reads or sets as an attribute, or has as a string."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) | ast.FunctionDef(name=name) | ast.Constant(value=str(name)) if private(name):
                yield name
            case ast.ImportFrom(module=module, names=imported) if (module or "").startswith(("lightning.", "torch")):
                yield from (one.name for one in imported if private(one.name))


def test_no_other_module_knows_a_private_name_of_lightning() -> None:
    theirs = names_in(LIGHTNING) - OWN - TORCH
    assert PURPOSES.keys() <= theirs
    found = {
        (str(path.relative_to(PACKAGE)), name)
        for path in PACKAGE.rglob("*.py")
        if path.name != "lightning_internals.py"
        for name in names_used(ast.parse(path.read_text()))
        if name in theirs
    }
    assert found == ELSEWHERE, "put the name into lightning_internals.py, with its purpose and a contract"
