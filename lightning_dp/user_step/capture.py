"""What a training_step logs, counts and returns, captured example by example and replayed once on the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import WarningCache
from torch import Tensor
from torch.utils import _pytree as pytree
from torchmetrics import Metric, MetricCollection

from lightning_dp.user_step.attributes import attributes_put_back, leave, numbers_as_tensors

_warnings = WarningCache()


@dataclass
class MetricCall:
    """A call of a torchmetrics object inside training_step."""

    path: str
    method: str
    arguments: Any
    placeholder: Any = None


@dataclass
class LogCall:
    """A ``self.log`` inside training_step.

    ``source`` points to the metric call whose result is logged, if any; ``number`` says that a Python number was.
    """

    path: str
    name: str
    value: Any
    options: dict[str, Any]
    source: tuple[int, str | None] | None = None
    number: bool = False


@dataclass
class Recording:
    """The calls of one pass through training_step. Their tensors leave vmap as its outputs; the rest stays here."""

    metric_calls: list[MetricCall]
    log_calls: list[LogCall]
    extras: dict[str, Any]
    attributes: dict[Any, Any] = field(default_factory=dict)
    kinds: dict[Any, Any] = field(default_factory=dict)

    def take_tensors(self) -> list[Tensor]:
        """Everything tensor-valued that an example contributed; :meth:`put_back` is the inverse."""
        nest = [
            [call.arguments for call in self.metric_calls],
            [call.value for call in self.log_calls],
            self.extras,
            self.attributes,
        ]
        self._leaves, self._structure = pytree.tree_flatten(nest)
        return [leaf.detach() for leaf in self._leaves if isinstance(leaf, Tensor)]

    def put_back(self, tensors: Sequence[Tensor]) -> tuple[list[Any], list[Any], dict[str, Any], dict[Any, Any]]:
        """Metric arguments, logged values, extra outputs and attributes with ``tensors`` in the tensors' places."""
        remaining = iter(tensors)
        leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        arguments, values, extras, attributes = pytree.tree_unflatten(leaves, self._structure)
        return arguments, values, extras, attributes


class StepCapture:
    """Runs the user's training_step on a batch of one and keeps what it tells the outside world.

    ``self.log`` / ``self.log_dict`` of the module and of LightningModules inside it, ``forward`` and ``update`` of its
    torchmetrics objects and the extra keys of a returned dict are recorded for each example; :meth:`replay` hands
    them to Lightning once, for all examples of the step together: metrics see the concatenated arguments, logged
    values are reduced with their own ``reduce_fx``. Everything captured is **private**: it carries no noise.

    Args:
        module: the user's LightningModule, which is left as it was found after each call.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self.module = module
        self._recording: Recording | None = None

    def run(self, call: Callable[[], Any]) -> tuple[Tensor, list[Tensor]]:
        """Call ``training_step`` and split what it did into the loss and the tensors it logged, counted or returned."""
        with self.listening() as recording, attributes_put_back(self.module) as changes:
            output = call()
        loss, recording.extras = split_output(output)
        recording.attributes = numbers_as_tensors(changes)
        recording.kinds = {place: pytree.tree_map(type, value) for place, value in changes.items()}
        self._recording = recording
        return loss, recording.take_tensors()

    @property
    def logged_names(self) -> list[str]:
        """What training_step logs, as seen in the last pass through it."""
        return [] if self._recording is None else [call.name for call in self._recording.log_calls]

    def replay(
        self,
        outputs: list[list[Tensor]],
        examples: int,
        share: Callable[[Any], Any] | None = None,
        *,
        log: bool = True,
    ) -> dict[str, Any]:
        """Hand the captured calls of a whole step to Lightning.

        Args:
            outputs: for each micro-batch the tensors that :meth:`run` gave, each with a leading axis of examples.
                Empty for a rank without examples in this step.
            examples: how many examples the rank has in this step.
            share: given when some rank has no example while others have: takes a rank's list of log calls and returns
                rank 0's, so that every rank makes the same (possibly collective) log calls.
            log: ``False`` sets the attributes that training_step sets, and nothing else.

        Returns:
            The extra keys that training_step returned beside the loss, concatenated over examples.
        """
        log_calls: list[LogCall] = []
        extras: dict[str, Any] = {}
        if outputs and self._recording is not None:
            columns = [_joined(parts) for parts in zip(*outputs, strict=True)]
            arguments, values, extras, attributes = self._recording.put_back(columns)
            leave(self.module, attributes, self._recording.kinds)
        if outputs and self._recording is not None and log:
            results = [
                self._replay_metric(call, _rows(args))
                for call, args in zip(self._recording.metric_calls, arguments, strict=True)
            ]
            log_calls = [
                LogCall(call.path, call.name, self._logged_value(call, value, results), call.options)
                for call, value in zip(self._recording.log_calls, values, strict=True)
            ]
        if not log:
            return {}
        if share is not None:
            shared = share(log_calls)
            log_calls = log_calls if outputs else shared
        for call in log_calls:
            self.log(call, max(examples, 1))
        return {name: _rows(value) for name, value in extras.items()}

    @contextmanager
    def listening(self) -> Iterator[Recording]:
        """While open, logs and metric calls go into the recording and nowhere else."""
        recording = Recording([], [], {})
        replaced: list[tuple[Any, str, Any]] = []

        def replace(owner: Any, name: str, function: Any) -> None:
            replaced.append((owner, name, owner.__dict__.get(name)))
            object.__setattr__(owner, name, function)

        try:
            for path, child in self.module.named_modules():
                if isinstance(child, pl.LightningModule):
                    if child._current_fx_name is not None:  # a log method that was kept elsewhere must not get through
                        replace(child, "_current_fx_name", None)
                    replace(child, "log", _record_log(recording, path, self.module))
                elif isinstance(child, (Metric, MetricCollection)):
                    replace(child, "forward", _record_metric(recording, path, child, "forward"))
                    replace(child, "update", _record_metric(recording, path, child, "update"))
            yield recording
        finally:
            for owner, name, original in reversed(replaced):
                if original is None:
                    object.__delattr__(owner, name)
                else:
                    object.__setattr__(owner, name, original)

    def _replay_metric(self, call: MetricCall, arguments: Any) -> Any:
        args, kwargs = arguments
        metric = self.module.get_submodule(call.path)
        return metric(*args, **kwargs) if call.method == "forward" else metric.update(*args, **kwargs)  # type: ignore[operator]  # a metric by its path

    def _logged_value(self, call: LogCall, value: Any, results: list[Any]) -> Any:
        if call.source is not None:
            index, key = call.source
            return results[index] if key is None else results[index][key]
        if not isinstance(value, Tensor):
            return value
        per_example = value.reshape(value.shape[0], -1).float()
        if results and bool(per_example.isnan().all()):
            _warnings.warn(
                f"self.log({call.name!r}, ...): the value is computed from the result of a metric's forward, which is "
                "not known while gradients are taken per example, and is logged as NaN. Log the metric itself, as in "
                "self.log(name, self.metric)."
            )
        return _reduce(per_example, call.options.get("reduce_fx", "mean"))

    def log(self, call: LogCall, examples: int) -> None:
        """Make one ``self.log`` for a whole step of ``examples`` examples."""
        owner = self.module.get_submodule(call.path)
        value = self.module.get_submodule(call.value.path) if isinstance(call.value, _MetricByPath) else call.value
        owner.log(call.name, value, **{**call.options, "batch_size": examples})  # type: ignore[operator]  # a LightningModule by its path


@dataclass
class _MetricByPath:
    """A metric object that was logged, by its place in the module (so that ranks can share the call)."""

    path: str


def split_output(output: Any) -> tuple[Tensor, dict[str, Any]]:
    """The loss, and whatever else training_step returned in a dict.

    Raises:
        TypeError: training_step returned None or something without a loss.
    """
    if isinstance(output, Mapping):
        if "loss" not in output:
            raise TypeError(f"training_step returned a dict with the keys {list(output)}: expected the key 'loss'.")
        return output["loss"], {name: value for name, value in output.items() if name != "loss"}
    if output is None:
        raise TypeError(
            "training_step returned None: expected a loss for every batch. Under differential privacy a step cannot be "
            "skipped by looking at the data; return a loss (a zero one if need be)."
        )
    return output, {}


def _record_log(recording: Recording, path: str, module: pl.LightningModule) -> Callable[..., None]:
    def log(name: str, value: Any, *args: Any, **options: Any) -> None:
        positional = dict(zip(_LOG_ARGUMENTS, args, strict=False))
        source, number = None, not isinstance(value, Tensor) and isinstance(value, (int, float))
        if isinstance(value, Tensor):
            source = next(
                (
                    (index, key)
                    for index, call in enumerate(recording.metric_calls)
                    for key, placeholder in _placeholders(call.placeholder)
                    if placeholder is value
                ),
                None,
            )
        elif number:
            value = torch.tensor(float(value))
        elif isinstance(value, Metric):
            place = next((place for place, child in module.named_modules() if child is value), None)
            value = value if place is None else _MetricByPath(place)  # Lightning refuses a stranger, and says why
        recording.log_calls.append(LogCall(path, name, value, {**positional, **options}, source, number))

    return log


_LOG_ARGUMENTS = (
    "prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "enable_graph", "sync_dist", "sync_dist_group",
    "add_dataloader_idx", "batch_size", "metric_attribute", "rank_zero_only",
)  # fmt: skip


def _record_metric(recording: Recording, path: str, metric: Any, method: str) -> Callable[..., Any]:
    def record(*args: Any, **kwargs: Any) -> Any:
        placeholder: Any = None
        if method == "forward":
            blank = torch.full((), float("nan"))
            names = list(metric.keys()) if isinstance(metric, MetricCollection) else None
            placeholder = blank if names is None else {name: blank.clone() for name in names}
        arguments = pytree.tree_map(_as_tensor, (args, kwargs))
        recording.metric_calls.append(MetricCall(path, method, arguments, placeholder))
        return placeholder

    return record


def _as_tensor(argument: Any) -> Any:
    """A number that a metric is given becomes a tensor, so that every example's is counted; ``True`` is an option."""
    number = isinstance(argument, (int, float)) and not isinstance(argument, bool)
    return torch.tensor(argument) if number else argument


def _placeholders(placeholder: Any) -> list[tuple[str | None, Tensor]]:
    if isinstance(placeholder, dict):
        return list(placeholder.items())
    return [] if placeholder is None else [(None, placeholder)]


def _rows(nest: Any) -> Any:
    """Merge the axis of examples with each example's own batch axis of length one."""
    return pytree.tree_map(
        lambda leaf: leaf.flatten(0, 1) if isinstance(leaf, Tensor) and leaf.ndim > 1 else leaf, nest
    )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """The micro-batches' tensors as one; where users bring different numbers of examples, by examples of their own."""
    if len({part.shape[1:] for part in parts}) > 1 and all(part.ndim > 1 for part in parts):
        parts = [part.flatten(0, 1).unsqueeze(1) for part in parts]
    return torch.cat(list(parts))


def _reduce(per_example: Tensor, reduce_fx: Any) -> Tensor:
    name = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", "mean")
    reductions: dict[str, Callable[[Tensor], Tensor]] = {
        "sum": torch.sum,
        "max": torch.amax,
        "amax": torch.amax,
        "min": torch.amin,
        "amin": torch.amin,
    }
    return reductions.get(name, torch.mean)(per_example)
