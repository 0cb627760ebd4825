"""The values that parameters have at each point of one training_step, from before its first optimizer step to its last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn
from torch.optim import Optimizer


class ValuesOverSteps:
    """Remembers what parameters were before each optimizer step of one training_step.

    training_step runs again for each example up to the private step whose gradient is wanted. What it made before an
    earlier step (images of a generator, a feature) it made with the parameters of *then*, and must find them so again.
    All values that are kept here are public: parameters before a step, which were released with noise or see no data.

    Args:
        module: the user's.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module = module
        self._before: list[dict[str, Tensor]] = []

    @property
    def steps(self) -> int:
        """How many steps have been taken."""
        return len(self._before)

    def about_to_step(self, optimizer: Optimizer) -> None:
        """Note what the parameters of ``optimizer``, which steps next, are."""
        ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        named = self._module.named_parameters()
        self._before.append({name: p.detach().clone() for name, p in named if id(p) in ids})

    def after(self, steps: int) -> dict[str, Tensor]:
        """The values after so many steps, from 0, of all parameters that a step so far could have changed."""
        now = {name: p.detach() for name, p in self._module.named_parameters()}
        values = {name: now[name] for before in self._before for name in before}
        for before in reversed(self._before[steps:]):
            values.update(before)
        return values


class PutBackInTime:
    """Gives a pass through training_step the parameters that it had at each point, within one ``functional_call``.

    Args:
        module: the user's.
        values: of the training_step under way, with all steps before the one whose gradient is wanted.
        differentiated: names of the parameters whose gradient is wanted. Those of them that an earlier step has changed
            are shifted to what they were, so that a gradient goes through them all the same.
    """

    def __init__(self, module: pl.LightningModule, values: ValuesOverSteps, differentiated: Mapping[str, Any]) -> None:
        self._points = [values.after(steps) for steps in range(values.steps + 1)]
        self._differentiated = frozenset(differentiated)
        names = {id(p): name for name, p in module.named_parameters()}
        changed = self._points[0]
        self._places: list[tuple[nn.Module, str, str]] = [
            (owner, key, names[id(p)])
            for owner in module.modules()
            for key, p in owner._parameters.items()
            if p is not None and names.get(id(p)) in changed
        ]
        self._given: Mapping[str, Tensor] = {}

    def at_start(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All parameters by name as they are now, as they were before the first step."""
        self._given = given
        return {**given, **self._values(0)}

    def after(self, steps: int) -> None:
        """Go on, inside the ``functional_call``, with the values after so many steps."""
        if steps < len(self._points):
            values = self._values(steps)
            for owner, key, name in self._places:
                owner._parameters[key] = values[name]  # type: ignore[assignment]  # as functional_call does

    def _values(self, steps: int) -> dict[str, Tensor]:
        now = self._points[-1]

        def value(name: str, then: Tensor) -> Tensor:
            given = self._given[name]
            return given + (then - now[name]) if name in self._differentiated else then

        return {name: value(name, then) for name, then in self._points[steps].items()}


Adjust = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""From all parameters by name to those with which training_step begins."""
