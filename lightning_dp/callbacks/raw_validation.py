"""Validation on the weights as trained, before the one on their average."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from typing_extensions import override

from lightning_dp.lightning_internals import METRICS, PROGRESS, attribute, connector_of

RAW = "_raw"
"""What the name of a metric ends with if it was computed on the weights as trained."""

_OF_A_LOADER = "/dataloader_idx_"


class RawValidation:
    """Runs every validation of a fit twice: first on the weights as they are, then as ever.

    The first run is the module's alone: no callback sees it, nothing reaches a logger, and random generators, progress and
    metrics are put back, so that the second is what it would have been. It has the batches and the hooks of the module that
    the second one has, on every rank.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[Tensor, bool]] = {}

    def begin(self, trainer: pl.Trainer) -> None:
        """From here on each validation of this fit is preceded by one on the weights as they are."""
        self.end(trainer)
        loop = trainer.fit_loop.epoch_loop.val_loop
        vars(loop)["run"] = partial(self._twice, trainer, loop.run)

    def end(self, trainer: pl.Trainer) -> None:
        """Leave the Trainer as it was found."""
        vars(trainer.fit_loop.epoch_loop.val_loop).pop("run", None)
        self._found = {}

    def log(self, module: pl.LightningModule) -> None:
        """Log what the first run found, as ``<name>_raw``. To be called at the end of the second one's epoch."""
        ranks = module.trainer.world_size
        for name, (value, to_loggers) in self._found.items():
            module.log(
                raw_name(name),
                value.float(),
                logger=None if to_loggers else False,
                batch_size=1,
                sync_dist=ranks > 1,
                add_dataloader_idx=False,
            )

    def _twice(self, trainer: pl.Trainer, run: Callable[[], Any]) -> Any:
        if not trainer.sanity_checking:
            with _the_module_alone(trainer), isolate_rng():
                before = dict(trainer.callback_metrics)
                logged = {name for of_one_loader in run() for name in of_one_loader}
                after = trainer.callback_metrics
                found = {name: value for name, value in after.items() if value is not before.get(name)}
            self._found = {
                name: (value.detach().clone(), name in logged)
                for name, value in found.items()
                if not (name.endswith("_step") and f"{name.removesuffix('_step')}_epoch" in found)
            }
        return run()


def raw_name(name: str) -> str:
    """The name of a metric on the weights as trained.

    Example:
        >>> raw_name("val/accuracy"), raw_name("val/loss/dataloader_idx_1")
        ('val/accuracy_raw', 'val/loss_raw/dataloader_idx_1')
    """
    base, of_a_loader, index = name.partition(_OF_A_LOADER)
    return base + RAW + of_a_loader + index


@contextmanager
def _the_module_alone(trainer: pl.Trainer) -> Iterator[None]:
    """Without callbacks and loggers, and with everything that a validation counts put back afterwards.

    The Trainer keeps its callbacks and loggers, which other threads read meanwhile (a progress bar draws from its own).
    The loop is given the same Trainer without callbacks, and the module the same one with loggers that write nothing.
    """
    loop: Any = trainer.fit_loop.epoch_loop.val_loop
    connector: Any = connector_of(trainer)
    whole: Any = trainer  # Lightning sets the datamodule where type checkers do not see it
    owners = [owner for owner in (connector, trainer.lightning_module, whole.datamodule) if owner is not None]
    loggers = [_Unheard(logger) for logger in trainer.loggers]
    unheard = _showing(trainer, loggers=lambda: loggers, log_dir=lambda: trainer.log_dir)
    of_connector = {name: dict(attribute(connector, name)) for name in METRICS}
    of_loop = {name: deepcopy(attribute(loop, name)) for name in PROGRESS}
    loop.trainer = _showing(unheard, callbacks=list)
    for owner in owners:
        owner.trainer = unheard
    loop.restarting = False
    try:
        yield
    finally:
        for owner in (loop, *owners):
            owner.trainer = trainer
        for name, kept in of_connector.items():
            setattr(connector, name, kept)
        for name, progress in of_loop.items():
            setattr(loop, name, progress)


def _showing(trainer: pl.Trainer, **shown: Callable[[], Any]) -> Any:
    """The same Trainer, with one state whoever writes to it, that shows these attributes instead of its own."""

    def attribute(name: str, value: Callable[[], Any]) -> property:
        return property(lambda _: value(), lambda _, new: setattr(trainer, name, new))

    whole = type(trainer)
    view: Any = object.__new__(
        type(whole.__name__, (whole,), {name: attribute(name, value) for name, value in shown.items()})
    )
    view.__dict__ = trainer.__dict__
    return view


class _Unheard(DummyLogger):
    """Writes nothing, and says where the logger writes whose place it takes."""

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._of = logger

    @property
    @override
    def name(self) -> Any:
        return self._of.name

    @property
    @override
    def version(self) -> Any:
        return self._of.version

    @property
    @override
    def save_dir(self) -> str | None:
        return self._of.save_dir

    @property
    @override
    def root_dir(self) -> str | None:
        return self._of.root_dir

    @property
    @override
    def log_dir(self) -> str | None:
        return self._of.log_dir
