"""What the optimizers share: the closure first, then one parameter after the other, told how large its gradient's noise is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_dp.optim.noise_std import NOISE_STD, take_noise_std


class ByParameter(Optimizer):
    """An optimizer that steps on each parameter by itself.

    A group that has ``noise_std`` among its numbers is asked for it once in a step, see :mod:`lightning_dp.optim.noise_std`.
    """

    @abstractmethod
    def update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        noise_std: float,
        place: int,
    ) -> None:
        """The step on one parameter, in place.

        Args:
            parameter: is moved.
            gradient: of it.
            state: what is kept of it from step to step; empty before the first.
            group: the numbers.
            noise_std: s, of the noise on each coordinate of the gradient; 0 where nobody told it.
            place: the parameter's number among all of them, from 1.
        """

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step. The closure comes first: it may bring the gradient, and what is said of its noise."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            noise_std = take_noise_std(group) if NOISE_STD in group else 0.0
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self.update(parameter, parameter.grad, self.state[parameter], group, noise_std, place)
        return loss
