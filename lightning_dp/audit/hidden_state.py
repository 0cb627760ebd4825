"""What a step can read besides weights and batch, as far as it can be listed: to say why two runs differ."""

from __future__ import annotations

import inspect
import random
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from lightning_dp.audit.sketch import Leaf, leaves
from lightning_dp.engines.user_code import is_users
from lightning_dp.lightning_internals import KEPT_BY_LIGHTNING
from lightning_dp.step.attributes import TORCH_KEEPS

PLAIN = (Tensor, np.ndarray, np.generic, int, float, str, list, tuple, dict, deque, set, Counter)
"""Values of these kinds are looked at."""

_SKIPPED = TORCH_KEEPS | KEPT_BY_LIGHTNING

GENERATORS = "random numbers of "
"""What the names of generators begin with."""


def hidden_state(module: pl.LightningModule) -> dict[str, Leaf]:
    """Attributes of the module and of modules in it, of their classes, globals that they name, and random generators."""
    found: dict[str, Leaf] = {}
    for name, value in _named(module):
        if isinstance(value, PLAIN):
            if isinstance(value, (deque, set)):
                value = list(value) if isinstance(value, deque) else sorted(value, key=repr)
            found |= leaves(value, name)
    array: Any = np.random.get_state()  # noqa: NPY002 (the generator that old code draws from)
    states = {"torch": torch.get_rng_state().numpy().tobytes(), "numpy": array[1].tobytes() + bytes([array[2] % 251])}
    states["random"] = repr(random.getstate()).encode()
    return found | {f"{GENERATORS}{name}": Leaf(str(hash(state)), None) for name, state in states.items()}


def _named(module: pl.LightningModule) -> Iterator[tuple[str, Any]]:
    for path, one in module.named_modules():
        for name, value in vars(one).items():
            if name not in _SKIPPED and not name.endswith("_hooks"):
                yield f"self.{path}.{name}" if path else f"self.{name}", value
    for kind in type(module).__mro__:
        if not is_users(source_of(kind)):
            continue
        for name, value in vars(kind).items():
            if not name.startswith("__"):
                yield f"{kind.__name__}.{name}", value
            code = getattr(value, "__code__", None)
            if code is None:
                continue
            yield from ((word, value.__globals__[word]) for word in code.co_names if word in value.__globals__)
            for word, cell in zip(code.co_freevars, value.__closure__ or (), strict=True):
                yield word, cell.cell_contents


def source_of(kind: Any) -> str | None:
    """The file that a class or function is written in, if there is one."""
    try:
        return inspect.getsourcefile(kind)
    except (TypeError, OSError):
        return None
