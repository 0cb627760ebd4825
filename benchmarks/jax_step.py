"""jax_privacy's clipped gradient of the wide residual networks, for ``benchmarks/engines.py``.

The network is written in JAX as plain functions that take the PyTorch network's own weights, so the two are compared on the
same numbers: images with channels last and kernels as (height, width, in, out), which XLA prefers on a CPU. Needs the packages
``jax`` and ``jax-privacy``, which this project otherwise does not use::

    uv run --with jax-privacy python benchmarks/engines.py --engines jax-privacy jax-plain --cases wrn:16 wrn-ws:16

XLA takes its number of threads when it is first imported, so ``OMP_NUM_THREADS`` does not bind it; bind the process to one
core, as by ``taskset --cpu-list 0``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_dp.layers.standardised_weights import EPSILON
from lightning_dp.models import WideResNet, WSConv2d

Weights = dict[str, Any]
Gradient = dict[str, Tensor]


class InJax:
    """A wide residual network and a batch, handed to JAX.

    Args:
        model: a :class:`lightning_dp.models.WideResNet`.
        inputs: images ``(batch, 1, 3, height, width)``.
        targets: classes ``(batch, 1)``.
        clip_norm: C.

    Raises:
        NotImplementedError: another model, or several views.
    """

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor, clip_norm: float) -> None:
        if not isinstance(model, WideResNet):
            raise NotImplementedError("a model that is not written in JAX here")
        if inputs.shape[1] != 1:
            raise NotImplementedError("several views of an example")
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
        jax: Any = import_module("jax")
        clipped_grad = import_module("jax_privacy.clipping").clipped_grad
        self._model, self._jax = model, jax
        self._weights = {name: _to_jax(jax, p) for name, p in model.named_parameters()}
        self._images = jax.numpy.asarray(inputs[:, 0].movedim(1, -1).contiguous().numpy())
        self._classes = jax.numpy.asarray(targets[:, 0].contiguous().numpy())
        self._plain = jax.jit(jax.grad(self._loss))
        self._clipped = jax.jit(clipped_grad(self._loss, l2_clip_norm=clip_norm, batch_argnums=(1, 2)))

    def plain(self) -> Gradient:
        """JAX's own gradient without privacy."""
        return self._run(self._plain)

    def private(self) -> Gradient:
        """The sum of clipped gradients."""
        return self._run(self._clipped)

    def _run(self, gradient: Callable[..., Weights]) -> Gradient:
        found = self._jax.block_until_ready(gradient(self._weights, self._images, self._classes))
        return {name: _to_torch(g) for name, g in found.items()}

    def _loss(self, weights: Weights, images: Any, classes: Any) -> Any:
        scores = self._jax.nn.log_softmax(_logits(self._jax, self._model, weights, images))
        return -self._jax.numpy.take_along_axis(scores, classes[:, None], axis=1).mean()


def _logits(jax: Any, model: WideResNet, weights: Weights, images: Any) -> Any:
    """The network's forward pass, walking the PyTorch modules for their shapes and names alone."""
    names = {module: name for name, module in model.named_modules()}

    def run(module: nn.Module, x: Any) -> Any:
        name = names.get(module, "")
        if isinstance(module, nn.Conv2d):
            return _convolution(jax, module, weights[f"{name}.weight"], weights, name, x)
        if isinstance(module, nn.GroupNorm):
            return _group_norm(jax, module, x) * weights[f"{name}.weight"] + weights[f"{name}.bias"]
        if isinstance(module, nn.ReLU):
            return jax.nn.relu(x)
        if isinstance(module, nn.Identity):
            return x
        if isinstance(module, nn.Sequential):
            for child in module:
                x = run(child, x)
            return x
        shortcut, residual = module.shortcut, module.residual
        assert isinstance(shortcut, nn.Module)
        assert isinstance(residual, nn.Module)
        return run(shortcut, x) + run(residual, x)

    x = run(model.first_conv, images)
    for stage in model.stages:
        x = run(stage, x)
    x = run(model.final, x).mean((1, 2))
    return x @ weights["classifier.weight"].T + weights["classifier.bias"]


def _convolution(jax: Any, layer: nn.Conv2d, kernel: Any, weights: Weights, name: str, x: Any) -> Any:
    if isinstance(layer, WSConv2d):
        fan_in = kernel.shape[0] * kernel.shape[1] * kernel.shape[2]
        mean, variance = kernel.mean((0, 1, 2)), kernel.var((0, 1, 2))
        scale = jax.lax.rsqrt(jax.numpy.maximum(variance * fan_in, EPSILON))
        kernel = (kernel - mean) * scale * weights[f"{name}.gain"]
    ahead = layer.padding[0]
    assert isinstance(ahead, int)
    padding = [(ahead, ahead), (ahead, ahead)]
    out = jax.lax.conv_general_dilated(x, kernel, layer.stride, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return out if layer.bias is None else out + weights[f"{name}.bias"]


def _group_norm(jax: Any, layer: nn.GroupNorm, x: Any) -> Any:
    grouped = x.reshape(*x.shape[:3], layer.num_groups, -1)
    mean, variance = grouped.mean((1, 2, 4), keepdims=True), grouped.var((1, 2, 4), keepdims=True)
    return ((grouped - mean) * jax.lax.rsqrt(variance + layer.eps)).reshape(x.shape)


def _to_jax(jax: Any, parameter: Tensor) -> Any:
    values = parameter.detach()
    return jax.numpy.asarray((values.permute(2, 3, 1, 0) if values.ndim == 4 else values).contiguous().numpy())


def _to_torch(values: Any) -> Tensor:
    found = torch.from_numpy(np.array(values))
    return found.permute(3, 2, 0, 1) if found.ndim == 4 else found
