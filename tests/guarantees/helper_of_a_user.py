"""A file of somebody's that keeps a generator, as a module of augmentations does."""

from __future__ import annotations

import random

import numpy as np

GENERATOR = np.random.default_rng(0)
_PRIVATE = random.Random(0)


def drawn() -> float:
    """From a generator that only this file knows."""
    return _PRIVATE.random()
