"""A contract for each private name of torch and torchmetrics that is used: an upgrade that moves it fails here first."""

from __future__ import annotations

import argparse
import ast
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C import _functorch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations
from torch.utils import _pytree
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from torchmetrics import Metric, MetricCollection, SumMetric

import lightning_dp
from tests.test_lightning_internals import names_in, names_used

PACKAGE = Path(lightning_dp.__file__).parent

WHERE: dict[str, tuple[Callable[[], Any], str]] = {
    "_BatchNorm": (lambda: nn.modules.batchnorm, "layers that mix examples are refused and replaced"),
    "_InstanceNorm": (
        lambda: nn.modules.instancenorm,
        "layers that look like BatchNorm and mix nothing are let through",
    ),
    "_SpectralNorm": (lambda: parametrizations, "the power iteration of a spectral norm is stopped within a step"),
    "_actions": (argparse.ArgumentParser, "an option that is misspelt is answered with one that there is"),
    "_add_batch_dim": (lambda: _functorch, "ghost puts values under vmap"),
    "_backward_hooks": (lambda: torch.zeros(1, requires_grad=True), "hooks of the user's on tensors are found"),
    "_buffers": (nn.Module, "buffers are watched and put back"),
    "_compiled_call_impl": (nn.Module, "compiled modules run as they are written"),
    "_computed": (SumMetric, "a metric's twin starts without a result"),
    "_conv_forward": (lambda: nn.Conv2d, "a convolution with its own forward has no rule"),
    "_defaults": (SumMetric, "a metric's twin starts from its defaults"),
    "_enable_compute_groups": (
        lambda: MetricCollection([SumMetric()]),
        "metrics of a collection are called one by one",
    ),
    "_enable_grad": (SumMetric, "a metric in the loss has a graph"),
    "_filter_kwargs": (SumMetric, "a collection's arguments go to the metrics that take them"),
    "_foreach_add_": (lambda: torch, "sums of all parameters are added to at once"),
    "_forward_cache": (SumMetric, "a metric's twin starts without a result"),
    "_forward_hooks": (nn.Module, "hooks of FSDP2 are found"),
    "_forward_pre_hooks": (nn.Module, "hooks of FSDP2 are found"),
    "_get_default_store": (lambda: dist.distributed_c10d, "lost ranks are named"),
    "_get_node_type": (lambda: _pytree, "containers are told from leaves"),
    "_groups_checked": (lambda: MetricCollection([SumMetric()]), "metrics of a collection are called one by one"),
    "_is_view": (lambda: torch.zeros(1), "ghost tells a view from a tensor of its own"),
    "_make_wrapper_subclass": (lambda: torch.Tensor, "results that come later stand for themselves"),
    "_modules": (nn.Module, "layers are replaced under every name"),
    "_name_parser_map": (
        lambda: argparse.ArgumentParser().add_subparsers(),
        "an option that is misspelt is answered with one that there is",
    ),
    "_non_persistent_buffers_set": (nn.Module, "buffers are watched and put back"),
    "_parameters": (nn.Module, "parameters are exchanged for those of a step"),
    "_post_accumulate_grad_hooks": (
        lambda: torch.zeros(1, requires_grad=True),
        "hooks of the user's on tensors are found",
    ),
    "_qkv_same_embed_dim": (lambda: nn.MultiheadAttention(2, 1), "the rule for attention knows its layout"),
    "_reversed_padding_repeated_twice": (lambda: nn.Conv2d(1, 1, 1), "padding by reflection has a rule"),
    "_saved_tensors_hooks_disable": (lambda: torch._C._autograd, "ghost keeps what it needs"),
    "_saved_tensors_hooks_enable": (lambda: torch._C._autograd, "ghost keeps what it needs"),
    "_saved_tensors_hooks_get_disabled_error_message": (lambda: torch._C._autograd, "ghost keeps what it needs"),
    "_schema": (lambda: torch.ops.aten.bernoulli.p, "random operations are drawn for each example"),
    "_shutdown_workers": (lambda: _MultiProcessingDataLoaderIter, "workers end with a fit"),
    "_swap_tensor_impl": (lambda: torch._C, "no tensor under vmap is swapped with one that stays"),
    "_urandom": (lambda: random, "whether somebody asks the operating system for random numbers is seen"),
    "_update_count": (SumMetric, "a metric's twin starts without a result"),
    "_update_signature": (SumMetric, "a metric's twin can be copied"),
    "_version": (lambda: torch.zeros(1), "writes into a tensor in place are seen"),
}
"""Name → what has it, and what is done by it."""

NOT_ATTRIBUTES = {
    "_C", "_MEM_FORMAT_ENCODING", "_StorageInfo", "_StoragePrefix", "_autograd", "_bootstrap", "_by_epsilon", "_by_layer",
    "_functorch", "_fused_sdp_choice", "_get_layout", "_getframe", "_norm_", "_pytest", "_pytorch_model", "_pytree",
    "_sample_dirichlet", "_simulated_", "_skip_conv", "_skip_norm", "_standard_gamma", "_step", "_strip_protocol", "_upon_",
    "_what",
}  # fmt: skip
"""Modules, Python's own, fsspec's, names in files, and ends of words."""


@pytest.mark.parametrize("name", sorted(WHERE))
def test_torch_still_has_the_name(name: str) -> None:
    where, purpose = WHERE[name]
    assert hasattr(where(), name), f"torch {torch.__version__} no longer has {name}, by which {purpose}"


def test_there_is_a_contract_for_every_private_name_that_is_no_own_and_not_lightnings() -> None:
    used = {
        name
        for path in PACKAGE.rglob("*.py")
        if path.name != "lightning_internals.py"
        for name in names_used(ast.parse(path.read_text()))
    }
    assert used - names_in(PACKAGE) - NOT_ATTRIBUTES - {"_compiler_ctx"} <= WHERE.keys()
    assert WHERE.keys() <= used


def test_what_some_of_them_mean() -> None:
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version == before + 1
    assert tensor[:1]._is_view()
    assert not tensor._is_view()
    assert issubclass(nn.SyncBatchNorm, _BatchNorm)
    assert _pytree._get_node_type([1]) is list
    assert isinstance(SumMetric(), Metric)
    assert SumMetric()._defaults.keys() == {"sum_value"}
