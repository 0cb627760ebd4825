"""The comparison that other tests rest on sees differences, wherever they are, and forgives rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.nearly import assert_nearly


@dataclass
class Found:
    tensor: torch.Tensor
    rest: Any


def found(moved: float = 0.0, where: str = "") -> Found:
    return Found(
        torch.tensor([1.0, 2.0], dtype=torch.float64) + moved * (where == "tensor"),
        {"number": 3.0 + moved * (where == "number"), "list": [1, (2.0 + moved * (where == "tuple"), "name", None)]},
    )


def test_rounding_is_forgiven_and_nothing_else() -> None:
    assert_nearly(found(), found())
    for where in ("tensor", "number", "tuple"):
        assert_nearly(found(1e-12, where), found())
        with pytest.raises(AssertionError, match="value"):
            assert_nearly(found(1e-6, where), found())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a", "b"), ([1.0], [1.0, 2.0]), ({"a": 1.0}, {"b": 1.0}), (1.0, None), ((1.0,), [1.0]), (1, 2), (True, False),
        (torch.ones(2), torch.ones(2, dtype=torch.float64)), (torch.ones(2), torch.ones(1)), (float("inf"), 1.0),
    ],
)  # fmt: skip
def test_other_differences_are_seen(one: Any, other: Any) -> None:
    with pytest.raises(AssertionError):
        assert_nearly(one, other)
