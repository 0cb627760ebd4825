"""training_step on an example that has the form of the data and nothing of their content."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_dp.batches.microbatch import batch_of_one
from lightning_dp.batches.units import of_two
from lightning_dp.engines.protocol import LossFunction
from lightning_dp.loading.placeholder import without_content
from lightning_dp.step.planned import Planned


class WithoutData:
    """Runs training_step on an example that has the form of the data and nothing of their content.

    Args:
        planned: of whose first example the form is taken, once, when it is first asked for.
    """

    def __init__(self, planned: Planned) -> None:
        self._planned = planned
        self._example: Any = None

    def __call__(self, loss_function: LossFunction, parameters: Mapping[str, Tensor]) -> tuple[Tensor, Any]:
        """What the loss function gives.

        Raises:
            TypeError: the batch holds objects whose content nobody can remove.
        """
        if self._example is None:
            form, (raw, examples) = self._planned.form, self._planned.loader.first_examples(1)
            example = form.with_views(form.to_engine(raw), np.arange(examples), torch.initial_seed())
            self._example = batch_of_one(without_content(of_two(example, examples, form.units)), 0)
        with torch.enable_grad():
            return loss_function(parameters, self._example)
