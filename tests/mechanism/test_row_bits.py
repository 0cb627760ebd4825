"""Random numbers of many examples at once: each a function of its example's key and its position alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from lightning_dp.mechanism import row_bits as module
from lightning_dp.mechanism.counters import splitmix64
from lightning_dp.mechanism.row_bits import (
    DIGITS,
    keys_of_draw,
    mixed,
    row_bits,
    row_hits,
    row_integers,
    row_normals,
    row_uniforms,
)

KEYS = keys_of_draw(mixed(torch.arange(40)), 2**62 + 5)
Make = Callable[[Tensor, tuple[int, ...]], Tensor]
KINDS: dict[str, Make] = {
    "hits": lambda keys, shape: row_hits(keys, shape, torch.float32, 0.3),
    "uniforms": lambda keys, shape: row_uniforms(keys, shape, torch.float32),
    "uniforms in float64": lambda keys, shape: row_uniforms(keys, shape, torch.float64),
    "normals": lambda keys, shape: row_normals(keys, shape, torch.float32),
    "integers": lambda keys, shape: row_integers(keys, shape, -2, 9),
}


def test_the_bits_are_those_of_splitmix64() -> None:
    """Of another implementation, with NumPy's unsigned numbers."""
    found = row_bits(KEYS, 7, start=3).numpy().view(np.uint64)
    for key, row in zip(KEYS.tolist(), found, strict=True):
        assert (row == splitmix64(key % 2**64, np.arange(4, 11, dtype=np.uint64))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_depends_on_its_key_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on other rows, nor on blocks of work, nor on how its part of the shape is written."""
    make = KINDS[kind]
    together = make(KEYS, (40, 3, 7))
    some = [5, 39, 0]
    assert torch.equal(make(KEYS[some], (3, 21)), together[some].flatten(1))
    assert torch.equal(make(KEYS[:20], (60, 7)).reshape(20, 3, 7), together[:20])
    for block in (1, 4, 64):
        monkeypatch.setattr(module, "BLOCK", block)
        assert torch.equal(make(KEYS, (40, 3, 7)), together)
    assert len({tuple(row.flatten().tolist()) for row in together}) == 40


@pytest.mark.parametrize("dtype", DIGITS)
def test_uniform_numbers_and_their_quantiles_have_the_law(dtype: torch.dtype) -> None:
    uniforms = row_uniforms(KEYS, (40, 500), dtype).double().flatten()
    assert 0.0 <= float(uniforms.min()) <= float(uniforms.max()) < 1.0
    continuous = uniforms + torch.rand(20_000, dtype=torch.float64) * 2.0 ** -DIGITS[dtype]
    assert stats.kstest(continuous.numpy(), "uniform").pvalue > 1e-6
    normals = row_normals(KEYS, (40, 500), dtype).double().flatten()
    smooth = normals + torch.randn(20_000, dtype=torch.float64) * float(torch.finfo(dtype).eps)
    assert stats.kstest(smooth.numpy(), "norm").pvalue > 1e-6
    assert float(row_uniforms(KEYS, (40, 500), dtype, inside=True).min()) > 0.0


def test_hits_and_integers_have_the_law() -> None:
    hits = int(row_hits(KEYS, (40, 500), torch.int64, 0.3).sum())
    assert stats.binomtest(hits, 20_000, 0.3).pvalue > 1e-6
    counts = torch.bincount(row_integers(KEYS, (40, 500), -2, 9).flatten() + 2, minlength=11)
    assert len(counts) == 11
    assert stats.chisquare(counts.numpy()).pvalue > 1e-6
    assert bool(row_hits(KEYS, (40, 500), torch.bool, 1.0).all())
    assert not bool(row_hits(KEYS, (40, 500), torch.bool, 0.0).any())


def test_neighbours_in_key_position_and_draw_are_not_correlated() -> None:
    first, second = (
        row_uniforms(keys_of_draw(mixed(torch.arange(40)), draw), (40, 500), torch.float64) for draw in (0, 1)
    )
    for one, other in ((first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        correlation = float(np.corrcoef(one.flatten().numpy(), other.flatten().numpy())[0, 1])
        assert abs(correlation) < 6 / 20_000**0.5
