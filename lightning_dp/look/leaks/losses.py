"""Does the loss of a whole batch couple its examples? Under differential privacy every example is a batch of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_dp.engines.agreement import double, inert
from lightning_dp.engines.backward import plain_gradient
from lightning_dp.engines.protocol import LossFunction, scalar_loss
from lightning_dp.errors import PreflightError
from lightning_dp.look.leaks.kinds import SIGNS, Kind, kind_of_coupling
from lightning_dp.mechanism.seeded_globals import seed_torch
from lightning_dp.step.attributes import attributes_put_back

PROBES = 8
"""So many examples are looked at: four blocks of two, or of one where fewer than these may be worked on at once."""

SEEDS = {8: 3, 4: 8}
"""Random pairings (MixUp in training_step) are tried so often; what keeps blocks of two apart escapes once in 6³, and of
one once in 2⁸."""

KEPT = 4096
"""So many coordinates of each parameter's gradient are compared."""

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}
"""What is taken for rounding, as a part of the longest gradient. Some losses are float32 in a float64 module."""


class Reduction(Enum):
    """What a loss of a batch is, in terms of the losses of its examples."""

    MEAN = "the mean over its examples"
    SUM = "the sum over its examples"
    WEIGHTED = "neither the mean nor the sum over its examples"
    UNKNOWN = "random, so that it cannot be compared"


BatchOf = Callable[[list[int]], Any]
"""The batch of some of the examples, by their places, on the device."""


def pairs_of_blocks(examples: int) -> list[list[int]]:
    """The places of the examples in (a,b), (a',b), (a,b') and (a',b'), all blocks being of one size; ``examples`` is 4 or 8.

    Example:
        >>> pairs_of_blocks(4)
        [[0, 2], [1, 2], [0, 3], [1, 3]]
    """
    size = examples // 4
    a, a_, b, b_ = (list(range(start, start + size)) for start in range(0, 4 * size, size))
    return [a + b, a_ + b, a + b_, a_ + b_]


def check_loss_keeps_examples_apart(
    module: nn.Module, loss_function: LossFunction, parameters: Mapping[str, Tensor], batch_of: BatchOf, examples: int
) -> Reduction:
    """Refuse a training_step whose loss of a batch compares its examples with each other.

    Take blocks a, a', b, b' of examples. If no example moves another's gradient, a batch's gradient is
    G(x, y) = (s_x + s_y) / (n_x + n_y), with n constant for a mean, and zero but for a constant for a sum, and numbers of
    tokens or sums of class weights in between. Then G(a,b), G(a',b), G(a,b') and G(a',b') are linearly dependent, with
    coefficients of the signs + − − + that add up to zero. Four gradients that are not dependent in this way tell that one
    block moves another's gradient: in-batch negatives, MixUp, balancing of experts, statistics of the batch. With the same
    seed for each, dropout and other noise are the same function of the position and no cause for alarm.

    Nothing is released: what is learned is whether training goes on.

    Args:
        module: whose attributes are put back afterwards.
        loss_function: training_step on a batch of any number of examples.
        parameters: the trainable parameters.
        batch_of: gives half of the examples at once, or one, the same rows whenever it is asked for them.
        examples: how many there are, 4 or 8.

    Returns:
        How the loss of a batch is made of the losses of its examples.

    Raises:
        PreflightError: the loss couples examples.
    """
    pairs, whole = pairs_of_blocks(examples), _Whole(module, loss_function, parameters, batch_of)
    with attributes_put_back(module), torch.enable_grad():
        losses = [whole.loss(pairs[0], seed) for seed in (0, 1)]
        is_random = losses[0] != losses[1]
        for seed in range(SEEDS[examples] if is_random else 1):
            gradients = torch.stack([whole.gradient(pair, seed) for pair in pairs])
            if not _apart(gradients.double(), TOLERANCE[whole.dtype]):
                kind = whole.kind(gradients.double(), examples)
                raise PreflightError(
                    f"training_step couples examples: the loss of a batch {kind.what}: expected a loss that is a sum or a mean "
                    "over examples. Under differential privacy training_step sees one example at a time, so that part of the "
                    f"loss would silently be gone. {kind.remedy}"
                )
        return whole.reduction(pairs[0], None if is_random else losses[0])


class _Whole:
    """training_step on some of the examples at once, in float64 where the module lets it."""

    def __init__(
        self, module: nn.Module, loss_function: LossFunction, parameters: Mapping[str, Tensor], batch_of: BatchOf
    ) -> None:
        self.dtype = torch.float64
        self._module, self._loss_function, self._batch_of = module, loss_function, batch_of
        self._given = {name: double(p.detach()).requires_grad_() for name, p in parameters.items()}
        tensors = [*module.named_parameters(), *module.named_buffers()]
        self._fixed = {name: double(tensor.detach()) for name, tensor in tensors if name not in parameters}
        try:
            self._call([0], 0)
        except Exception:  # a module that makes float32 tensors of its own
            self.dtype = torch.float32
            self._fixed = {}
            self._given = {name: p.detach().requires_grad_() for name, p in parameters.items()}

    def loss(self, rows: list[int], seed: int) -> float:
        """The loss of a batch of these rows."""
        return float(self._call(rows, seed).detach())

    def gradient(self, rows: list[int], seed: int) -> Tensor:
        """Some coordinates of its gradient, ``(P,)``."""
        with isolate_rng():
            seed_torch(seed)
            *_, gradient = plain_gradient(self._on_all, self._given, self._rows(rows))
        return torch.cat([g.flatten()[:: max(1, g.numel() // KEPT)] for g in gradient.values()])

    def reduction(self, rows: list[int], together: float | None) -> Reduction:
        """Compare the loss of a batch, if it is known not to be random, with those of its rows, random layers being inert."""
        with inert(self._module):
            if together is None:
                together = self.loss(rows, 0)
                if together != self.loss(rows, 1):
                    return Reduction.UNKNOWN
            alone = torch.tensor([self.loss([row], 0) for row in rows], dtype=torch.float64)
        for value, reduction in ((alone.mean(), Reduction.MEAN), (alone.sum(), Reduction.SUM)):
            if abs(together - float(value)) <= TOLERANCE[self.dtype] * max(abs(together), 1e-6):
                return reduction
        return Reduction.WEIGHTED

    def kind(self, gradients: Tensor, examples: int) -> Kind:
        """In which way the loss couples, once four gradients have told that it does, random layers being inert."""
        size = examples // 4

        def of_blocks(blocks: list[int]) -> float:
            return self.loss([row for block in blocks for row in range(block * size, (block + 1) * size)], 0)

        with inert(self._module):
            pair = pairs_of_blocks(examples)[0]
            mixes = self.loss(pair, 0) != self.loss(pair, 1)
            gradients = gradients.nan_to_num(posinf=0.0, neginf=0.0).cpu()
            return kind_of_coupling(
                gradients, of_blocks, lambda rows: self.gradient(rows, 0), TOLERANCE[self.dtype], mixes=mixes
            )

    def _call(self, rows: list[int], seed: int) -> Tensor:
        with isolate_rng():
            seed_torch(seed)
            loss, _ = self._on_all(self._given, self._rows(rows))
        return scalar_loss(loss)

    def _on_all(self, given: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, Any]:
        return self._loss_function({**self._fixed, **given}, batch)

    def _rows(self, rows: list[int]) -> Any:
        batch = self._batch_of(rows)
        return pytree.tree_map(double, batch) if self.dtype == torch.float64 else batch


def _apart(gradients: Tensor, tolerance: float) -> bool:
    """Whether four gradients G(a,b), G(a',b), G(a,b'), G(a',b') may come from a loss that keeps examples apart."""
    gradients = gradients.nan_to_num(posinf=0.0, neginf=0.0).cpu()
    size = float(gradients.norm(dim=1).max())
    if size == 0.0 or float((SIGNS @ gradients).norm()) <= tolerance * size:
        return True
    left, values, _ = torch.linalg.svd(gradients / size, full_matrices=False)
    if len(values) < len(SIGNS) or values[2] <= tolerance:
        return True  # too few coordinates, or examples too much alike, to tell
    null = left[:, 3] * left[0, 3].sign()
    rounding = min(0.01, max(10 * tolerance, 1e-6 / float(values[2])))  # of float32 in that direction
    balanced = bool((null.sign() == SIGNS).all()) and abs(float(null.sum())) <= rounding
    return bool(values[3] <= tolerance) and balanced
