"""K views: the gradient is the mean of K single-view gradients, clipped once, whatever the engine and the micro-batch."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy
from lightning_dp.batches.transforms import Compose, Crop, EachImage, Flip, ViewTransform
from lightning_dp.batches.views import ViewError, Views, view_uniforms
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.sampling import poisson_sample
from tests.conftest import trainer, weights
from tests.nearly import assert_nearly

EXAMPLES, SIZE, CLASSES = 24, 6, 3


class Classifier(L.LightningModule):
    """A small convolutional network that keeps notes of the batches it is given."""

    def __init__(self, lr: float = 0.5) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, CLASSES))
        self.accuracy = MulticlassAccuracy(CLASSES)
        self.lr = lr
        self.trained_on: list[tuple[int, ...]] = []
        self.validated_on: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        self.trained_on.append(tuple(images.shape))
        logits = self.net(images)
        self.accuracy(logits, labels)
        self.log("train/accuracy", self.accuracy, on_step=False, on_epoch=True)
        return F.cross_entropy(logits, labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.validated_on.append(batch[0])
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=self.lr)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(EXAMPLES, 2, SIZE, SIZE, generator=generator), torch.arange(EXAMPLES) % CLASSES)


def classifier(**options: Any) -> Classifier:
    torch.manual_seed(0)
    return Classifier(**options)


def fit(
    module: L.LightningModule, *callbacks: L.Callback, steps: int = 3, batch: int = 12, dataset: Any = None
) -> None:
    trainer(*callbacks, max_steps=steps).fit(module, DataLoader(dataset or data(), batch_size=batch, shuffle=True))


def by_hand(k: int, transform: ViewTransform, steps: int, *, seed: int, clip: float, batch: int, lr: float) -> Tensor:
    """DP-SGD without noise: single-view gradients one by one, averaged per example, then clipped."""
    module, dataset, key = classifier(), data(), RandomKey.from_seed(seed)
    parameters = list(module.net.parameters())
    for step in range(steps):
        total = torch.zeros_like(weights(module.net))
        view_seed = int.from_bytes(key.derive(Stream.VIEWS, step, size=8), "big")
        for index in poisson_sample(key.generator(Stream.SAMPLING, step), EXAMPLES, batch / EXAMPLES).tolist():
            image, label = dataset[index]
            numbers = view_uniforms(view_seed, np.array([index]), k, transform.draws)[0]
            single = []
            for view in range(k):
                seen = transform(image[None], numbers[view : view + 1])
                loss = F.cross_entropy(module.net(seen), label[None])
                single.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
            gradient = torch.stack(single).mean(0)
            total += gradient * min(1.0, clip / float(gradient.norm()))
        torch.nn.utils.vector_to_parameters(weights(module.net) - lr * total / batch, parameters)
    return weights(module.net)


@pytest.mark.parametrize("engine", ["vmap", "loop"])
@pytest.mark.parametrize("physical_batch_size", [None, 1, 5])
@pytest.mark.parametrize("k", [1, 4])
def test_gradient_is_the_mean_of_single_view_gradients_clipped_once(
    engine: str, physical_batch_size: int | None, k: int
) -> None:
    module = classifier()
    private = DifferentialPrivacy(
        noise_multiplier=0.0, clip_norm=0.3, seed=2, engine=engine, physical_batch_size=physical_batch_size
    )
    fit(module, private, AugmentationMultiplicity(k=k))
    expected = by_hand(k, Compose([Crop(), Flip()]), 3, seed=2, clip=0.3, batch=12, lr=0.5)
    torch.testing.assert_close(weights(module.net), expected, rtol=1e-5, atol=1e-6)


def test_clipping_each_view_would_be_something_else() -> None:
    """The test above can tell: clip first, then average, and the sum is another one."""
    norms = torch.tensor([0.1, 10.0])
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    gradients = norms[:, None] * directions
    once = gradients.mean(0) * min(1.0, 1 / float(gradients.mean(0).norm()))
    each = (gradients * torch.clamp(1 / norms, max=1)[:, None]).mean(0)
    assert float((once - each).norm()) > 0.4


def test_an_example_counts_at_most_c_at_any_k() -> None:
    """The sensitivity: one example more moves the update by at most C/B, however many views."""
    for k in (1, 8):
        updates = []
        for size in (EXAMPLES - 1, EXAMPLES):
            module = classifier(lr=1.0)
            before = weights(module.net)
            subset = torch.utils.data.Subset(data(), range(size))
            private = DifferentialPrivacy(
                noise_multiplier=0.0,
                clip_norm=0.01,
                expected_batch_size=EXAMPLES - 1,
                dataset_size=EXAMPLES - 1,
                seed=0,
            )
            fit(module, private, AugmentationMultiplicity(k=k), steps=1, batch=EXAMPLES - 1, dataset=subset)
            updates.append(weights(module.net) - before)
        assert float((updates[1] - updates[0]).norm()) == pytest.approx(0.01 / (EXAMPLES - 1), rel=1e-3)


def test_k_0_is_no_augmentation() -> None:
    with_it, without = classifier(), classifier()
    fit(with_it, DifferentialPrivacy(noise_multiplier=1.0, seed=1), AugmentationMultiplicity(k=0))
    fit(without, DifferentialPrivacy(noise_multiplier=1.0, seed=1))
    assert_nearly(
        weights(with_it.net), weights(without.net), rtol=1e-5, atol=1e-6
    )  # float32, in another order of sums at most


def test_views_of_an_image_that_has_only_one_view_are_no_views() -> None:
    """With views all alike, K changes nothing: the mean of K equal gradients is the gradient."""
    still = Crop(padding=0)
    many, none = classifier(), classifier()
    fit(many, DifferentialPrivacy(noise_multiplier=0.5, seed=1), AugmentationMultiplicity(k=5, transform=still))
    fit(none, DifferentialPrivacy(noise_multiplier=0.5, seed=1))
    torch.testing.assert_close(weights(many.net), weights(none.net), rtol=1e-5, atol=1e-6)


def test_training_step_never_sees_more_than_one_examples_views_and_memory_follows_the_micro_batch() -> None:
    module = classifier()
    sizes: list[int] = []

    class Watch(ViewTransform):
        draws = 0

        def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
            sizes.append(len(images))
            return images

    private = DifferentialPrivacy(noise_multiplier=1.0, physical_batch_size=3)
    fit(module, private, AugmentationMultiplicity(k=7, transform=Watch()), batch=20)
    assert set(module.trained_on) == {(7, 2, SIZE, SIZE)}
    assert max(sizes) == 3 * 7


def test_default_micro_batch_makes_room_for_the_views() -> None:
    sizes = {}
    for k in (0, 16):
        private = DifferentialPrivacy(noise_multiplier=1.0, engine="vmap")
        fitter = trainer(private, AugmentationMultiplicity(k=k), max_steps=1)
        big = TensorDataset(torch.zeros(600, 2, SIZE, SIZE), torch.zeros(600, dtype=torch.long))
        fitter.fit(classifier(), DataLoader(big, batch_size=550))
        sizes[k] = fitter.train_dataloader.physical_batch_size
    assert sizes == {0: 512, 16: 32}


def test_validation_sees_the_images_themselves() -> None:
    for callbacks in ([], [DifferentialPrivacy(noise_multiplier=1.0)]):
        module = classifier()
        fitter = trainer(*callbacks, AugmentationMultiplicity(k=3), max_steps=2)
        fitter.fit(module, DataLoader(data(), batch_size=8), DataLoader(data(), batch_size=EXAMPLES))
        assert module.validated_on
        assert all(torch.equal(images, data().tensors[0]) for images in module.validated_on)


@pytest.mark.parametrize("k", [1, 3])
def test_without_privacy_it_is_ordinary_augmentation(k: int) -> None:
    module = classifier()
    fit(module, AugmentationMultiplicity(k=k), batch=12)
    assert set(module.trained_on) == {(12 * k, 2, SIZE, SIZE)}
    assert "training_step" not in vars(module), "the module is left as it was found"
    plain = classifier()
    fit(plain, AugmentationMultiplicity(k=0), batch=12)
    assert not torch.equal(weights(module.net), weights(plain.net))


def test_without_privacy_an_error_leaves_the_module_as_it_was() -> None:
    module = classifier()

    def fail(batch: Any, batch_idx: int) -> Tensor:
        raise RuntimeError("of the user's own")

    class Failing(Classifier):
        training_step = staticmethod(fail)

    module = Failing()
    with pytest.raises(RuntimeError, match="of the user's own"):
        fit(module, AugmentationMultiplicity(k=2))
    assert "training_step" not in vars(module)


def test_training_metrics_count_views() -> None:
    module = classifier()
    private = DifferentialPrivacy(noise_multiplier=1.0)
    updates: list[int] = []
    fitter = trainer(private, AugmentationMultiplicity(k=4), max_steps=1)
    original = module.accuracy.update
    module.accuracy.update = lambda preds, target: (updates.append(len(target)), original(preds, target))[1]
    fitter.fit(module, DataLoader(data(), batch_size=EXAMPLES))
    assert updates == [4 * EXAMPLES]


class Dicts(Dataset[dict[str, Any]]):
    """Examples as dicts with two images, a label and a name."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = data()[index]
        return {"left": image, "right": image, "label": label, "name": f"n{index}"}

    def __len__(self) -> int:
        return EXAMPLES


class OfDicts(Classifier):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        assert len(batch["name"]) == len(batch["label"]) == len(batch["left"])
        self.trained_on.append(tuple(batch["left"].shape))
        return F.cross_entropy(self.net(batch["left"]), batch["label"])


def test_any_batch_in_which_the_images_are_named() -> None:
    module = OfDicts()
    fit(
        module, DifferentialPrivacy(noise_multiplier=1.0), AugmentationMultiplicity(k=2, images="left"), dataset=Dicts()
    )
    assert set(module.trained_on) == {(2, 2, SIZE, SIZE)}


def test_images_that_are_not_named_are_an_error_before_the_first_step() -> None:
    with pytest.raises(
        ViewError, match=r"^images=None fits 2 of the batch's tensors \(batch\['left'\] \(2, 2, 6, 6\), "
    ):
        fit(OfDicts(), DifferentialPrivacy(noise_multiplier=1.0), AugmentationMultiplicity(k=2), dataset=Dicts())
    for engine in ("auto", "vmap", "loop"):
        private = DifferentialPrivacy(noise_multiplier=1.0, engine=engine)
        with pytest.raises(ViewError, match=r"^images=7 fits 0 of the batch's tensors"):
            fit(classifier(), private, AugmentationMultiplicity(k=2, images=7))


def test_images_by_position() -> None:
    views = Views(2, Crop(padding=0), images=1)
    expanded = views.expand((torch.zeros(3), torch.ones(3, 1, 4, 4)), 3, torch.zeros(3, 2, 2))
    assert [tuple(part.shape) for part in expanded] == [(3, 2), (3, 2, 1, 4, 4)]


def test_a_transform_that_drops_rows_is_refused() -> None:
    class Halve(ViewTransform):
        draws = 0

        def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
            return images[::2]

    with pytest.raises(ViewError, match=r"^transform=Halve made 3 images of 6: expected one of each"):
        Views(2, Halve()).expand((torch.zeros(3, 1, 4, 4),), 3, torch.zeros(3, 2, 0))


def test_torchvisions_transforms_plug_in() -> None:
    from torchvision.transforms import v2

    module = classifier()
    erase = EachImage(v2.RandomErasing(p=1.0))
    fit(module, DifferentialPrivacy(noise_multiplier=1.0), AugmentationMultiplicity(k=3, transform=[Crop(), erase]))
    assert set(module.trained_on) == {(3, 2, SIZE, SIZE)}


def test_two_of_them_and_a_negative_k_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^k=-1: expected at least 0 views"):
        AugmentationMultiplicity(k=-1)
    for callbacks in ([], [DifferentialPrivacy(noise_multiplier=1.0)]):
        with pytest.raises(ValueError, match=r"^2 AugmentationMultiplicity callbacks: expected at most one"):
            fit(classifier(), AugmentationMultiplicity(1), Twin(2), *callbacks)


class Twin(AugmentationMultiplicity):
    """Lightning refuses two callbacks of one class, but not this."""


# the numbers


@given(
    seed=st.integers(0, 2**64 - 1),
    indices=st.lists(st.integers(0, 2**40), min_size=1, max_size=20, unique=True),
    cut=st.integers(0, 20),
)
def test_numbers_of_an_example_do_not_depend_on_the_company_it_keeps(seed: int, indices: list[int], cut: int) -> None:
    together = view_uniforms(seed, np.array(indices), 3, 2)
    parts = [view_uniforms(seed, np.array(part, dtype=np.int64), 3, 2) for part in (indices[:cut], indices[cut:])]
    assert torch.equal(torch.cat(parts), together)
    assert bool(((together >= 0) & (together < 1)).all())


def test_numbers_are_uniform_and_uncorrelated_between_examples_views_draws_and_steps() -> None:
    numbers = view_uniforms(1, np.arange(4_000), 4, 3).numpy().astype(float)
    assert stats.kstest(numbers.flatten(), "uniform").pvalue > 1e-6
    next_step = view_uniforms(2, np.arange(4_000), 4, 3).numpy().astype(float)
    for a, b in (
        (numbers[:-1], numbers[1:]),
        (numbers[:, 0], numbers[:, 1]),
        (numbers[..., 0], numbers[..., 1]),
        (numbers, next_step),
    ):
        assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < 5 / np.sqrt(a.size)


class Mix(ViewTransform):
    """MixUp: a view is the mean of two images."""

    draws = 1

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        return (images + images.roll(self.by, 0)) / 2

    by = 1


class MixInPairs(Mix):
    """Of each image with the image in the next row of the batch, where K views of one image are K rows."""

    by = 3


@pytest.mark.parametrize("transform", [Mix(), MixInPairs()])
def test_a_transform_that_mixes_examples_is_refused_before_the_first_step(transform: ViewTransform) -> None:
    with pytest.raises(ValueError, match=r"^the transform of AugmentationMultiplicity mixes examples"):
        fit(classifier(), DifferentialPrivacy(noise_multiplier=1.0), AugmentationMultiplicity(k=3, transform=transform))
