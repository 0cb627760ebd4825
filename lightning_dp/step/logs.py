"""What a training_step logs, counts and returns, captured example by example and replayed once on the whole batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils import _pytree as pytree
from torchmetrics import Metric

from lightning_dp.engines.late import Late, at_hand
from lightning_dp.lightning_internals import CURRENT_HOOK, current_hook, either
from lightning_dp.mechanism.instead import Instead
from lightning_dp.step.attributes import (
    Place,
    attributes_put_back,
    keep_public,
    leave,
    may_be_public,
    numbers_as_tensors,
    values_of_one,
)
from lightning_dp.step.kept_state import KeptState
from lightning_dp.step.log_calls import LogCall, LogCalls, MetricByPath, OfMetric
from lightning_dp.step.metrics import (
    METHODS,
    AnyMetric,
    MetricCall,
    MetricsOfAPass,
    noting_what_they_see,
    outermost_metrics,
    replayed,
    states_hidden,
    value_apart,
)
from lightning_dp.step.withheld import withheld


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
            [pytree.tree_map(_as_tensor, call.arguments) for call in self.metric_calls],
            [None if call.source is not None else call.value for call in self.log_calls],
            self.extras,
            self.attributes,
        ]
        self._leaves, self._structure = pytree.tree_flatten(nest)
        self._leaves = [self.by_place(leaf) for leaf in self._leaves]
        return [leaf.detach() for leaf in self._leaves if isinstance(leaf, Tensor)]

    def place_of(self, value: Any) -> OfMetric | None:
        """Where ``value`` is in the result of a metric's call, if it is the very tensor."""
        if type(value) is not Late:
            return None
        places = ((call, leaf) for call, made in enumerate(self.metric_calls) for leaf in enumerate(made.leaves()))
        return next((OfMetric(call, place) for call, (place, leaf) in places if leaf is value), None)

    def by_place(self, leaf: Any) -> Any:
        """``leaf``, or its place if it is a tensor of a metric's result: the replay has it for the whole step."""
        return (self.place_of(leaf) or at_hand(leaf)) if type(leaf) is Late else leaf

    def put_back(self, tensors: Sequence[Tensor]) -> tuple[list[Any], list[Any], dict[str, Any], dict[Any, Any]]:
        """Metric arguments, logged values, extra outputs and attributes with ``tensors`` in the tensors' places."""
        remaining = iter(tensors)
        leaves = [next(remaining) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        arguments, values, extras, attributes = pytree.tree_unflatten(leaves, self._structure)
        return arguments, values, extras, attributes


class StepCapture:
    """Runs the user's training_step on a batch of one and keeps what it tells the outside world.

    ``self.log`` / ``self.log_dict`` of the module and of LightningModules inside it, calls of its torchmetrics objects
    and the extra keys of a returned dict are recorded for each example; :meth:`replay` hands them to Lightning once, for
    all examples of the step together: metrics see the concatenated arguments, logged values are reduced with their own
    ``reduce_fx``. Inside the pass a metric's value is that of the example, see
    :class:`~lightning_dp.step.metrics.MetricsOfAPass`. Everything captured is **private**: it carries no noise.

    Args:
        module: the user's LightningModule, which is left as it was found after each call.

    Attributes:
        state: all that training_step can read of the module.
        loader: of the training data, which passes may not read; set once it is known.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self.module, self.state = module, KeptState(module)
        self.loader: Any = None
        self.is_listening = False
        self._recording: Recording | None = None
        self._structures: dict[int, Any] = {}
        self._metrics: list[AnyMetric] | None = None
        self._public: set[Place] | None = None
        self._told = False
        self._given = LogCalls(module)

    def run(self, call: Callable[[], Any]) -> tuple[Tensor, list[Tensor]]:
        """Call ``training_step`` and split what it did into the loss and the tensors it logged, counted or returned."""
        kept_away = nullcontext() if self.loader is None else withheld(self.module.trainer, self.loader)
        with self.listening() as recording, attributes_put_back(self.module) as changes, kept_away:
            loss, recording.extras = split_output(call())
            loss = at_hand(loss)
        recording.attributes = numbers_as_tensors(changes)
        recording.kinds = {place: pytree.tree_map(type, value) for place, value in changes.items()}
        self._recording = recording
        return loss, recording.take_tensors()

    @property
    def logged_names(self) -> list[str]:
        """What training_step logs, as seen in the last pass through it."""
        return [] if self._recording is None else [call.name for call in self._recording.log_calls]

    def say_once_that_logs_are_private(self, reaches_loggers: bool) -> None:
        """Tell people what the guarantee does not cover, if training_step logs anything that reaches the loggers."""
        if self.logged_names and reaches_loggers and not self._told:
            self._told = True
            rank_zero_info(
                f"lightning_dp: training_step logs {', '.join(self.logged_names[:5])}: computed from private examples without "
                "noise, so the guarantee does not cover them. Keep such logs private, or use "
                "DifferentialPrivacy(log_train_metrics=False)."
            )

    def replay(
        self,
        outputs: list[list[Tensor]],
        examples: int,
        share: Callable[[Any], Any] | None = None,
        *,
        log: bool = True,
        without_data: Callable[[], object] | None = None,
    ) -> dict[str, Any]:
        """Hand the captured calls of a whole step to Lightning.

        Args:
            outputs: for each micro-batch the tensors that :meth:`run` gave, each with a leading axis of examples.
                Empty for a rank without examples in this step.
            examples: how many examples the rank has in this step.
            share: given when some rank has no example while others have: takes a rank's list of log calls and returns
                rank 0's, so that every rank makes the same (possibly collective) log calls.
            log: ``False`` sets the attributes that training_step sets, and nothing else.
            without_data: runs training_step on a batch without anybody's data, by :meth:`run`. Called only where attributes
                have to be compared with what it sets.

        Returns:
            The extra keys that training_step returned beside the loss, concatenated over examples.
        """
        log_calls: list[LogCall] = []
        extras: dict[str, Any] = {}
        recording, self._metrics = self._recording, None
        if outputs and recording is not None:
            columns = [_joined(parts) for parts in zip(*outputs, strict=True)]
            arguments, values, extras, attributes = recording.put_back(columns)
            sources = {call.source for call in recording.log_calls if call.source is not None}
            wanted = _places([arguments, attributes, extras]) | sources if log else _places(attributes)
            results = self._replay_metrics(recording, [_rows(each) for each in arguments], wanted, log)
            given = _with_results(attributes, results)
            kept = leave(self.module, given, recording.kinds, partial(self._set_without_data, without_data))
            self._public = kept if self._public is None else kept | self._public
            extras = _with_results({name: _rows(value) for name, value in extras.items()}, results)
            log_calls = [
                LogCall(call.path, call.name, self._logged_value(call, value, results), call.options)
                for call, value in zip(recording.log_calls, values, strict=True)
                if log
            ]
        elif recording is not None:
            public = may_be_public(recording.kinds) if self._public is None else self._public
            found = self._set_without_data(without_data) if public else None
            keep_public(self.module, {place: value for place, value in (found or {}).items() if place in public})
        if not log:
            return {}
        if share is not None:
            shared = share(log_calls)
            log_calls = log_calls if outputs else shared
        for call in log_calls:
            self.log(call, max(examples, 1))
        return extras

    def _set_without_data(self, run: Callable[[], object] | None) -> dict[Place, Any] | None:
        """What training_step does to attributes without anybody's data; ``None`` if there is no such batch, or it fails."""
        recording = self._recording
        if run is None:
            return None
        try:
            with isolate_rng(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                run()
            assert self._recording is not None
            found = values_of_one(self._recording.attributes, self._recording.kinds)
        except Exception:  # a batch of zeros is not one that it takes
            return None
        finally:
            self._recording = recording
        return found

    @contextmanager
    def muted(self) -> Iterator[None]:
        """While open, nothing that is logged goes anywhere."""
        owners = [one for one in self.module.modules() if isinstance(one, either(pl.LightningModule))]
        for one in owners:
            one.__dict__["log"] = Instead(one, "log", lambda *args, **options: None)
        try:
            yield
        finally:
            for one in owners:
                one.__dict__.pop("log", None)

    @contextmanager
    def listening(self) -> Iterator[Recording]:
        """While open, logs and metric calls go into the recording and nowhere else."""
        recording, before = Recording([], [], {}), self.is_listening
        self.is_listening = True
        in_this_pass = MetricsOfAPass(self._structures, recording.metric_calls)
        metrics = self._metrics = outermost_metrics(self.module) if self._metrics is None else self._metrics
        replaced: list[tuple[Any, str, Any]] = []

        def replace(owner: Any, name: str, function: Any) -> None:
            before = owner.__dict__.get(name)
            replaced.append((owner, name, before))
            object.__setattr__(owner, name, function and Instead(owner, name, function, before))

        try:
            for path, child in self.module.named_modules():
                if isinstance(child, either(pl.LightningModule)):
                    if current_hook(child) is not None:  # a log method that was kept elsewhere must not get through
                        replace(child, CURRENT_HOOK, None)
                    replace(child, "log", _record_log(recording, path, self.module))
            for metric in metrics:
                for method in METHODS:
                    replace(metric, method, in_this_pass.replacement(metric, method, getattr(metric, method)))
            with states_hidden(metrics):
                yield recording
        finally:
            self.is_listening = before
            for owner, name, original in reversed(replaced):
                if original is None:
                    object.__delattr__(owner, name)
                else:
                    object.__setattr__(owner, name, original)

    def _replay_metrics(
        self, recording: Recording, arguments: list[Any], wanted: set[OfMetric], log: bool
    ) -> dict[OfMetric, Tensor]:
        """Call the metrics for the whole step, if ``log``, or nothing but twins of them; the results that are wanted."""
        results: dict[OfMetric, Tensor] = {}
        calls, called = recording.metric_calls, {source.call for source in wanted}
        with noting_what_they_see([call.metric for call in calls if log]):
            for place, call in enumerate(calls):
                given = arguments[place] = _with_results(arguments[place], results)
                if log and (call.method != "compute" or place in called):
                    value = replayed(call, given)
                elif place in called:
                    value = value_apart(calls[: place + 1], arguments)
                else:
                    continue
                results.update((OfMetric(place, leaf), each) for leaf, each in enumerate(pytree.tree_leaves(value)))
        return results

    def _logged_value(self, call: LogCall, value: Any, results: Mapping[OfMetric, Tensor]) -> Any:
        if call.source is not None:
            return results[call.source]
        if not isinstance(value, Tensor):
            return value
        return _reduce(value.reshape(value.shape[0], -1).float(), call.options.get("reduce_fx", "mean"))

    def log(self, call: LogCall, examples: int) -> None:
        """Make one ``self.log`` for a whole step of ``examples`` examples."""
        self._given.give(call, examples)


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
            source = recording.place_of(value)
        elif number:
            value = torch.tensor(float(value))
        elif isinstance(value, Metric):
            place = next((place for place, child in module.named_modules() if child is value), None)
            value = value if place is None else MetricByPath(place)  # Lightning refuses a stranger, and says why
        recording.log_calls.append(LogCall(path, name, value, {**positional, **options}, source, number))

    return log


_LOG_ARGUMENTS = (
    "prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "enable_graph", "sync_dist", "sync_dist_group",
    "add_dataloader_idx", "batch_size", "metric_attribute", "rank_zero_only",
)  # fmt: skip


def _as_tensor(argument: Any) -> Any:
    """A number that a metric is given becomes a tensor, so that every example's is counted; ``True`` is an option."""
    number = isinstance(argument, (int, float)) and not isinstance(argument, bool)
    return torch.tensor(argument) if number else argument


def _places(nest: Any) -> set[OfMetric]:
    return {leaf for leaf in pytree.tree_leaves(nest) if isinstance(leaf, OfMetric)}


def _with_results(nest: Any, results: Mapping[OfMetric, Tensor]) -> Any:
    return pytree.tree_map(lambda leaf: results[leaf] if isinstance(leaf, OfMetric) else leaf, nest)


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
