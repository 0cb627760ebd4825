"""Transforms: each image its own numbers, and exactly the images NumPy would make."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from lightning_dp.batches.transforms import (
    ColourJitter,
    Compose,
    Crop,
    EachImage,
    Flip,
    ResizedCrop,
    ViewTransform,
)

EVERY: dict[str, ViewTransform] = {
    "crop": Crop(),
    "smaller crop": Crop(size=5, padding=2),
    "flip": Flip(),
    "resized crop": ResizedCrop(6),
    "colour": ColourJitter(),
    "torchvision's": EachImage(v2.RandomErasing(p=0.7)),
    "reflected": Crop(padding=3, mirror="reflect"),
    "colours of some": ColourJitter(0.8, 0.8, 0.8, 0.2, probability=0.5),
    "composed": Compose([Crop(padding=3), Flip(0.3), ColourJitter()]),
}


def images(n: int = 4, size: int = 8) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def uniforms(n: int, transform: ViewTransform, seed: int = 1) -> Tensor:
    return torch.rand(n, transform.draws, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", EVERY)
def test_each_image_is_changed_on_its_own(name: str) -> None:
    """Row n depends on row n alone: what makes a view a part of its example and of no other."""
    transform, x = EVERY[name], images()
    u = uniforms(4, transform)
    together = transform(x, u)
    for n in range(4):
        torch.testing.assert_close(transform(x[n : n + 1], u[n : n + 1])[0], together[n], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_numbers_decide_and_nothing_else(name: str) -> None:
    transform, x = EVERY[name], images()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = transform(x, uniforms(4, transform))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(transform(x, uniforms(4, transform)), first)
    assert not torch.equal(transform(x, uniforms(4, transform, seed=2)), first)


@pytest.mark.parametrize("mirror", ["symmetric", "reflect"])
@pytest.mark.parametrize(("padding", "size"), [(4, 8), (3, 5), (0, 3), (4, 16), (10, 8)])
def test_crops_are_those_of_numpys_padding(padding: int, size: int, mirror: Any) -> None:
    image = images(1)
    padded = np.pad(image[0].numpy(), ((0, 0), (padding, padding), (padding, padding)), mode=mirror)
    room = 8 + 2 * padding - size + 1
    transform = Crop(size=size, padding=padding, mirror=mirror)
    for top, left in itertools.product(range(room), repeat=2):
        place = torch.tensor([[(top + 0.5) / room, (left + 0.5) / room]])
        np.testing.assert_array_equal(
            transform(image, place)[0].numpy(), padded[:, top : top + size, left : left + size]
        )


def test_every_place_of_a_crop_is_equally_likely_and_the_largest_number_stays_inside() -> None:
    transform, n = Crop(padding=1), 9_000
    marked = torch.arange(9.0).view(1, 1, 3, 3)
    centres = transform(marked.expand(n, 1, 3, 3), uniforms(n, transform))[:, 0, 1, 1]
    counts = torch.bincount(centres.long(), minlength=9)
    assert float(((counts - n / 9) ** 2 / (n / 9)).sum()) < 42  # chi-squared with 8 degrees of freedom: 1e-6
    largest = torch.full((1, 2), 1 - 2**-24)
    assert transform(marked, largest)[0, 0, 1, 1] == 8


@pytest.mark.parametrize(("probability", "share"), [(0.0, 0.0), (1.0, 1.0), (0.25, 0.25)])
def test_flips(probability: float, share: float) -> None:
    x = images(2_000, size=2)
    flipped = Flip(probability)(x, uniforms(2_000, Flip()))
    mirrored = (flipped == x.flip(-1)).all((1, 2, 3))
    assert torch.equal(flipped[~mirrored], x[~mirrored])
    assert float(mirrored.float().mean()) == pytest.approx(share, abs=0.05)


def test_a_resized_crop_of_everything_is_the_image() -> None:
    x = images()
    whole = ResizedCrop(8, scale=(1, 1), ratio=(1, 1))
    torch.testing.assert_close(whole(x, uniforms(4, whole)), x, rtol=1e-5, atol=1e-5)


def test_a_resized_crop_takes_the_area_it_says() -> None:
    """On an image that is its own coordinates, the corners tell the rectangle."""
    size, n = 64, 500
    axis = (torch.arange(size) + 0.5) / size
    coordinates = torch.stack([axis.expand(size, size), axis[:, None].expand(size, size)])[None].expand(
        n, 2, size, size
    )
    transform = ResizedCrop(32, scale=(0.25, 0.25), ratio=(0.8, 1.25))
    corners = transform(coordinates, uniforms(n, transform))
    across = (corners[:, 0, 0, -1] - corners[:, 0, 0, 0]) * 32 / 31
    down = (corners[:, 1, -1, 0] - corners[:, 1, 0, 0]) * 32 / 31
    torch.testing.assert_close(across * down, torch.full((n,), 0.25), rtol=1e-2, atol=1e-2)
    assert 0.75 < float((across / down).min()) < 0.85
    assert 1.2 < float((across / down).max()) < 1.3
    assert float(corners.min()) < 0.02
    assert float(corners.max()) > 0.98


def test_colours_without_strength_stay_and_brightness_is_a_factor() -> None:
    mean, std = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)
    x = (images() * 0.5 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    still = ColourJitter(0, 0, 0, 0, mean=mean, std=std)
    torch.testing.assert_close(still(x, uniforms(4, still)), x, rtol=1e-4, atol=1e-4)
    brighter = ColourJitter(0.5, 0, 0, 0, mean=(0, 0, 0), std=(1, 1, 1))
    u = torch.full((4, 4), 0.75)
    torch.testing.assert_close(brighter(images() * 0.5, u), images() * 0.5 * 1.25, rtol=1e-4, atol=1e-4)


def test_colours_of_the_stated_share_change() -> None:
    jitter = ColourJitter(0.8, 0.8, 0.8, 0.2, probability=0.3)
    x = images(1).expand(4000, -1, -1, -1)
    changed = (jitter(x, uniforms(4000, jitter)) != x).flatten(1).any(1).double().mean()
    assert float(changed) == pytest.approx(0.3, abs=0.03)
    assert ColourJitter(probability=1.0).draws == ColourJitter().draws == 4, "views of old seeds stay what they were"


def test_hue_turns_once_around_and_leaves_grey() -> None:
    grey = torch.full((2, 3, 4, 4), 0.5)
    turned = ColourJitter(0, 0, 0, 0.5, mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(turned(grey, uniforms(2, turned)), grey, rtol=1e-3, atol=1e-3)
    x = 0.4 + 0.2 * images()
    ends = [turned(x, torch.tensor([[0.5, 0.5, 0.5, end]]).expand(4, 4)) for end in (0.0, 1.0)]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-3)  # -180° is +180°


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Crop(size=0), "^size=0: expected at least 1 pixel"),
        (lambda: Crop(padding=-1), "^padding=-1: expected at least 0 pixels"),
        (lambda: Flip(1.5), r"^probability=1.5: expected a number in \[0, 1\]"),
        (lambda: ResizedCrop(0), "^size=0: expected at least 1 pixel"),
        (lambda: ResizedCrop(4, scale=(0.5, 0.2)), r"^scale=\(0.5, 0.2\): expected two ascending shares"),
        (lambda: ResizedCrop(4, ratio=(2, 1)), r"^ratio=\(2, 1\): expected two ascending numbers"),
        (lambda: ColourJitter(contrast=-1), "^contrast=-1: expected at least 0"),
        (lambda: Crop(mirror="wrap"), "^mirror='wrap': expected 'symmetric' or 'reflect'"),
        (lambda: ColourJitter(probability=1.2), r"^probability=1.2: expected a number in \[0, 1\]"),
        (lambda: ColourJitter(hue=0.6), r"^hue=0.6: expected a number in \[0, 0.5\]"),
        (lambda: Crop(size=20)(images(), torch.rand(4, 2)), "^size=20: expected at most 16, the image's 8 pixels"),
    ],
)
def test_bad_input(make, text) -> None:
    with pytest.raises(ValueError, match=text):
        make()
