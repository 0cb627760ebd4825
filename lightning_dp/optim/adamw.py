"""AdamW with the noise's variance taken off the second moment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_dp.optim.arguments import check_adam_arguments, check_floor
from lightning_dp.optim.base import ByParameter
from lightning_dp.optim.noise_std import NOISE_STD

DEFAULT_FLOOR = 0.1
"""Three standard deviations of a second moment that is all noise, at β₂ = 0.999: √(2·(1−β₂)/(1+β₂)) = 0.03."""


class DPAdamW(ByParameter):
    r"""AdamW whose second moment is that of the gradient, not that of the gradient and the noise.

    The gradient of a private step is g + n with n ~ N(0, s²) on every coordinate, s = σC/B. So E[(g+n)²] = E[g²] + s², and
    where the noise is larger than the gradient, as it mostly is, Adam divides every coordinate by about the same √(s²) and is
    SGD with momentum. Here, with m and v as in AdamW,

    .. math::
        v_t = \beta_2 v_{t-1} + (1-\beta_2)(g_t^2 - s_t^2), \qquad
        \theta_t = (1-\eta\lambda)\theta_{t-1} - \eta \frac{\hat m_t}{\sqrt{\max(\hat v_t,\ f s_t^2)} + \varepsilon}

    so that E[v̂] is the second moment of g alone, also where s changes from step to step. ``DifferentialPrivacy`` tells it s
    before each step, whatever C and σ were in that step. In steps that have no noise, of a public optimizer or of training
    without privacy, s is 0 and this is :class:`torch.optim.AdamW`.

    Guarantee:
        ε is unchanged: s is public, and everything else follows from released gradients (post-processing).

    Args:
        params: tensors or groups of them.
        lr: η.
        betas: β₁ and β₂, in [0, 1).
        eps: ε of Adam, above or equal to 0.
        weight_decay: λ, decoupled.
        floor: f > 0, the least second moment in units of the noise's variance. Below it a difference from the noise cannot be
            told from chance, and dividing by it would make a large step of it. (The authors' γ′ is f·s².)

    Raises:
        ValueError: a number is out of range.

    Not for a gradient that is changed on its way to ``p.grad``, as by ``Tensor.register_hook``: its noise is no longer s.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = DPAdamW([weight], lr=0.1, weight_decay=0.0)
        >>> weight.grad = torch.tensor([3.0, -3.0])
        >>> _ = optimizer.step()
        >>> weight.data
        tensor([0.9000, 1.1000])

    Source: Tang, Shpilevskiy, Lécuyer 2024, algorithm 1 (arXiv 2312.14334, "DP-AdamBC"); Loshchilov, Hutter 2019 (arXiv
    1711.05101) for the decoupled weight decay.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        floor: float = DEFAULT_FLOOR,
    ) -> None:
        betas = check_adam_arguments(lr, betas, eps, weight_decay)
        check_floor(floor)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "floor": floor,
            NOISE_STD: 0.0,
        }
        super().__init__(params, defaults)

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
        adamw_step(parameter, gradient, state, group, noise_std)


def adamw_step(
    parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], noise_std: float
) -> None:
    """The step of :class:`DPAdamW` on one parameter, in place.

    Args:
        parameter: is moved.
        gradient: of it.
        state: ``step``, ``exp_avg`` (m) and ``exp_avg_sq`` (v), made in the first step.
        group: the numbers.
        noise_std: s.
    """
    if not state:
        state["step"] = torch.tensor(0.0)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    state["step"] += 1
    step, (beta1, beta2) = int(state["step"]), group["betas"]
    weight, gradient, mean, square = (
        torch.view_as_real(one) if one.is_complex() else one
        for one in (parameter, gradient, state["exp_avg"], state["exp_avg_sq"])
    )
    unbias1, unbias2 = 1 - beta1**step, 1 - beta2**step
    weight.mul_(1 - group["lr"] * group["weight_decay"])
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    if noise_std:
        square.sub_((1 - beta2) * noise_std**2)
    least = group["floor"] * noise_std**2 * unbias2
    divisor = (square.clamp(min=least).sqrt() / unbias2**0.5).add_(group["eps"])
    weight.addcdiv_(mean, divisor, value=-group["lr"] / unbias1)
