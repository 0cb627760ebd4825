"""In which way the loss of a batch couples its examples, for the refusal: what a user should look for, and change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """A way of coupling.

    Attributes:
        what: the loss does, after "the loss of a batch".
        remedy: a sentence.
    """

    what: str
    remedy: str


SCALED = Kind(
    "is multiplied or divided by a number made of the whole batch, as its number of positives (at least one), a weight of the "
    "batch or a metric",
    "Divide by a constant, such as the expected number, or take each example's own number.",
)
NORMALISED = Kind(
    "is a sum divided by another sum over the batch that moves with the weights, as a normalised focal loss or a Dice or "
    "Jaccard loss over the batch",
    "Switch that normalisation off (normalized=False), or take the loss of each example and then the mean (reduction='none', "
    "or sums over each example's own pixels).",
)
PAIRS = Kind(
    "compares its examples with each other, and that of a single example has no gradient, as in-batch negatives (contrastive "
    "losses), pairs and triplets have none",
    "Let every record of the dataset bring its own pair or negatives.",
)
MIXED = Kind(
    "draws at random which examples enter each other's, as MixUp and CutMix do",
    "Mix within a record, or leave the mixing out.",
)
STATISTICS = Kind(
    "depends on statistics of the batch, as a mean or variance over its examples, the balancing of experts, the hardest "
    "examples of the batch or weights by the classes in it",
    "Take them from public numbers or from each example alone, or leave that part out.",
)

SIGNS = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)


def null_combination(gradients: Tensor, tolerance: float) -> Tensor | None:
    """The coefficients with which four gradients, ``(4, P)``, of length one at most, add up to zero, if they do in one way."""
    left, values, _ = torch.linalg.svd(gradients, full_matrices=False)
    if len(values) < len(SIGNS) or values[3] > tolerance:
        return None
    null: Tensor = left[:, 3] * left[0, 3].sign()
    return null


def kind_of_coupling(
    gradients: Tensor,
    loss: Callable[[list[int]], float],
    gradient: Callable[[list[int]], Tensor],
    tolerance: float,
    *,
    mixes: bool,
) -> Kind:
    """The kind found. It decides nothing but the words of a refusal.

    With s and n sums over a block's own examples, a loss S/h(batch) has gradients of whole batches that are dependent with
    the signs + − − +, whatever h is. A loss S/N whose N moves with the weights has, for any two blocks x and y, the value
    w·L(x) + (1 − w)·L(y), where w/(1 − w) = N_x/N_y: so these ratios multiply as ratios do.

    Args:
        gradients: of (a,b), (a',b), (a,b') and (a',b'), ``(4, P)``.
        loss: of some of the blocks a, a', b, b', by their places 0 to 3, random layers at rest.
        gradient: of the loss of a single example.
        tolerance: what is rounding.
        mixes: whether the loss draws at random, random layers at rest.
    """
    size = float(gradients.norm(dim=1).max())
    null = null_combination(gradients / size, tolerance)
    if null is not None and bool((null.sign() == SIGNS).all()):
        return SCALED
    try:
        if float(gradient([0]).norm()) <= tolerance * size:
            return PAIRS
        if not mixes and _is_a_weighted_mean(loss):
            return NORMALISED
    except Exception:  # single examples or blocks have no such loss
        return MIXED if mixes else STATISTICS
    return MIXED if mixes else STATISTICS


def _is_a_weighted_mean(loss: Callable[[list[int]], float]) -> bool:
    alone = [loss([block]) for block in range(4)]
    pairs = {(x, y): loss([x, y]) for x in (0, 1) for y in (2, 3)}
    for scale in (1.0, 2.0):  # divided by the number of examples besides, a batch of two blocks has half of it
        ratios = {}
        for (x, y), together in pairs.items():
            to_x, to_y = alone[x] - scale * together, scale * together - alone[y]
            if to_x * to_y <= 0:  # not between the two
                break
            ratios[x, y] = to_x / to_y
        else:
            one, other = ratios[0, 2] * ratios[1, 3], ratios[0, 3] * ratios[1, 2]
            if abs(one - other) <= 1e-3 * abs(one + other):
                return True
    return False
