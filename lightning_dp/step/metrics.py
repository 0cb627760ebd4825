"""Metrics inside training_step: computed for the one example, from nothing but that example, and left as they were found."""

from __future__ import annotations

import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchmetrics import Metric, MetricCollection, SumMetric

from lightning_dp.engines.late import Late
from lightning_dp.errors import PreflightError
from lightning_dp.mechanism.same import same, snapshot

AnyMetric = Metric | MetricCollection
METHODS = ("forward", "update", "compute", "reset")

_BOOKKEEPING = frozenset(SumMetric().__dict__) | frozenset(METHODS)
"""Entries of a metric's ``__dict__`` that are torchmetrics' own, beside its states."""

_SCALAR = pytree.tree_structure(0.0)
_FRESH = {"_computed": None, "_forward_cache": None, "_update_count": 0}
_trained: weakref.WeakValueDictionary[int, Metric] = weakref.WeakValueDictionary()
"""The metrics that have seen private examples, by identity: torchmetrics hashes a metric by its states."""

_left: dict[int, dict[str, Any]] = {}
"""What their other attributes were before."""


@dataclass
class MetricCall:
    """A call of a torchmetrics object inside training_step; ``result`` is a nest with a late tensor for each tensor."""

    metric: AnyMetric
    method: str
    arguments: Any
    result: Any = None

    def leaves(self) -> list[Any]:
        """The tensors of the result, in order."""
        return pytree.tree_leaves(self.result)


@dataclass
class MetricsOfAPass:
    """Stands in for the module's metrics during one pass through training_step.

    A metric's value in the pass is that of the example alone: a twin without any earlier state is updated and computed, with
    the graph, once the value is asked for. A value that is only logged is never computed; the log gets that of the whole step
    when the calls are replayed.

    Args:
        structures: what the results of metrics look like, by identity; filled at first calls.
        calls: filled in order.
    """

    structures: dict[int, Any]
    calls: list[MetricCall]
    _updates: dict[int, list[tuple[Any, Any]]] = field(default_factory=dict)
    _read: set[int] = field(default_factory=set)

    def replacement(self, metric: AnyMetric, method: str, original: Callable[..., Any]) -> Callable[..., Any]:
        """What is called in the place of a method of ``metric``."""

        def call(*args: Any, **kwargs: Any) -> Any:
            result = None
            if method == "reset":
                for one in metrics_in(metric):
                    self._updates[id(one)] = []
            elif method == "compute":
                updates = list(self._updates.get(id(metric), ()))
                if updates:
                    result = self._late(metric, updates[0], lambda: _value_after(metric, updates))
                else:
                    result = self._not_updated(metric, original)
            else:
                self._note_update(metric, args, kwargs)
                if method == "forward":
                    result = self._late(metric, (args, kwargs), lambda: _value_of(metric, args, kwargs))
            self.calls.append(MetricCall(metric, method, (args, kwargs), result))
            return result

        return call

    def _note_update(self, metric: AnyMetric, args: Any, kwargs: Any) -> None:
        if id(metric) in self._read:
            raise _carries_over(metric)
        self._updates.setdefault(id(metric), []).append((args, kwargs))
        if isinstance(metric, MetricCollection):
            for one in metric.values(copy_state=False):
                self._note_update(one, args, one._filter_kwargs(**kwargs))

    def _not_updated(self, metric: AnyMetric, original: Callable[..., Any]) -> Any:
        """The value of a metric that this pass has not updated: to be logged, and to be used if it is no earlier example's."""
        if any(_is_trained(one) for one in metrics_in(metric)):

            def refuse() -> Any:
                raise _carries_over(metric)

            return self._late(metric, None, refuse)
        value = original()
        leaves, structure = pytree.tree_flatten(value)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            return value

        def read(leaf: Tensor) -> Tensor:
            self._read.add(id(metric))
            return leaf

        return pytree.tree_unflatten([Late.of(partial(read, leaf)) for leaf in leaves], structure)

    def _late(self, metric: AnyMetric, arguments: Any, compute: Callable[[], Any]) -> Any:
        """A late tensor for each tensor of the value, all computed at once."""
        if id(metric) not in self.structures and arguments is not None:
            self.structures[id(metric)] = _structure(metric, arguments)
        structure = self.structures.get(id(metric), _SCALAR)
        graph = torch.is_grad_enabled()
        made: list[list[Tensor]] = []

        def leaf(place: int) -> Tensor:
            if not made:
                with torch.set_grad_enabled(graph):
                    made.append(pytree.tree_leaves(compute()))
            return made[0][place]

        if structure is None:
            return compute()
        late = [Late.of(partial(leaf, place)) for place in range(structure.num_leaves)]
        return pytree.tree_unflatten(late, structure)


def replayed(call: MetricCall, arguments: Any) -> Any:
    """Do once, for the examples of a whole step, what each pass did to a metric.

    Args:
        call: of one pass.
        arguments: of all examples together.

    Returns:
        What the metric returns. ``compute`` gives the value of this rank's examples, since a rank may have none, and then
        calls nothing.
    """
    args, kwargs = arguments
    if call.method != "compute":
        return (
            getattr(call.metric, call.method)(*args, **kwargs)
            if call.method != "forward"
            else call.metric(*args, **kwargs)
        )
    apart = [(one, one.distributed_available_fn) for one in _all([call.metric])]
    try:
        for one, _ in apart:
            one.distributed_available_fn = lambda: False
        return call.metric.compute()
    finally:
        for one, original in apart:
            one.distributed_available_fn = original


def value_apart(calls: Sequence[MetricCall], arguments: Sequence[Any]) -> Any:
    """The value of the last of these calls for all examples together, of which the metric itself is to see nothing."""
    *earlier, last = range(len(calls))
    if calls[last].method == "forward":
        return _value_of(calls[last].metric, *arguments[last])
    updates: list[Any] = []
    for place in earlier:
        if calls[place].metric is calls[last].metric and calls[place].method != "compute":
            updates = [] if calls[place].method == "reset" else [*updates, arguments[place]]
    return _value_after(calls[last].metric, updates)


def outermost_metrics(module: nn.Module) -> list[AnyMetric]:
    """The metrics that code of ``module`` may call: registered ones at any depth, and those in attributes' lists and dicts."""
    found: dict[int, AnyMetric] = {}
    for one in module.modules():
        if isinstance(one, (Metric, MetricCollection)):
            found[id(one)] = one
        else:
            for name, value in one.__dict__.items():
                if name != "_modules" and type(value) in (list, tuple, dict, set, deque) and value:
                    found.update((id(metric), metric) for metric in metrics_in(value))
    return list(found.values())


def names_of_trained(module: nn.Module) -> set[str]:
    """The attributes by which a module knows metrics that have seen private examples."""
    trained = [path for path, one in module.named_modules() if isinstance(one, Metric) and _is_trained(one)]
    return {name for path in trained for name in path.split(".")}


def metrics_in(value: Any, seen: set[int] | None = None) -> Iterator[Metric | MetricCollection]:
    """Every metric in a nest of containers and metrics, the outer ones first."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, (Metric, MetricCollection)):
        yield value
        for inner in value.__dict__.values():
            yield from metrics_in(inner, seen)
    elif isinstance(value, (nn.ModuleDict, nn.ModuleList)):
        yield from metrics_in(value._modules, seen)
    elif isinstance(value, dict):
        for inner in value.values():
            yield from metrics_in(inner, seen)
    elif type(value) in (list, tuple, set, deque):
        for inner in value:
            yield from metrics_in(inner, seen)


@contextmanager
def states_hidden(metrics: Sequence[AnyMetric]) -> Iterator[None]:
    """While open, metrics that have seen private examples look as if they never had; afterwards as they were."""
    kept: list[tuple[Metric, dict[str, Any]]] = []
    for one in _all(metrics):
        if _is_trained(one):
            fresh = {**_FRESH, **_default_states(one), **_before(one)}
            kept.append((one, {name: one.__dict__[name] for name in fresh if name in one.__dict__}))
            one.__dict__.update(fresh)
    try:
        yield
    finally:
        for one, values in kept:
            one.__dict__.update(values)


@contextmanager
def noting_what_they_see(metrics: Sequence[AnyMetric]) -> Iterator[None]:
    """While open, metrics are given private examples; what they then keep beside their states is hidden from later passes."""
    all_of_them = _all(metrics)
    before = [snapshot(_own(one)) for one in all_of_them]
    try:
        yield
    finally:
        for one, values in zip(all_of_them, before, strict=True):
            now = _own(one)
            changed = {name: kept for name, kept in values.items() if name not in now or not same(kept, now[name])}
            if not _is_trained(one):
                weakref.finalize(one, _left.pop, id(one), None)
                _trained[id(one)] = one
                _left[id(one)] = {}
            _left[id(one)] = {**changed, **_left[id(one)]}


def _all(metrics: Sequence[AnyMetric]) -> list[Metric]:
    return list({id(one): one for metric in metrics for one in metrics_in(metric) if isinstance(one, Metric)}.values())


def _own(one: Metric) -> dict[str, Any]:
    """A metric's attributes beside its states."""
    own = {
        name: value for name, value in one.__dict__.items() if name not in _BOOKKEEPING and name not in one._defaults
    }
    return {**own, **{name: buffer for name, buffer in one._buffers.items() if buffer is not None}}


def _is_trained(one: AnyMetric) -> bool:
    return _trained.get(id(one)) is one


def _before(one: Metric) -> dict[str, Any]:
    """Attributes as they were before private examples were seen, as copies."""
    return snapshot(_left[id(one)]) if _is_trained(one) else {}


def _default_states(one: Metric, like: Tensor | None = None) -> dict[str, Any]:
    """New states, each tensor as ``like``, a zero, where torch.func maps over that."""
    states: dict[str, Any] = {}
    for name, default in one._defaults.items():
        if isinstance(default, Tensor):
            states[name] = default.detach().clone() if like is None else default.detach() + like.to(default.dtype)
        else:
            states[name] = []
    return states


def _zero(arguments: Any) -> Tensor | None:
    """A zero that depends on every tensor of the arguments, so that states made of it may be written to under torch.func."""
    zeros = [
        torch.zeros_like(leaf, dtype=torch.float32, requires_grad=False).sum()
        for leaf in pytree.tree_leaves(arguments)
        if isinstance(leaf, Tensor)
    ]
    return sum(zeros[1:], zeros[0]) if zeros else None


def _value_of(metric: AnyMetric, args: Any, kwargs: Any) -> Any:
    """The value of a metric's ``forward`` for these arguments alone."""
    return _twin(metric, {})(*args, **kwargs)


def _value_after(metric: AnyMetric, updates: Sequence[tuple[Any, Any]]) -> Any:
    """The value of ``compute`` after these updates alone."""
    twin = _twin(metric, {})
    _make_fresh(twin, updates)
    for args, kwargs in updates:
        twin.update(*args, **kwargs)
    return twin.compute()


def _make_fresh(twin: AnyMetric, arguments: Any) -> None:
    like = _zero(arguments)
    for one in metrics_in(twin):
        if isinstance(one, Metric):
            one.__dict__.update(_FRESH)
            one.__dict__.update(_default_states(one, like))


def _forward(twin: Metric, *args: Any, **kwargs: Any) -> Any:
    """``Metric.forward`` of a twin, which has nothing to add the example to."""
    _make_fresh(twin, (args, kwargs))
    twin._enable_grad = torch.is_grad_enabled()
    twin.update(*args, **kwargs)
    twin._enable_grad = False
    return twin.compute()


def _twin(value: Any, memo: dict[int, Any]) -> Any:
    """A metric like this one with no state; tensors, and modules that are no metrics, are shared."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, Metric):
        twin = memo[id(value)] = value.__class__.__new__(value.__class__)
        given = {**value.__dict__, **_before(value)}
        state = {name: _twin(given[name], memo) for name in given if name not in (*METHODS, "_update_signature")}
        for name, inner in state.items():
            if isinstance(inner, types.MethodType) and inner.__self__ is value:
                state[name] = types.MethodType(inner.__func__, twin)
        twin.__setstate__(state)
        twin.__dict__.update(dist_sync_on_step=False, sync_on_compute=False, _to_sync=False, compute_on_cpu=False)
        _make_fresh(twin, ())
        if type(value).forward is Metric.forward:
            twin.__dict__["forward"] = types.MethodType(_forward, twin)
        return twin
    if (
        isinstance(value, (MetricCollection, nn.ModuleDict, nn.ModuleList))
        and next(metrics_in(value), None) is not None
    ):
        shell = memo[id(value)] = value.__class__.__new__(value.__class__)
        for name, inner in value.__dict__.items():
            if name not in METHODS:
                shell.__dict__[name] = _twin(inner, memo)
        if isinstance(value, MetricCollection):  # members on their own: to find groups is a decision by values
            shell.__dict__["_enable_compute_groups"] = shell.__dict__["_groups_checked"] = False
        return shell
    if isinstance(value, dict):
        copy = memo[id(value)] = value.copy()
        copy.update((key, _twin(inner, memo)) for key, inner in value.items())
        return copy
    if type(value) in (list, tuple, set, deque):
        return type(value)(_twin(inner, memo) for inner in value)
    return value


def _structure(metric: AnyMetric, arguments: Any) -> Any:
    """The structure of a metric's value, found on zeros; ``None`` where it holds more than tensors."""

    def zeros(leaf: Any) -> Any:
        return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device) if isinstance(leaf, Tensor) else leaf

    try:
        with torch.no_grad(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            value = _value_of(metric, *pytree.tree_map(zeros, arguments))
    except Exception:  # no value for zeros, or for a batch of one: a single tensor, as nearly always
        value = {name: torch.zeros(()) for name in metric} if isinstance(metric, MetricCollection) else torch.zeros(())
    leaves, structure = pytree.tree_flatten(value)
    return structure if all(isinstance(leaf, Tensor) for leaf in leaves) else None


def _carries_over(metric: AnyMetric) -> PreflightError:
    return PreflightError(
        f"training_step reads {type(metric).__name__}.compute() before it has updated the metric: expected a value of the "
        "example at hand. What the metric holds then comes from earlier examples, and no training_step may depend on "
        "those. Update it first, or call it (self.metric(...)), which gives the value of the batch; log the metric itself "
        "for the value of the epoch."
    )
