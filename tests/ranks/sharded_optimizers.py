"""Cases of tests/ranks/sharded.py: optimizers that need whole parameters, and a filter that keeps weights, with shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_dp.optim import DPMicroAdam, DPMuon
from lightning_dp.optim.noise_std import tell_noise_std

Fit = Callable[..., Any]

KINDS: dict[str, Any] = {
    "muon": partial(DPMuon, ns_steps=3),
    "micro_adam": partial(DPMicroAdam, density=0.3, window=3),
}
SHAPES = ((5, 3), (7,), (3, 2, 2), (1, 4))


def sgd(parameters: Any, lr: float) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=20 * lr)


def run(fit: Fit, private: Callable[..., Any], made: Callable[..., Any], folder: Path, ranks: int) -> None:
    """What is compared between one process and two."""
    cases: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
        **{name: (partial(made, kind), {}) for name, kind in KINDS.items()},
        "disk": (partial(made, sgd), {"gradient_filter": "disk"}),
    }
    if ranks == 1:
        fit("plain", folder, ranks, private(), module=made(sgd))
    for name, (module, options) in cases.items():
        fit(name, folder, ranks, private(**options), module=module())
        if ranks > 1:
            half = fit(f"{name}_half", folder, ranks, private(**options), module=module(), max_steps=3)
            half.save_checkpoint(folder / f"{name}.ckpt")
            fit(f"{name}_resumed", folder, ranks, private(**options), module=module(), ckpt=folder / f"{name}.ckpt")
    if ranks > 1:
        torch.save(by_hand(init_device_mesh("cpu", (ranks,))), folder / "by_hand.pt")


def by_hand(mesh: Any) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """Steps on the same gradients, told the same noise: on whole parameters, and on shards put together again."""
    found = {}
    for name, kind in KINDS.items():
        start = [torch.randn(shape, generator=torch.Generator().manual_seed(5)) for shape in SHAPES]
        whole = [nn.Parameter(one.clone()) for one in start]
        parts = [nn.Parameter(distribute_tensor(one.clone(), mesh, [Shard(0)])) for one in start]
        for parameters in (whole, parts):
            optimizer = kind(parameters, lr=0.1)
            for step in range(5):
                generator = torch.Generator().manual_seed(step)
                for parameter in parameters:
                    gradient = torch.randn(parameter.shape, generator=generator)
                    parameter.grad = gradient if parameters is whole else distribute_tensor(gradient, mesh, [Shard(0)])
                tell_noise_std(optimizer, 0.2)
                optimizer.step()
        found[name] = (
            [one.detach().clone() for one in whole],
            [one.detach().full_tensor() for one in parts],
        )
    return found
