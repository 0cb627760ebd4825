"""Adam on the largest coordinates alone; what is left out waits for a later step."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_dp.optim.arguments import check_adam_arguments
from lightning_dp.optim.base import ByParameter
from lightning_dp.optim.shards import all_of, held_like
from lightning_dp.validate import number, whole


class DPMicroAdam(ByParameter):
    r"""MicroAdam on private gradients: Adam of the last few sparse gradients, and an error that carries what they left out.

    For each parameter of P coordinates, with the noisy gradient g and k = ⌈density·P⌉,

    .. math::
        a_t = g_t + e_t, \quad V_t = \text{the k entries of } a_t \text{ largest in size}, \quad e_{t+1} = a_t - V_t

        \hat m_t = \frac{1-\beta_1}{1-\beta_1^t} \sum_{i<w} \beta_1^i V_{t-i}, \quad
        \hat v_t = \frac{1-\beta_2}{1-\beta_2^t} \sum_{i<w} \beta_2^i V_{t-i}^2, \quad
        \theta_t = (1-\eta\lambda)\theta_{t-1} - \eta \frac{\hat m_t}{\sqrt{\hat v_t} + \varepsilon}

    where V stands for its k entries and zeros elsewhere, and w = min(t, window). A coordinate moves once its gradients have
    added up to more than the noise of the others has, so the noise, which does not add up, is held back rather than divided
    out: it needs not be told how large it is. Without noise this is MicroAdam.

    The error is kept in the type of the parameter, as in the authors' code; MicroAdam's 4-bit quantisation is left out.
    Memory: P numbers for the error, and 2·window·k for the sparse gradients. Of a sharded parameter each rank keeps its part of
    the error and all the sparse gradients, and one parameter at a time is whole on every rank while it is stepped on, since
    the largest coordinates are those of all of it.

    Guarantee:
        ε is unchanged: everything follows from released gradients (post-processing).

    Args:
        params: tensors or groups of them.
        lr: η.
        betas: β₁ and β₂, in [0, 1).
        eps: ε of Adam, above or equal to 0.
        weight_decay: λ, decoupled.
        density: the part of a parameter's coordinates that enter in a step, in (0, 1].
        window: how many sparse gradients the moments are made of, at least 1.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(4))
        >>> optimizer = DPMicroAdam([weight], lr=0.1, density=0.25)
        >>> weight.grad = torch.tensor([3.0, 2.0, -1.0, 0.0])
        >>> _ = optimizer.step()
        >>> weight.data, optimizer.state[weight]["error"]
        (tensor([-0.1000,  0.0000,  0.0000,  0.0000]), tensor([ 0.,  2., -1.,  0.]))

    Source: Hudişteanu, Kalinin, Cyffers 2025 (arXiv 2511.20509), on Modoranu et al. 2024 (arXiv 2405.15593), algorithm 1.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        density: float = 0.01,
        window: int = 10,
    ) -> None:
        betas = check_adam_arguments(lr, betas, eps, weight_decay)
        if not 0 < number("density", density) <= 1:
            raise ValueError(f"density={density}: expected a number in (0, 1], the part of the coordinates in a step.")
        whole("window", window, low=1)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "density": density,
            "window": window,
        }
        super().__init__(params, defaults)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for place, parameter in zip(saved, own, strict=True):  # torch gives whole numbers the parameter's type
            if "places" in state_dict["state"].get(place, {}):
                places: Tensor = state_dict["state"][place]["places"]
                self.state[parameter]["places"] = places.to(parameter.device, copy=True)

    @override
    def update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        state: dict[str, Any],
        group: dict[str, Any],
        noise_std: float,
        place: int,
    ) -> None:
        _step(parameter, gradient, state, group)


def _step(parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """The step on one parameter, in place."""
    weight, gradient = (torch.view_as_real(one) if one.is_complex() else one for one in (parameter, gradient))
    kept, window = math.ceil(group["density"] * weight.numel()), group["window"]
    if not state:
        state["step"] = torch.tensor(0.0)
        state["error"] = torch.zeros_like(weight)
        state["places"] = torch.zeros(window, kept, dtype=torch.int64, device=weight.device)
        state["values"] = torch.zeros(window, kept, dtype=weight.dtype, device=weight.device)
    state["step"] += 1
    step, (beta1, beta2) = int(state["step"]), group["betas"]
    total = all_of(gradient + state["error"]).flatten()
    newest = (step - 1) % window
    places = torch.topk(total.abs(), kept).indices
    state["places"][newest], state["values"][newest] = places, total[places]
    total[places] = 0.0
    state["error"].copy_(held_like(total.view(weight.shape), weight))
    mean, square = torch.zeros_like(total), torch.zeros_like(total)
    for slot in range(min(step, window)):
        age, values = (newest - slot) % window, state["values"][slot]
        mean.index_add_(0, state["places"][slot], values, alpha=beta1**age)
        square.index_add_(0, state["places"][slot], values.square(), alpha=beta2**age)
    mean.mul_((1 - beta1) / (1 - beta1**step))
    square.mul_((1 - beta2) / (1 - beta2**step))
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    direction = (mean / square.sqrt().add_(group["eps"])).view(weight.shape)
    weight.add_(held_like(direction, weight), alpha=-group["lr"])
