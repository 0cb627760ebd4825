"""Values that people, YAML files and broken programs hand in, and a count of how many were tried."""

from __future__ import annotations

import math
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

TRIED: Counter[str] = Counter()
"""Name of a test → how many inputs it has generated."""


class Unprintable:
    """Even its repr fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


ODD = (
    None, True, False, "", "8", "eight", "nan", "inf", "1e-5", "2*3", b"8", [], [1.0], (), {}, {"epsilon": 8}, set(), object(),
    Unprintable(), 0, -0.0, -1, 1, 2, 10**400, -(10**400), 2**63, 1e308, 5e-324, math.nan, math.inf, -math.inf, 1e-31,
    np.float32(1.5), np.float64(0.1), np.int64(7), np.bool_(True), np.array(1.0), np.array([1.0, 2.0]), torch.tensor(1.0),
    torch.tensor([1.0, 2.0]), torch.tensor(True), Decimal("0.1"), Fraction(1, 3), 1j, lambda: 1.0, int, "None", "null",
)  # fmt: skip

anything: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(ODD),
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.floats(), max_size=2),
)

plain: st.SearchStrategy[Any] = st.one_of(  # what torch.load(weights_only=True) or JSON can bring
    st.sampled_from(
        [None, True, False, "", "8", [], {}, [{}], 0, -1, 1, 10**400, 2**63, math.nan, math.inf, -math.inf, 1e-300]
    ),
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=3),
)

ARGUMENTS_TRIED = {
    "callback": 4000,
    "one argument": 400,
    "audit": 150,
    "plan": 1500,
    "others": 200,
    "recipe": 1000,
    "command line": 400,
    "accountant": 200,
}
STATES_TRIED = {
    "ledger fields": 2500,
    "states with a digest": 2000,
    "checkpoints": 300,
    "journals": 500,
    "lineages": 300,
}
assert sum((ARGUMENTS_TRIED | STATES_TRIED).values()) >= 10_000


def as_many_as_promised(promised: dict[str, int]) -> dict[str, int]:
    """The generators that ran and gave less than that (hypothesis stops early where it has seen everything)."""
    return {name: TRIED[name] for name, least in promised.items() if 0 < TRIED[name] < least}
