"""Batches that are lists with one element for each example train as a batch-of-one loop over the records does."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DifferentialPrivacy, PreflightError
from lightning_dp.batches.microbatch import BatchAxisError
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.sampling import poisson_sample
from tests.conftest import Regressor, trainer, weights

LISTS = {"0": "list", "1": "list"}


def records(count: int = 24) -> list[Any]:
    """Images of different sizes, each with some boxes."""
    generator = torch.Generator().manual_seed(0)

    def one(index: int) -> Any:
        image = torch.randn(3, 4 + index % 3, 5, generator=generator)
        return image, {"boxes": torch.rand(1 + index % 4, 4, generator=generator), "name": str(index)}

    return [one(index) for index in range(count)]


def as_detection_does(rows: list[Any]) -> Any:
    return tuple(zip(*rows, strict=True))


class Detector(Regressor):
    """One box for an image, near all of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))

    def loss(self, image: Tensor, boxes: Tensor) -> Tensor:
        return (self.net(image.mean((1, 2))) - boxes).square().sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, targets = batch
        assert len(images) == len(targets)
        losses = [self.loss(image, target["boxes"]) for image, target in zip(images, targets, strict=True)]
        return torch.stack(losses).mean()


class ByRecord(Detector):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(as_detection_does(batch), batch_idx)


def made(kind: type[Detector]) -> Detector:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind()


def fit(module: Any, batch_axis: Any = 0, collate: Any = as_detection_does, **options: Any) -> Tensor:
    private = DifferentialPrivacy(noise_multiplier=0.7, clip_norm=0.3, seed=3, batch_axis=batch_axis, **options)
    data: Any = torch.utils.data.DataLoader(records(), batch_size=8, collate_fn=collate)
    trainer(private, max_steps=4).fit(module, data)
    return weights(module)


def by_hand() -> Tensor:
    module, data, key = made(Detector), records(), RandomKey.from_seed(3)
    parameters = list(module.parameters())
    for step in range(4):
        total = torch.zeros_like(weights(module))
        for index in poisson_sample(key.generator(Stream.SAMPLING, step), len(data), 8 / len(data)).tolist():
            image, target = data[index]
            gradients = torch.autograd.grad(module.loss(image, target["boxes"]), parameters)
            flat = torch.cat([g.flatten() for g in gradients])
            total += flat * min(1.0, 0.3 / float(flat.norm()))
        noise = torch.from_numpy(key.generator(Stream.NOISE, step).standard_normal(len(total), dtype="float32"))
        nn.utils.vector_to_parameters(weights(module) - module.lr * (total + 0.7 * 0.3 * noise) / 8, parameters)
    return weights(module)


@pytest.mark.parametrize(
    ("kind", "batch_axis", "collate"), [(Detector, LISTS, as_detection_does), (ByRecord, "list", list)]
)
@pytest.mark.parametrize("options", [{}, {"physical_batch_size": 3}, {"physical_batch_size": 1}])
def test_training_equals_the_loop_over_records(kind: Any, batch_axis: Any, collate: Any, options: Any) -> None:
    found = fit(made(kind), batch_axis, collate, **options)
    torch.testing.assert_close(found, by_hand(), rtol=1e-5, atol=1e-6)


def test_auto_takes_the_loop_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    fit(made(Detector), LISTS)
    assert re.search(r"engine +loop", caplog.text)
    assert "it takes lists with one element for each example, which may differ in shape" in caplog.text


def test_without_the_argument_the_refusal_names_it() -> None:
    with pytest.raises(
        BatchAxisError, match=r"batch\[0\]\[0\] has shape \(3, 4, 5\): expected 2 rows.*'list' for a list"
    ):
        fit(made(Detector))


def test_two_tensors_are_no_list_of_two_examples() -> None:
    """Else in a draw of two each \"example\" would be a tensor with both records in it."""
    with pytest.raises(BatchAxisError, match=r"expected 1, one for each of the 1 examples drawn"):
        fit(made(Detector), "list", lambda rows: [torch.stack([image.mean((1, 2)) for image, _ in rows])] * 2)
    with pytest.raises(BatchAxisError, match="batch_axis says that 1 is a list, but it is of type dict: expected"):
        fit(made(Detector), LISTS, lambda rows: ([image for image, _ in rows], {"boxes": [1] * len(rows)}))


def mixing(rows: list[Any]) -> Any:
    images, targets = as_detection_does(rows)
    together = torch.stack([image.mean() for image in images]).mean()
    return [image - together for image in images], targets


class MixingHook(Detector):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        images, targets = batch
        return [image - sum(other.mean() for other in images) for image in images], targets


def test_elements_that_depend_on_one_another_are_found() -> None:
    with pytest.raises(PreflightError, match="collate_fn mixes examples"):
        fit(made(Detector), LISTS, mixing)
    with pytest.raises(PreflightError, match="batch_transfer mixes examples"):
        fit(made(MixingHook), LISTS)
