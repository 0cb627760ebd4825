"""Book-keeping of any module against one plain backward pass per example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import ClippedSum
from lightning_dp.plan.clipping import Clipping, ClippingStyle

STYLES: tuple[ClippingStyle, ...] = ("flat", "per_layer", "automatic")


def both(
    module: nn.Module,
    inputs: Tensor,
    clipping: Clipping | float | None = None,
    loss: Callable[[Any], Tensor] | None = None,
) -> tuple[ClippedSum, ClippedSum, GhostEngine]:
    """The clipped sums of book-keeping and of the loop, for a smooth loss of whatever the module puts out.

    Without a clipping, the style turns with the number of examples, so that a test that draws that number sees them all.
    """

    def loss_function(parameters: Mapping[str, Tensor], batch: Tensor) -> tuple[Tensor, Any]:
        output = functional_call(module, dict(parameters), (batch,))
        return (torch.sin(output).pow(2).mean() if loss is None else loss(output)), {"output": output}

    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    engine = GhostEngine(module)
    clipping = Clipping(1.0, STYLES[len(inputs) % len(STYLES)]) if clipping is None else clipping
    run = (loss_function, trainable, inputs, len(inputs), clipping)
    return engine.clipped_sum(*run), LoopEngine().clipped_sum(*run), engine


def same(ghost: ClippedSum, loop: ClippedSum, tolerance: float = 1e-9) -> None:
    assert list(ghost.gradient) == list(loop.gradient)
    for name, expected in loop.gradient.items():
        torch.testing.assert_close(
            ghost.gradient[name], expected, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    torch.testing.assert_close(ghost.norms, loop.norms, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ghost.losses, loop.losses, rtol=tolerance, atol=tolerance)
    assert ghost.outputs.keys() == loop.outputs.keys()
    torch.testing.assert_close(ghost.outputs["output"], loop.outputs["output"], rtol=tolerance, atol=tolerance)


def agree(module: nn.Module, inputs: Tensor, clipping: Clipping | float | None = None, **options: Any) -> GhostEngine:
    ghost, loop, engine = both(module, inputs, clipping, **options)
    same(ghost, loop)
    return engine


def build(make: Callable[[], nn.Module], seed: int, *shape: int) -> tuple[nn.Module, Tensor]:
    """A float64 module whose parameters are all random (ones and zeros would hide errors), and inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make().double()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
        return module, torch.randn(*shape, dtype=torch.float64)
