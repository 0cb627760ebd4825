"""Features learned from random-process images: the images, the loss that tells them apart, and the last layer first."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy, ExponentialMovingAverage
from lightning_dp.batches.transforms import Flip
from lightning_dp.data import RandomProcessImages
from lightning_dp.data.images import ImageArray
from lightning_dp.data.random_process import CHUNK, dead_leaves
from lightning_dp.models import ContrastivePretraining, FrozenBody, HeadFirst, ImageClassifier, StridedCNN
from lightning_dp.models.contrastive import contrastive_loss
from tests.models.test_recipes import build, header

QUIET: dict[str, Any] = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False, "num_sanity_val_steps": 0,
}  # fmt: skip


def images(count: int, seed: int = 0, size: int = 16) -> torch.Tensor:
    return dead_leaves(count, size, 6, torch.Generator().manual_seed(seed))


def test_images_are_a_function_of_the_generator_and_of_nothing_else() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = images(5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, images(5))
    assert not torch.equal(first, images(5, seed=1))
    assert len({tuple(image.flatten().tolist()) for image in first}) == 5


def test_the_first_images_do_not_depend_on_how_many_there_are() -> None:
    few, more = (RandomProcessImages(n, size=8, leaves=1) for n in (3, CHUNK + 2))
    for data in (few, more):
        data.setup()
    assert torch.equal(few.train_set.images, more.train_set.images[:3])
    assert (more.train_set[CHUNK][1], more.val_set[0][1]) == (CHUNK, 2)
    assert not torch.equal(more.train_set[0][0], more.train_set[CHUNK][0])


def test_neighbouring_pixels_are_alike_and_images_are_not() -> None:
    """As in photographs: a pixel says much about the next and nothing about another image's."""
    x = images(200).double()
    x = x - x.mean()
    spread = x.std()
    beside = (x[..., 1:] * x[..., :-1]).mean() / spread**2
    apart = (x[1:] * x[:-1]).mean() / spread**2
    assert float(beside) > 0.6
    assert abs(float(apart)) < 0.15


def test_the_loss_is_the_written_formula() -> None:
    outputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    which, tau = [7, 7, 2, 2, 2, 7], 0.3
    z = [row / row.norm() for row in outputs]
    total = 0.0
    for i in range(6):
        others = sum(math.exp(float(z[i] @ z[m]) / tau) for m in range(6) if m != i)
        mates = [j for j in range(6) if j != i and which[j] == which[i]]
        total -= sum(math.log(math.exp(float(z[i] @ z[j]) / tau) / others) for j in mates) / len(mates)
    assert float(contrastive_loss(outputs, torch.tensor(which), tau)) == pytest.approx(total / 6, rel=1e-10)
    with pytest.raises(
        ValueError, match=r"an image has one view: expected two or more, .* AugmentationMultiplicity\(k=2\)"
    ):
        contrastive_loss(outputs, torch.tensor([0, 0, 1, 1, 2, 3]), tau)


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")  # of images that nobody validates on
def test_pre_training_saves_the_body_that_a_frozen_one_starts_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = tmp_path / "weights" / "body.pt"
    module = ContrastivePretraining(StridedCNN(8), save_to=file, width=4)
    start = {name: value.clone() for name, value in module.network.state_dict().items()}
    trainer = L.Trainer(max_steps=3, callbacks=[AugmentationMultiplicity(2, Flip())], **QUIET)
    trainer.fit(module, datamodule=RandomProcessImages(12, size=16, leaves=2, batch_size=4))
    network = StridedCNN(8)
    body = FrozenBody(network, file)
    saved = module.network.state_dict()
    assert set(body.network.state_dict()) == set(saved)
    for name, value in body.network.state_dict().items():
        assert torch.equal(value, saved[name])
        assert not torch.equal(value, start[name])
    assert body(torch.zeros(1, 3, 32, 32)).shape == (1, 4 * 32)


def test_it_cannot_be_trained_privately_because_it_mixes_images() -> None:
    module = ContrastivePretraining(StridedCNN(8), width=4)
    private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3)
    data = DataLoader(TensorDataset(torch.randn(12, 3, 16, 16), torch.arange(12) // 2), batch_size=4)
    trainer = L.Trainer(max_steps=1, callbacks=[private], **QUIET)
    with pytest.raises(ValueError, match="an image has one view"):
        trainer.fit(module, data)


class Seen(L.Callback):
    """Parameters after every step."""

    def __init__(self) -> None:
        self.body: list[torch.Tensor] = []
        self.head: list[torch.Tensor] = []

    def keep(self, module: Any) -> None:
        self.body.append(module.network.body[0][0].weight.detach().clone())
        self.head.append(module.network.classifier.weight.detach().clone())

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.keep(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.keep(pl_module)


def test_the_last_layer_first_and_then_all_of_them_at_one_price() -> None:
    torch.manual_seed(0)
    module = ImageClassifier(StridedCNN(8, num_classes=3), num_classes=3)
    data = DataLoader(TensorDataset(torch.randn(24, 3, 16, 16), torch.arange(24) % 3), batch_size=8)
    private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, seed=1)
    seen = Seen()
    L.Trainer(max_epochs=4, callbacks=[private, HeadFirst(2), seen], **QUIET).fit(module, data)
    moved = [[not torch.equal(a, b) for a, b in pairwise(path)] for path in (seen.body, seen.head)]
    assert moved == [[False] * 6 + [True] * 6, [True] * 12]
    plain = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, seed=1)
    other = ImageClassifier(StridedCNN(8, num_classes=3), num_classes=3)
    L.Trainer(max_epochs=4, callbacks=[plain], **QUIET).fit(other, data)
    assert private.statement().epsilon == plain.statement().epsilon


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RandomProcessImages(examples=0), "^examples=0: expected at least 1"),
        (lambda: RandomProcessImages(size=1), "^size=1: expected at least 2"),
        (lambda: RandomProcessImages(leaves=-1), "^leaves=-1: expected at least 0"),
        (lambda: RandomProcessImages(seed=-1), "^seed=-1: expected at least 0"),
        (lambda: StridedCNN(12), "^width=12: expected a multiple of 8"),
        (lambda: StridedCNN(8, feature_groups=3), "^feature_groups=3: expected a divisor of 128"),
        (lambda: HeadFirst(0), "^epochs=0: expected at least 1"),
        (lambda: ContrastivePretraining(nn.Linear(2, 2), width=0), "^width=0: expected at least 1"),
        (lambda: ContrastivePretraining(StridedCNN(8), temperature=0), "^temperature=0: expected a number above 0"),
    ],
)
def test_bad_input(make: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


OFF = [
    f"--trainer.{name}=false"
    for name in ("enable_progress_bar", "enable_checkpointing", "logger", "enable_model_summary")
]


@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`")  # of images that nobody validates on
def test_the_recipes_of_a_cpu_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pre-training writes the file that the private recipe starts from, and its control reads none."""
    monkeypatch.chdir(tmp_path)
    small = [
        "--trainer.max_steps=2",
        "--data.init_args.examples=8",
        "--data.init_args.leaves=1",
        "--data.init_args.batch_size=4",
    ]
    cli = build("random_prior/strided_cnn_nonprivate.yaml", monkeypatch, *small, *OFF)
    assert cli.config["model"]["init_args"]["lr_scheduler"]["init_args"]["total_steps"] == 800
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    random = np.random.default_rng(0)
    few = ImageArray(random.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8), np.arange(12) % 10)
    for name, start in (("randp_cnn_head_eps1", True), ("randp_cnn_nothing_head_eps1", False)):
        fields = header(f"cifar10/{name}.yaml")
        assert set(fields) >= {"command", "source", "published", "obtained", "cost", "note"}
        assert "not privately" in fields["note"], "the header says how the settings were chosen"
        cli = build(f"cifar10/{name}.yaml", monkeypatch)
        (private,) = (c for c in cli.trainer.callbacks if isinstance(c, DifferentialPrivacy))
        assert (private.epsilon, private.delta, private.clip_norm, private.seed) == (1.0, 1e-5, 1.0, None)
        steps, examples = re.findall(r"([\d,]+) steps x ([\d,]+) examples", fields["cost"])[0]
        assert cli.trainer.max_steps == cli.trainer.val_check_interval == int(steps.replace(",", ""))
        assert private.expected_batch_size == cli.datamodule.batch_size == int(examples.replace(",", ""))
        body = cli.datamodule.features.network.state_dict()
        saved = torch.load("checkpoints/random_prior/strided_cnn.pt", weights_only=True)
        assert torch.equal(body["body.0.0.weight"], saved["body.0.0.weight"]) is start
    cli = build(
        "cifar10/randp_cnn_head_eps1.yaml", monkeypatch, "--trainer.max_steps=2", "--trainer.val_check_interval=2", *OFF
    )
    (private,) = (c for c in cli.trainer.callbacks if isinstance(c, DifferentialPrivacy))
    cli.datamodule.images.load = lambda: (few, few, few)
    cli.datamodule.images.prepare_data = lambda: None
    cli.datamodule.cache_dir, cli.datamodule.batch_size, private.expected_batch_size = tmp_path, 4, 4
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.trainer.global_step == 2
    assert private.statement().epsilon <= 1.0


def test_the_recipes_of_a_gpu_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    cli = build("random_prior/wrn_16_4_nonprivate.yaml", monkeypatch)
    assert cli.trainer.max_steps == 50_000
    there = cli.model.network.state_dict()
    cli = build("cifar10/randp_wrn_16_4_eps1.yaml", monkeypatch, "--model.init_args.init_from=null")
    here = cli.model.network.state_dict()
    assert set(here) - set(there) == {"classifier.weight", "classifier.bias"}
    assert all(here[name].shape == value.shape for name, value in there.items())
    kinds = [type(c) for c in cli.trainer.callbacks]
    assert {HeadFirst, DifferentialPrivacy, AugmentationMultiplicity, ExponentialMovingAverage} <= set(kinds)
