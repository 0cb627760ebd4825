"""Book-keeping: clipped sums from one forward and one backward pass that computes no weight gradient of the batch.

    training_step under vmap → calls of layers → gradient of each call's output → each example's norm → weighted sum

``engine``       the passes, the clipping and the sum
``registry``     which layers and functions have a rule: each says so by a decorator
``rules``        one file for each kind of layer; a new rule is a new file
``layers``       the forward pass of a layer with a rule while the engine runs
``reparametrised`` layers that compute their weight from other parameters
``call``         one call of a layer: its physical input and the gradient of its output
``contribution`` what one call adds to each example's gradient of one parameter
``bringing``     parameters that somebody else keeps, brought for a call; ``coverage``: which can be

Whatever has no rule gets a copy of its parameters for each example, as under ``vmap``, so nothing is ever left out.
"""

from lightning_dp.engines.ghost import rules
from lightning_dp.engines.ghost.engine import GhostEngine

__all__ = ["GhostEngine", "rules"]
