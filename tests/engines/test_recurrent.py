"""Recurrent layers run for all examples at once and give the gradients that torch's own kernels give one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.vmap import VmapEngine
from tests.engines.against_loop import same

LAYERS: dict[str, Any] = {
    "gru": lambda: nn.GRU(3, 4, batch_first=True),
    "gru, two layers, both ways": lambda: nn.GRU(3, 4, 2, bidirectional=True, batch_first=True),
    "gru without biases, time first": lambda: nn.GRU(3, 4, bias=False),
    "lstm": lambda: nn.LSTM(3, 4, batch_first=True),
    "lstm, two layers, both ways": lambda: nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True),
    "rnn": lambda: nn.RNN(3, 4, 2, batch_first=True),
    "rnn with relu": lambda: nn.RNN(3, 4, nonlinearity="relu", bidirectional=True),
}


@pytest.mark.parametrize("engine", ["ghost", "vmap"])
@pytest.mark.parametrize("name", LAYERS)
def test_all_at_once_is_one_by_one(name: str, engine: str) -> None:
    torch.manual_seed(0)
    module, inputs = LAYERS[name]().double(), torch.randn(5, 6, 3, dtype=torch.float64)

    def loss_function(parameters: Mapping[str, Tensor], batch: Tensor) -> tuple[Tensor, Any]:
        sequences = batch if module.batch_first else batch.transpose(0, 1)
        outputs, state = functional_call(module, dict(parameters), (sequences,))
        last = state[1] if isinstance(state, tuple) else state
        return outputs.square().mean() + torch.sin(last).sum(), {"output": outputs}

    run = (loss_function, dict(module.named_parameters()), inputs, 5, 0.5)
    found = (GhostEngine(module) if engine == "ghost" else VmapEngine()).clipped_sum(*run)
    same(found, LoopEngine().clipped_sum(*run))


def test_dropout_between_layers_is_drawn_for_each_example() -> None:
    module = nn.GRU(3, 4, 2, dropout=0.5, batch_first=True)

    def loss_function(parameters: Mapping[str, Tensor], batch: Tensor) -> tuple[Tensor, Any]:
        outputs, _ = functional_call(module, dict(parameters), (batch,))
        return outputs.sum(), {"output": outputs}

    torch.manual_seed(0)
    inputs = torch.ones(6, 5, 3)
    found = VmapEngine().clipped_sum(loss_function, dict(module.named_parameters()), inputs, 6, 1.0)
    assert len({float(loss) for loss in found.losses}) == 6
    module.eval()
    found = VmapEngine().clipped_sum(loss_function, dict(module.named_parameters()), inputs, 6, 1.0)
    assert len({float(loss) for loss in found.losses}) == 1
