"""Muon, with what the noise does to the directions of a matrix taken off to leading order."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_dp.optim.adamw import DEFAULT_FLOOR, adamw_step
from lightning_dp.optim.arguments import check_adam_arguments, check_floor, decay
from lightning_dp.optim.base import ByParameter
from lightning_dp.optim.noise_std import NOISE_STD
from lightning_dp.optim.shards import all_of, held_like
from lightning_dp.validate import shown, truth, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration (Jordan et al. 2024), which brings singular values near to 1 in five steps."""
SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
}
"""What the rate of a matrix is multiplied by, under torch's names."""


class DPMuon(ByParameter):
    r"""Muon for matrices and :class:`~lightning_dp.optim.DPAdamW` for the rest, both told how large the noise is.

    Muon steps along F(X), the momentum X with its singular values brought to 1 by Newton-Schulz. Momentum is linear, and the
    noise is not in its way; F is not. If X = M + τζ with ζ ~ N(0, I), then

    .. math::
        E[F(M + \tau\zeta)] = e^{\tau^2 \Delta / 2} F(M) = F(M) + \tfrac{\tau^2}{2} \Delta F(M) + O(\tau^4):

    the noise smooths F as heat does. As much noise once more shows by how much. With Z ~ N(0, I), from numbers that have
    nothing to do with the data,

    .. math::
        \tilde F(X) = 2 F(X) - \tfrac12 \big( F(X + \tau Z) + F(X - \tau Z) \big), \qquad
        E[\tilde F(M + \tau\zeta)] = \big(2 e^{\tau^2\Delta/2} - e^{\tau^2\Delta}\big) F(M) = F(M) + O(\tau^4).

    τ² is the variance of the noise in the momentum, carried along with it: each gradient's own s², weighted as it is. It is
    bounded whatever τ is, unlike a correction by the Laplacian itself, which grows without bound for small singular values.
    In steps without noise, τ = 0 and this is :class:`torch.optim.Muon`.

    Parameters with two or more axes are matrices, of their first axis by the others; all others, and groups with
    ``orthogonalize=False`` (as for embeddings and the last layer), are stepped on by ``DPAdamW``.

    The probes Z follow from the step and the parameter's place alone: ranks agree, and a resumed run goes on as if it
    had never stopped.
    Cost: 1 + 2·probes iterations of Newton-Schulz a step. Of a sharded matrix each rank keeps its part of the momentum; one
    matrix at a time is whole, on all ranks, which all do the same with it and move their own rows.

    Guarantee:
        ε is unchanged: s is public, and everything else follows from released gradients (post-processing).

    Args:
        params: tensors or groups of them.
        lr: η of all of them.
        weight_decay: λ, decoupled.
        momentum: μ in [0, 1), of matrices.
        nesterov: whether F gets (1-μ)·g + μ·momentum rather than the momentum.
        ns_steps: of Newton-Schulz, at least 1.
        probes: how many Z the correction is a mean over; 0 for Muon without it.
        adjust_lr_fn: by what η is multiplied for a matrix of A rows and B columns: ``"match_rms_adamw"`` (0.2·√max(A, B), so
            that one rate suits matrices and the rest) or ``"original"`` (√max(1, A/B)).
        betas: β₁ and β₂ of what is no matrix.
        eps: ε of what is no matrix.
        floor: of what is no matrix, see ``DPAdamW``.
        orthogonalize: whether matrices are stepped on by Muon; for groups.

    Raises:
        ValueError: a number is out of range, or a parameter is complex.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = DPMuon([weight], lr=0.1, weight_decay=0.0, adjust_lr_fn="original")
        >>> weight.grad = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
        >>> _ = optimizer.step()
        >>> bool((weight.data.diagonal() < -0.06).all())
        True

    Source: Kim, Fan 2026 (arXiv 2605.12994) name the heat-smoothing bias and take its leading term off; the estimate of it by
    probes, as in the bootstrap's correction of bias, and its expectation are derived here and tested by drawing
    (``tests/optim/test_muon.py``). Muon: Jordan et al. 2024; the rate: Liu et al. 2025 (arXiv 2502.16982).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        probes: int = 1,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        floor: float = DEFAULT_FLOOR,
        orthogonalize: bool = True,
    ) -> None:
        betas = check_adam_arguments(lr, betas, eps, weight_decay)
        decay("momentum", momentum)
        check_floor(floor)
        truth(nesterov=nesterov, orthogonalize=orthogonalize)
        whole("ns_steps", ns_steps, low=1)
        whole("probes", probes, low=0)
        if not isinstance(adjust_lr_fn, str) or adjust_lr_fn not in SCALES:
            raise ValueError(f"adjust_lr_fn={shown(adjust_lr_fn)}: expected one of {', '.join(SCALES)}.")
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "probes": probes,
            "adjust_lr_fn": adjust_lr_fn,
            "betas": betas,
            "eps": eps,
            "floor": floor,
            "orthogonalize": orthogonalize,
            NOISE_STD: 0.0,
        }
        super().__init__(params, defaults)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if any(one.is_complex() for one in self.param_groups[-1]["params"]):
            raise ValueError("DPMuon with complex parameters: expected real ones. Use lightning_dp.optim.DPAdamW.")

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
        if parameter.ndim >= 2 and group["orthogonalize"]:
            _muon_step(parameter, gradient, state, group, noise_std, place)
        else:
            adamw_step(parameter, gradient, state, group, noise_std)


def _muon_step(
    parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], noise_std: float, place: int
) -> None:
    """Muon's step on one parameter, in place."""
    if not state:
        state["step"] = torch.tensor(0.0)
        state["momentum_buffer"] = torch.zeros_like(gradient)
        state["noise_variance"] = 0.0
    state["step"] += 1
    momentum, buffer, before = group["momentum"], state["momentum_buffer"], state["noise_variance"]
    buffer.lerp_(gradient, 1 - momentum)
    fresh = (1 - momentum) * noise_std
    state["noise_variance"] = variance = momentum**2 * before + fresh**2
    direction = buffer
    if group["nesterov"]:
        direction = gradient.lerp(buffer, momentum)
        variance = ((1 + momentum) * fresh) ** 2 + momentum**4 * before
    flat = all_of(direction).flatten(1)
    found = orthogonal(flat, group["ns_steps"])
    if variance and group["probes"]:
        generator = torch.Generator(flat.device).manual_seed((int(state["step"]) << 24) + place)
        shape = (group["probes"], *flat.shape)
        probes = torch.randn(shape, generator=generator, device=flat.device, dtype=torch.float32)
        found = unsmoothed(found, flat, math.sqrt(variance), probes, group["ns_steps"])
    rows, columns = flat.shape
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(
        held_like(found.view(parameter.shape), parameter),
        alpha=-group["lr"] * SCALES[group["adjust_lr_fn"]](rows, columns),
    )


def unsmoothed(
    found: Tensor, at: Tensor, noise_std: float, probes: Tensor, steps: int, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """F̃ of :class:`DPMuon`: F with the smoothing by noise taken off to leading order.

    Args:
        found: F(X), ``(..., A, B)``.
        at: X, which has noise.
        noise_std: τ.
        probes: Z, ``(probes, ..., A, B)``.
        steps: of Newton-Schulz.
        dtype: in which it is computed.
    """
    again = [orthogonal(at + sign * noise_std * probe, steps, dtype) for probe in probes for sign in (1, -1)]
    return 2 * found - torch.stack(again).mean(0)


def orthogonal(matrix: Tensor, steps: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """F: ``matrix`` with its singular values brought near to 1 by Newton-Schulz, in ``dtype``, over the last two axes.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """
    linear, cubic, quintic = COEFFICIENTS
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = (matrix if wide else matrix.mT).to(dtype)
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = linear * x + (cubic * gram + quintic * gram @ gram) @ x
    found: Tensor = (x if wide else x.mT).to(matrix.dtype)
    return found
