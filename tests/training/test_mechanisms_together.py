"""Samplings, clip norms, noises and filters in all combinations: each runs as any engine runs it, or is refused by name."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from lightning_dp import DifferentialPrivacy
from tests.conftest import loader, regressor, trainer, weights

ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "sampling": ("poisson", "cyclic_poisson", "random_allocation", "balls_in_bins"),
    "clipping": ("flat", "quantile", "slaclip"),
    "noise": ("independent", "banded", "lambda"),
    "gradient_filter": (None, "disk"),
}
COMBINATIONS = [dict(zip(ARGUMENTS, values, strict=True)) for values in itertools.product(*ARGUMENTS.values())]


def goes_together(asked: dict[str, Any]) -> bool:
    """What docs/mechanisms.md says."""
    correlated = asked["noise"] != "independent"
    if (
        asked["sampling"] not in ("cyclic_poisson", "balls_in_bins")
        if correlated
        else asked["sampling"] == "cyclic_poisson"
    ):
        return False
    return not (correlated and (asked["clipping"] in ("quantile", "slaclip") or asked["gradient_filter"]))


def run(asked: dict[str, Any], **how: Any) -> tuple[torch.Tensor, float]:
    private = DifferentialPrivacy(noise_multiplier=1.0, clip_norm=0.5, noise_bands=2, seed=1, **asked, **how)
    module = regressor()
    trainer(private, max_steps=4).fit(module, loader())
    assert private.ledger is not None
    assert private.ledger.steps == 4
    return weights(module), private.ledger.epsilon().epsilon


@pytest.mark.parametrize(
    "asked", [*filter(goes_together, COMBINATIONS)], ids=lambda asked: " ".join(map(str, asked.values()))
)
@pytest.mark.filterwarnings("ignore:max_steps=4")
def test_engine_and_micro_batch_change_neither_weights_nor_epsilon(asked: dict[str, Any]) -> None:
    one, epsilon = run(asked, engine="vmap", physical_batch_size=3)
    other, same = run(asked, engine="loop", physical_batch_size=50)
    assert math.isfinite(epsilon)
    assert same == pytest.approx(epsilon, rel=1e-9)
    assert not torch.equal(one, weights(regressor()))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_is_not_proved_together_is_refused_by_two_names() -> None:
    for asked in itertools.filterfalse(goes_together, COMBINATIONS):
        with pytest.raises(ValueError, match="expected") as refusal:
            run(asked)
        named = [name for name, values in ARGUMENTS.items() if f"{name}={asked[name]!r}" in str(refusal.value)]
        assert len(named) >= 2, str(refusal.value)
