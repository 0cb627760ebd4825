"""What a training_step under manual optimization does to its optimizers, as found before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import nn


@dataclass(frozen=True)
class Script:
    """Who steps when, and on what.

    Attributes:
        batches: for each of the first batches the optimizers that step, in order, by their place in
            ``configure_optimizers``.
        placeholder: the batch without anybody's data on which training_step runs.
        public: places of the optimizers that see no private data.
        private: places of the others.
    """

    batches: tuple[tuple[int, ...], ...]
    placeholder: Any
    public: frozenset[int]
    private: tuple[int, ...]

    @property
    def fewest_steps(self) -> int:
        """The fewest optimizer steps in a batch, so that ``max_steps`` can be turned into a number of batches."""
        return max(1, min((len(steps) for steps in self.batches if steps), default=1))

    def taken(self, index: int) -> int:
        """How many optimizer steps come before this batch."""
        return sum(map(len, self.batches[:index]))


def held_by_optimizers(module: pl.LightningModule) -> list[dict[str, nn.Parameter]]:
    """For each optimizer the trainable parameters it holds, by name."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    held = [{id(p) for group in one.param_groups for p in group["params"]} for one in module.trainer.optimizers]
    return [{name: p for name, p in named if id(p) in ids} for ids in held]
