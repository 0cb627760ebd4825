"""Secret by default, reproducible on request, and the report says which."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from lightning_dp import DifferentialPrivacy
from tests.conftest import Regressor, loader, regressor, sample_of, trainer, weights


def train(seed: int | None = None, **options: int) -> Tensor:
    L.seed_everything(0, verbose=False)
    module = regressor()
    trainer(DifferentialPrivacy(noise_multiplier=1.0, seed=seed, **options), max_steps=3).fit(module, loader())
    return weights(module)


def test_seed_everything_fixes_neither_noise_nor_sampling() -> None:
    assert not torch.allclose(train(), train(), atol=1e-4)


def test_seed_everything_does_not_fix_the_samples_either() -> None:
    drawn = []
    for _ in range(2):
        L.seed_everything(0, verbose=False)
        module, seen = regressor(), []
        module.on_train_batch_start = lambda batch, batch_idx, seen=seen, module=module: seen.append(
            sample_of(module.trainer).indices.tolist()
        )
        trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=3).fit(module, loader())
        drawn.append(seen)
    assert drawn[0] != drawn[1]


def test_a_seed_makes_a_run_reproducible_and_another_seed_changes_it() -> None:
    assert torch.equal(train(seed=1), train(seed=1))
    assert not torch.allclose(train(seed=1), train(seed=2), atol=1e-4)


@pytest.mark.parametrize("seed", [None, 4])
def test_the_statement_says_where_the_randomness_comes_from(seed: int | None) -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0, seed=seed)
    trainer(private, max_steps=1).fit(regressor(), loader())
    statement = private.statement()
    assert statement.randomness == ("secret" if seed is None else "reproducible")
    assert any("seed" in caveat for caveat in statement.caveats) == (seed is not None)


def test_dropout_is_reproducible_with_a_seed_and_leaves_the_global_generator_alone() -> None:
    class Dropped(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    def run(global_seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        module = Dropped()
        torch.manual_seed(global_seed)
        before = torch.random.get_rng_state()
        trainer(DifferentialPrivacy(noise_multiplier=0.0, seed=1), max_steps=3, num_sanity_val_steps=0).fit(
            module, loader()
        )
        return weights(module), torch.equal(before, torch.random.get_rng_state())

    (first, _), (second, _) = run(1), run(2)
    assert torch.equal(first, second)


class Still(Regressor):
    """Its gradient is zero: what moves the weights is the noise."""

    def __init__(self) -> None:
        super().__init__(hidden=500, lr=1.0)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return 0.0 * super().training_step(batch, batch_idx)


def test_noise_is_independent_across_steps() -> None:
    module, moves = Still(), []
    last = weights(module).clone()

    def remember(*_: object) -> None:
        nonlocal last
        moves.append((weights(module) - last).numpy().astype(np.float64))
        last = weights(module).clone()

    module.on_train_batch_end = remember
    trainer(DifferentialPrivacy(noise_multiplier=1.0, expected_batch_size=16), max_steps=6).fit(module, loader())
    stacked = np.stack(moves) * 16
    assert stats.kstest(stacked.ravel(), stats.norm().cdf).pvalue > 1e-6
    correlation = np.corrcoef(stacked)[~np.eye(len(stacked), dtype=bool)]
    assert np.abs(correlation).max() < 6 / np.sqrt(stacked.shape[1])


def test_an_unused_parameter_is_noised_like_every_other() -> None:
    """Leaving it out would tell which parameters the data touched."""
    module = Regressor(lr=1.0)
    module.unused = nn.Parameter(torch.zeros(5000))
    trainer(DifferentialPrivacy(noise_multiplier=2.0, expected_batch_size=16), max_steps=1).fit(module, loader())
    assert stats.kstest(module.unused.detach().numpy() * 16 / 2, stats.norm().cdf).pvalue > 1e-6


def test_a_storm_of_empty_draws_is_noise_and_accounted_steps() -> None:
    """Expected batch 1 of 64 000: nearly every step is empty; each is a full step all the same."""
    module = Regressor(lr=1.0)
    module.unused = nn.Parameter(torch.zeros(4000))
    private = DifferentialPrivacy(noise_multiplier=1.0, expected_batch_size=1, dataset_size=64_000)
    trainer(private, max_steps=16).fit(module, loader())
    assert private.ledger is not None
    assert private.ledger.steps == 16
    assert stats.kstest(module.unused.detach().numpy() / 4, stats.norm().cdf).pvalue > 1e-6  # √16 steps of N(0, 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_example_without_a_finite_gradient_contributes_nothing_and_is_counted(bad: float) -> None:
    inputs = torch.randn(8, 4)
    targets = torch.randn(8)
    inputs[3] = bad
    module, clean = regressor(), regressor()
    data = torch.utils.data.TensorDataset(inputs, targets)
    rest = torch.utils.data.TensorDataset(inputs[[0, 1, 2, 4, 5, 6, 7]], targets[[0, 1, 2, 4, 5, 6, 7]])
    options = {"noise_multiplier": 0.0, "clip_norm": 0.5, "log_train_metrics": False}
    with pytest.warns(UserWarning, match=r"2 per-example gradients .* were not finite"):
        trainer(DifferentialPrivacy(**options, expected_batch_size=8), max_steps=2).fit(module, loader(data, 8))
    trainer(DifferentialPrivacy(**options, expected_batch_size=7), max_steps=2).fit(clean, loader(rest, 7))
    assert bool(torch.isfinite(weights(module)).all())
    start = weights(regressor())
    # the same sum over 8 instead of 7: to first order the move is 7/8 of the other
    torch.testing.assert_close((weights(module) - start) * 8 / 7, weights(clean) - start, rtol=0.2, atol=0.02)


def test_a_huge_sigma_does_not_learn() -> None:
    """Without noise the same steps learn: the private objects are really used."""

    def loss(sigma: float) -> float:
        module = regressor(lr=0.3)
        trainer(DifferentialPrivacy(noise_multiplier=sigma, clip_norm=1.0), max_steps=200).fit(module, loader())
        inputs, targets = loader(batch_size=64).dataset.tensors
        return float(nn.functional.mse_loss(module.net(inputs).squeeze(-1), targets).detach())

    assert loss(0.0) < 0.2
    assert loss(1000.0) > 1.0
