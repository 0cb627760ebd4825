"""Recurrent layers step by step, where all examples run at once: torch's own kernels take one set of weights and no vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State, Tensor, Tensor | None], State]
"""``(what the input gives to the gates, state, weight and bias of the state)`` → the next state; its first part is put out."""

POSITIONS, WEIGHTS = 9, 2


def _gru(of_input: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    (hidden,) = state
    reset, update, new = of_input.chunk(3, -1)
    h_reset, h_update, h_new = F.linear(hidden, weight, bias).chunk(3, -1)
    candidate = torch.tanh(new + torch.sigmoid(reset + h_reset) * h_new)
    return (candidate + torch.sigmoid(update + h_update) * (hidden - candidate),)


def _lstm(of_input: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    hidden, cell = state
    enter, forget, new, leave = (of_input + F.linear(hidden, weight, bias)).chunk(4, -1)
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(cell), cell


def _tanh(of_input: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    return (torch.tanh(of_input + F.linear(state[0], weight, bias)),)


def _relu(of_input: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    return (torch.relu(of_input + F.linear(state[0], weight, bias)),)


CELLS: dict[Any, Cell] = {torch.gru: _gru, torch.lstm: _lstm, torch.rnn_tanh: _tanh, torch.rnn_relu: _relu}
"""torch's recurrence → one step of it, as its documentation gives it."""


def can_be_unrolled(func: Any, args: Sequence[Any], kwargs: Any) -> bool:
    """Whether ``func`` is a recurrence over a plain batch: neither packed sequences nor projected states."""
    if func not in CELLS or kwargs or len(args) != POSITIONS or not isinstance(args[2], (list, tuple)):
        return False
    _, _, weights, has_biases, layers, _, _, bidirectional, _ = args
    return bool(len(weights) == layers * (1 + bidirectional) * WEIGHTS * (1 + has_biases))


def unrolled(
    func: Any,
    inputs: Tensor,
    start: Any,
    weights: Sequence[Tensor],
    has_biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """What torch's recurrence ``func`` gives for the same arguments, by one matrix product a step.

    Args:
        func: a key of :data:`CELLS`.
        inputs: ``(time, batch, features)``, or batch first.
        start: the first state, ``(layers · directions, batch, hidden)``; a pair for the LSTM.
        weights: of each layer and direction: of the input, of the state, and the biases of the two.
        has_biases: whether there are any.
        layers: how many, one on the other.
        dropout: between layers.
        train: whether to drop.
        bidirectional: whether each layer also runs backwards.
        batch_first: which axis of inputs and outputs is the batch's.

    Returns:
        The outputs and the last state, in parts.
    """
    cell, states = CELLS[func], start if isinstance(start, (list, tuple)) else (start,)
    each, directions = WEIGHTS * (1 + has_biases), 1 + bidirectional
    x = inputs.transpose(0, 1) if batch_first else inputs
    ends: list[State] = []
    for layer in range(layers):
        outputs = []
        for place in range(layer * directions, (layer + 1) * directions):
            of_input, of_state, *biases = weights[place * each : (place + 1) * each]
            input_bias, state_bias = biases or (None, None)
            gates, state = F.linear(x, of_input, input_bias), tuple(part[place] for part in states)
            backwards, puts_out = place % directions == 1, []
            for time in reversed(range(len(x))) if backwards else range(len(x)):
                state = cell(gates[time], state, of_state, state_bias)
                puts_out.append(state[0])
            outputs.append(torch.stack(puts_out[::-1] if backwards else puts_out))
            ends.append(state)
        x = torch.cat(outputs, -1)
        if dropout and train and layer + 1 < layers:
            x = F.dropout(x, dropout)
    last = (torch.stack(parts) for parts in zip(*ends, strict=True))
    return (x.transpose(0, 1) if batch_first else x, *last)
