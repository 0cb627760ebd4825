"""Views mixed of an example's own views, or of these and public images: row by row, with the weights' law, at one clip."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy, verify
from lightning_dp.batches.mixing import MixPublic, MixSelf, MixViews
from lightning_dp.batches.transforms import Compose, Crop, Flip
from lightning_dp.batches.views import Views, view_uniforms
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.sampling import poisson_sample
from tests.batches.views.test_views import EXAMPLES, classifier, data, fit
from tests.conftest import trainer, weights

POOL = torch.randn(7, 2, 6, 6, generator=torch.Generator().manual_seed(1))
BOTH = (MixSelf(3, alpha=0.5), MixPublic(POOL, 2, alpha=0.5))


def parts(mix: MixViews, examples: int, k: int, size: int) -> Tensor:
    """How much of each of the K views (and, after them, of each public image) is in every mixed view."""
    basis = torch.eye(size)
    views = basis[:k].expand(examples, k, size).clone()
    uniforms = torch.rand(examples, mix.draws, generator=torch.Generator().manual_seed(3))
    return mix(views, uniforms)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_weights_have_the_law_of_beta_and_pairs_are_equally_likely(alpha: float) -> None:
    k, examples = 4, 6000
    mixed = parts(MixSelf(2, alpha), examples, k, k).double()
    torch.testing.assert_close(mixed.sum(-1), torch.ones(examples, 2, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    middle = mixed.sort(-1, descending=True).values
    assert float(middle[..., 2:].abs().max()) == 0.0  # of two views, no more
    larger = stats.beta(alpha, alpha)
    for at in (0.6, 0.8, 0.9, 0.99, 0.999):  # not nearer to 1, where float32 has few numbers
        share = 2 * larger.cdf(at) - 1
        assert abs(float((middle[:, 0, 0] <= at).double().mean()) - share) < 5 * (share * (1 - share) / examples) ** 0.5
    # where both weights can be told from nothing, which two views they belong to is even
    both = mixed[:, 0][(mixed[:, 0] > 1e-3).sum(-1) == 2]
    pairs = (both > 1e-3).nonzero()[:, 1].view(-1, 2)
    counts = np.bincount((pairs[:, 0] * k + pairs[:, 1]).numpy(), minlength=k * k)
    assert stats.chisquare(counts[counts > 0]).pvalue > 1e-4
    assert (counts > 0).sum() == k * (k - 1) // 2


def test_a_public_image_weighs_at_most_half_and_each_is_equally_likely() -> None:
    basis = torch.eye(9)
    mixed = parts(MixPublic(basis[4:], 3, 1.0), 4000, 4, 9)
    of_example = mixed[..., :4].sum(-1)
    assert float(of_example.min()) >= 0.5
    assert stats.kstest(of_example[:, 0].double().numpy(), stats.uniform(0.5, 0.5).cdf).pvalue > 1e-4
    chosen = mixed[:, 1, 4:].argmax(-1)
    assert stats.chisquare(np.bincount(chosen.numpy(), minlength=5)).pvalue > 1e-4


def test_a_row_is_mixed_of_itself_alone() -> None:
    views = torch.randn(5, 4, 2, 6, 6)
    for mix in BOTH:
        uniforms = torch.rand(5, mix.draws)
        whole = mix(views, uniforms)
        other = views.clone()
        other[2] = torch.randn_like(other[2])
        there = mix(other, uniforms)
        kept = [0, 1, 3, 4]
        torch.testing.assert_close(there[kept], whole[kept])
        assert not torch.allclose(there[2], whole[2])
        torch.testing.assert_close(mix(views[3:4], uniforms[3:4])[0], whole[3])


class _Cheats(MixViews):
    """Tries to see other examples or to keep something of this one."""

    views, draws = 1, 1

    def __init__(self, how: str) -> None:
        self.how = how

    def mix(self, views: Tensor, numbers: Tensor) -> Tensor:
        if self.how == "reads":
            return views[:1] * float(views.mean())
        if self.how == "draws":
            return views[:1] + torch.randn(1)
        return views[:0]


@pytest.mark.parametrize(
    ("how", "said"),
    [("reads", "item"), ("draws", "random"), ("shape", "_Cheats.mix made .* expected .*views=1 images")],
)
def test_what_is_written_for_one_example_cannot_do_more(how: str, said: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match=said):
        _Cheats(how)(torch.randn(3, 2, 2, 4, 4), torch.rand(3, 1))


def test_the_views_before_are_the_same_without_mixing() -> None:
    images, labels = data()[:6]
    plain = Views(3, Compose([Crop(), Flip()]))
    mixing = Views(3, plain.transform, None, BOTH)
    indices = np.arange(6)
    seen, soft = mixing.drawn((images, labels), indices, 11)
    assert mixing.total == 8
    assert seen.shape == (6, 8, *images.shape[1:])
    assert soft.shape == (6, 8)
    torch.testing.assert_close(seen[:, :3], plain.drawn((images, labels), indices, 11)[0])
    again, _ = mixing.drawn((images[4:], labels[4:]), indices[4:], 11)
    torch.testing.assert_close(again, seen[4:])


def by_hand(steps: int, seed: int, clip: float, batch: int) -> Tensor:
    """One example at a time: all its views in one loss, its gradient clipped once."""
    module, dataset, key = classifier(), data(), RandomKey.from_seed(seed)
    views = Views(2, Compose([Crop(), Flip()]), None, BOTH)
    parameters = list(module.net.parameters())
    for step in range(steps):
        total = torch.zeros_like(weights(module.net))
        view_seed = int.from_bytes(key.derive(Stream.VIEWS, step, size=8), "big")
        for index in poisson_sample(key.generator(Stream.SAMPLING, step), EXAMPLES, batch / EXAMPLES).tolist():
            image, label = dataset[index]
            base = view_uniforms(view_seed, np.array([index]), 2, views.transform.draws)
            mixing = view_uniforms(~view_seed % 2**64, np.array([index]), 1, views.draws)[:, 0]
            seen, soft = views.fold(views.expand((image[None], label[None]), 1, base, mixing))
            loss = F.cross_entropy(module.net(seen), soft)
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
            total += gradient * min(1.0, clip / float(gradient.norm()))
        torch.nn.utils.vector_to_parameters(weights(module.net) - 0.5 * total / batch, parameters)
    return weights(module.net)


@pytest.mark.parametrize(("engine", "size"), [("ghost", 5), ("vmap", 1), ("loop", 5)])
def test_the_gradient_over_mixed_views_is_clipped_once(engine: Any, size: int) -> None:
    module = classifier()
    private = DifferentialPrivacy(noise_multiplier=0.0, clip_norm=0.3, seed=2, engine=engine, physical_batch_size=size)
    fit(module, private, AugmentationMultiplicity(k=2, mix=BOTH))
    torch.testing.assert_close(weights(module.net), by_hand(3, 2, 0.3, 12), rtol=1e-4, atol=1e-5)


def test_verify_finds_nothing() -> None:
    fit_of_two = trainer(
        DifferentialPrivacy(noise_multiplier=1.0, clip_norm=0.5, seed=0),
        AugmentationMultiplicity(k=2, mix=BOTH),
        max_steps=2,
    )
    found = verify(fit_of_two, classifier(), torch.utils.data.DataLoader(data(), batch_size=12), steps=2, examples=6)
    assert found.ok


def test_without_privacy_the_views_are_mixed_as_well() -> None:
    module = classifier()
    fit(module, AugmentationMultiplicity(k=2, mix=BOTH))
    assert set(module.trained_on) == {(12 * 7, 2, 6, 6)}


def test_a_pool_is_read_from_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "pool.npy", POOL.numpy())
    torch.save(POOL, tmp_path / "pool.pt")
    for name in ("pool.npy", "pool.pt"):
        torch.testing.assert_close(MixPublic(str(tmp_path / name)).pool, POOL)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MixSelf(0), "views=0: expected at least 1"),
        (lambda: MixSelf(1.5), "views=1.5"),
        (lambda: MixSelf(1, alpha=0.0), "alpha=0.0: expected a number from 0.01"),
        (lambda: MixSelf(1, alpha=float("nan")), "alpha=nan"),
        (lambda: MixPublic(POOL[:0]), "at least one image"),
        (lambda: MixPublic(POOL * float("nan")), "expected finite"),
        (lambda: MixPublic((POOL * 3).to(torch.uint8)), "dtype torch.uint8: expected finite floating-point"),
        (lambda: MixPublic("nowhere.npy"), "nowhere.npy.*expected the path of a .npy or .pt file"),
        (lambda: MixPublic([1.0]), "public_images=list: expected a tensor"),
        (lambda: AugmentationMultiplicity(0, mix=MixSelf()), "k=0 with mix=MixSelf: expected at least 1 view"),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_pool_of_other_images_is_refused() -> None:
    mix = MixPublic(torch.randn(3, 2, 5, 5))
    with pytest.raises(ValueError, match=re.escape("public_images of shape (3, 2, 5, 5): expected (M, 2, 6, 6)")):
        mix(torch.randn(1, 2, 2, 6, 6), torch.rand(1, mix.draws))
