"""Which of Lightning's two roots an object comes from, and every private name of Lightning that this package uses.

Lightning is installed twice, as ``lightning.pytorch`` and as ``pytorch_lightning``, with the same classes under the same names
that know nothing of each other. This package is written upon the first; :func:`own` finds the namesake in the root of a given
Trainer, and :func:`either` asks for both. The root is never chosen when this package is imported, which may be before the
user's own import of Lightning.

Lightning may move a private name in any release. Whatever has moved raises :class:`LightningMovedError`, which says what the
name was for; nothing goes on as if the name had been empty. ``tests/test_lightning_internals.py`` holds a contract for each
name, and that no other module of this package knows any of them.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any, TypeVar, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

PURPOSES = {
    "_apply_batch_transfer_handler": "a micro-batch is moved to the device through the user's hooks",
    "_average_model": "the average of the weights starts from the initial weights",
    "_callback_metrics": "a validation on the weights as trained leaves no metrics behind",
    "_checkpoint_io": "what is at work while a checkpoint is saved steers nothing",
    "_combined_loader": "several training loaders are refused",
    "_compiler_ctx": "a module under torch.compile is told from others",
    "_current_fx_name": "what training_step logs for one example is kept from the loggers",
    "_DatasetSamplerWrapper": "the user's sampler is found inside Lightning's wrapper",
    "_default_root_dir": "the replay of a run writes into a folder of its own",
    "_data_parallel_size": "parameters are shared by all ranks",
    "_ddp_comm_hook": "a hook around the ranks' sum, which would never run, is refused",
    "_ddp_comm_state": "a hook around the ranks' sum, which would never run, is refused",
    "_IndexBatchSamplerWrapper": "Lightning's own batch sampler is told from the user's",
    "_is_local_file_protocol": "a folder of this machine is told from one behind an address",
    "_lightning_optimizers": "the steps of manual optimization are made private",
    "_logged_metrics": "a validation on the weights as trained leaves no metrics behind",
    "_logger_connector": "a validation on the weights as trained leaves no metrics behind",
    "_model_averaging_period": "post-local SGD, which would never run, is refused",
    "_MultiProcessingLauncher": "what a child process spends becomes known in its parent",
    "_on_before_batch_transfer": "a micro-batch goes through the user's hooks",
    "_param_requires_grad_state": "Lightning's own attributes of a module are told from the user's",
    "_progress_bar_metrics": "a validation on the weights as trained leaves no metrics behind",
    "_results": "the numbers of a step are told to Lightning without looking again at how they are logged",
    "_root_device": "strategy='private' gets its device",
    "_sampler": "the user's sampler is found inside Lightning's wrapper",
    "_seen_batches_per_dataloader": "a validation on the weights as trained leaves the progress as it was",
    "_sync_module_states": "all ranks start from the same parameters",
    "_tensor_parallel_size": "parameters are shared by all ranks",
}
"""What is done by each private name."""


LIGHTNING, PYTORCH_LIGHTNING = "lightning.pytorch", "pytorch_lightning"
"""The two roots."""

_NAMESAKES = {LIGHTNING: PYTORCH_LIGHTNING, "lightning.fabric": "lightning_fabric"}

T = TypeVar("T")


class LightningMovedError(ImportError):
    """The installed Lightning has no longer a private name that this package needs."""

    def __init__(self, owner: str, name: str) -> None:
        super().__init__(
            f"lightning {pl.__version__} no longer has {owner}.{name}, by which {PURPOSES[name]}: expected "
            "lightning>=2.6,<2.7. Install such a version."
        )


def attribute(owner: Any, name: str) -> Any:
    """A private attribute of one of Lightning's objects.

    Raises:
        LightningMovedError: there is no such attribute, whatever its value.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        kind = owner if isinstance(owner, type) else type(owner)
        raise LightningMovedError(kind.__name__, name) from None


def imported(module: str, name: str) -> Any:
    """A private function or class of one of Lightning's modules.

    Raises:
        LightningMovedError: the module or the name in it is gone.
    """
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        raise LightningMovedError(module, name) from None


def _replace(owner: Any, name: str, value: Any) -> None:
    """Set a private attribute that is there: one that Lightning no longer reads would be set in vain."""
    attribute(owner, name)
    setattr(owner, name, value)


# ---- the two roots


def root_of(one: object) -> str:
    """The root that a class, or the class of a Trainer, a module or a strategy, comes from.

    Example:
        >>> root_of(DDPStrategy()), root_of(pl.LightningModule())
        ('lightning.pytorch', 'lightning.pytorch')
    """
    names = [kind.__module__ for kind in (one if isinstance(one, type) else type(one)).__mro__]
    return PYTORCH_LIGHTNING if any(name.split(".")[0] == PYTORCH_LIGHTNING for name in names) else LIGHTNING


def loaded_roots() -> tuple[str, ...]:
    """The roots that this process has imported by now, ``lightning.pytorch`` always."""
    return (LIGHTNING, PYTORCH_LIGHTNING) if PYTORCH_LIGHTNING in sys.modules else (LIGHTNING,)


def own(root: str, kind: T) -> T:
    """What a root has in the place of a class or function of ``lightning``.

    Args:
        root: as :func:`root_of` gives it.
        kind: public, from ``lightning.pytorch`` or ``lightning.fabric``.

    Raises:
        ImportError, AttributeError: the root, of another version, has no such thing.
    """
    if root_of(kind) == root:
        return kind
    named = cast(Any, kind)
    for before, after in _NAMESAKES.items():
        if f"{named.__module__}.".startswith(f"{before}."):
            return cast(T, getattr(import_module(after + named.__module__.removeprefix(before)), named.__name__))
    raise ImportError(f"{named.__module__}.{named.__name__} is not Lightning's: expected a class of lightning.pytorch.")


def either(kind: type[T]) -> tuple[type[T], ...]:
    """A class of ``lightning`` and its namesake in the other root, if that is loaded: for ``isinstance``.

    Callbacks, loggers and modules inside modules may come from another root than the Trainer.
    """
    return tuple(found for root in loaded_roots() if (found := namesake(root, cast(Any, kind))) is not None)


@cache
def namesake(root: str, kind: Any) -> Any:
    """As :func:`own`, and ``None`` if there is no such thing."""
    try:
        return own(root, kind)
    except (ImportError, AttributeError):
        return None


def version_of(root: str) -> str:
    """The version that is installed of a root."""
    return str(import_module(root).__version__)


def overridden(name: str, one: object) -> bool:
    """Whether the user's module or data module has a hook of its own."""
    return own(root_of(one), is_overridden)(name, one)


def strategy_registry(root: str) -> Any:
    """The names for ``Trainer(strategy=...)`` of a root."""
    return import_module(f"{root}.strategies").StrategyRegistry


if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback as Callback
    from lightning.pytorch.callbacks import WeightAveraging as WeightAveraging
else:
    # Of every root that is loaded by now: so that pytorch_lightning's LightningCLI takes this package's callbacks for such.
    # One that is loaded later takes them in a list all the same: a Trainer calls the hooks of whatever is in it.
    Callback, WeightAveraging = (
        kinds[0] if len(kinds := either(kind)) == 1 else type(kind.__name__, kinds, {})
        for kind in (pl.Callback, pl.callbacks.WeightAveraging)
    )


def fill(owner: type, pattern: type) -> None:
    """Give a class every member of another's body that it does not have itself; their ``super()`` leads to its own base."""
    for name, member in vars(pattern).items():
        if name not in vars(owner) and (name == "__init__" or not name.startswith("__")):
            setattr(owner, name, _rebound(member, owner))


def _rebound(member: Any, owner: type) -> Any:
    """A member of a class body for the body of ``owner``, whose base ``super()`` then leads to."""
    if isinstance(member, property):
        return property(_rebound(member.fget, owner), _rebound(member.fset, owner), doc=member.__doc__)
    if isinstance(member, classmethod):
        return classmethod(_rebound(member.__func__, owner))
    if not isinstance(member, FunctionType) or member.__closure__ is None:
        return member
    cells = tuple(
        CellType(owner) if name == "__class__" else cell
        for name, cell in zip(member.__code__.co_freevars, member.__closure__, strict=True)
    )
    copy = FunctionType(member.__code__, member.__globals__, member.__name__, member.__defaults__, cells)
    copy.__dict__.update(member.__dict__)
    copy.__kwdefaults__, copy.__annotations__ = member.__kwdefaults__, member.__annotations__
    copy.__doc__ = member.__doc__
    copy.__qualname__ = f"{owner.__qualname__}.{member.__name__}"
    return copy


# ---- a batch on its way to training_step

BEFORE_TRANSFER = "_on_before_batch_transfer"
"""The module's way to the user's ``on_before_batch_transfer``; an instance may hold another of that name."""

TRANSFER = "_apply_batch_transfer_handler"
"""The module's way to the user's ``transfer_batch_to_device`` and ``on_after_batch_transfer``."""


def before_transfer(module: Any, batch: Any, dataloader_idx: int = 0) -> Any:
    """Convert a batch to the Trainer's precision and give it to the user's ``on_before_batch_transfer``."""
    return attribute(module, BEFORE_TRANSFER)(batch, dataloader_idx)


def transfer(module: Any, batch: Any, device: torch.device | None, dataloader_idx: int = 0) -> Any:
    """Move a batch to the device by the user's hooks, and give it to ``on_after_batch_transfer``."""
    return attribute(module, TRANSFER)(batch, device=device, dataloader_idx=dataloader_idx)


# ---- loaders


def index_batch_samplers() -> tuple[type, ...]:
    """The batch sampler that Lightning puts around the user's, to note indices; of either root."""
    return either(imported("lightning.pytorch.overrides.distributed", "_IndexBatchSamplerWrapper"))


def sampler_within(sampler: Any) -> Any:
    """The user's sampler inside the one that Lightning puts around it under DDP; any other as it is."""
    within = getattr(sampler, "dataset", None)
    wrapper = imported("lightning.fabric.utilities.distributed", "_DatasetSamplerWrapper")
    return attribute(within, "_sampler") if isinstance(within, either(wrapper)) else sampler


def has_no_loader_yet(trainer: pl.Trainer) -> bool:
    """Whether the Trainer is still making its training loader, so that the one at hand is a further one."""
    return attribute(trainer.fit_loop, "_combined_loader") is None


# ---- modules and optimizers

CURRENT_HOOK = "_current_fx_name"
"""A module's note of the hook that it is in; while it is ``None``, ``self.log`` refuses."""

KEPT_BY_LIGHTNING = frozenset(pl.LightningModule().__dict__) | {"log"}
"""Entries of a LightningModule's ``__dict__`` that are Lightning's, or this package's for the time of a pass."""


SAVES = ("_checkpoint_io",)
"""Attributes of a strategy that come and go while it saves a checkpoint."""


def current_hook(module: pl.LightningModule) -> str | None:
    """The hook that the module is in."""
    found: str | None = attribute(module, CURRENT_HOOK)
    return found


def wrapped_optimizers(strategy: Any) -> list[Any]:
    """What ``self.optimizers()`` gives the user: Lightning's wrappers, in the order of ``configure_optimizers``."""
    found: list[Any] = attribute(strategy, "_lightning_optimizers")
    return found


def average_of(callback: WeightAveraging) -> AveragedModel:
    """What the callback averages the weights in, from its ``setup`` for a fit on."""
    found: AveragedModel = attribute(callback, "_average_model")
    return found


# ---- the numbers of a step


def logged_again(module: pl.LightningModule, name: str, value: float | Tensor, batch_size: int = 1) -> bool:
    """Give Lightning the next value of a number that the hook under way has logged in this epoch, in the same way.

    ``self.log`` goes through everything that Lightning keeps of the number, and compares how it was logged before; this takes
    a twentieth of the time.

    Args:
        module: in a hook.
        name: of the number.
        value: of it. A tensor has one element.
        batch_size: its weight in a mean over the epoch.

    Returns:
        Whether that could be done. If not, nothing is changed: it is the first value of an epoch, ``self.log`` is the
        user's, or nothing is logged at all.
    """
    results = attribute(module.trainer, "_results")
    if results is None or "log" in module.__dict__ or not _has_log_of_lightning(cast(Any, type(module))):
        return False
    key = f"{current_hook(module)}.{name}"
    known = results.get(key)
    if known is None or known.has_reset or not known.is_tensor:
        return False
    device = known.value.device
    if isinstance(value, Tensor):
        if value.device != device or value.numel() != 1:
            return False
        given = value.detach().clone().squeeze()
    else:
        given = torch.tensor(value, device=device, dtype=torch.get_default_dtype())
    results.update_metrics(key, given, batch_size)
    return True


@cache
def _has_log_of_lightning(kind: Any) -> bool:
    return kind.log is own(root_of(kind), pl.LightningModule).log


# ---- a validation that leaves no trace


def connector_of(trainer: pl.Trainer) -> Any:
    """What holds the Trainer's metrics."""
    return attribute(trainer, "_logger_connector")


METRICS = ("_callback_metrics", "_logged_metrics", "_progress_bar_metrics")
"""Attributes of :func:`connector_of`, each a dict."""

PROGRESS = ("batch_progress", "_seen_batches_per_dataloader", "restarting")
"""Attributes of a validation loop that a validation moves on."""


# ---- folders


def write_into(trainer: pl.Trainer, folder: str) -> None:
    """Have what has no folder of its own written into this one."""
    _replace(trainer, "_default_root_dir", folder)


# ---- strategies and processes


def refused_of_ddp(strategy: DDPStrategy) -> list[str]:
    """The arguments of ``DDPStrategy`` that were given and could not be honoured."""
    names = ("ddp_comm_hook", "ddp_comm_state", "model_averaging_period")
    return [name for name in names if attribute(strategy, f"_{name}")]


def set_device(strategy: SingleDeviceStrategy, device: torch.device) -> None:
    """Train on this device."""
    _replace(strategy, "_root_device", device)


def share_over(strategy: ModelParallelStrategy, ranks: int) -> None:
    """With ``data_parallel_size="auto"``, let all ranks share the parameters."""
    if attribute(strategy, "_data_parallel_size") == "auto" and attribute(strategy, "_tensor_parallel_size") == 1:
        _replace(strategy, "_data_parallel_size", ranks)


def sync_module_states(module: nn.Module) -> None:
    """Give every rank rank 0's parameters and buffers."""
    imported("lightning.pytorch.overrides.distributed", "_sync_module_states")(module)


def starts_processes(launcher: object) -> bool:
    """Whether this launcher starts the processes that train, by spawn or fork."""
    where = "lightning.pytorch.strategies.launchers.multiprocessing"
    return isinstance(launcher, either(imported(where, "_MultiProcessingLauncher")))


# ---- folders


def is_local(address: str) -> bool:
    """Whether a folder is on this machine, not behind an address such as ``s3://``."""
    return bool(imported("lightning.fabric.utilities.cloud_io", "_is_local_file_protocol")(address))
