"""The CIFAR-10 recipes that a CPU finishes: their header's command parses and takes two private steps on random images."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lightning_dp import DifferentialPrivacy
from lightning_dp.cli.recipes import RecipeCLI
from lightning_dp.data.images import ImageArray
from lightning_dp.models import TanhCNN
from tests.models.test_recipes import FOLDER, build, configs, header

RECIPES = ["cifar10/cnn_eps3.yaml", "cifar10/cnn_eps7.5.yaml"]
FINE_TUNING = sorted(f"cifar10/{path.name}" for path in (FOLDER / "cifar10").glob("efficientnet_lite_*.yaml"))
OFF = [
    f"--trainer.{name}=false"
    for name in ("enable_progress_bar", "enable_checkpointing", "logger", "enable_model_summary")
]


def dp_of(cli: RecipeCLI) -> DifferentialPrivacy:
    (found,) = (c for c in cli.trainer.callbacks if isinstance(c, DifferentialPrivacy))
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_is_that_of_the_recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = header(name)
    assert set(fields) >= {"command", "source", "published", "obtained", "cost", "note"}
    assert "not privately" in fields["note"], "the header says how the settings were chosen"
    assert configs(name) == ["recipes/shared/cifar10_jpeg_scattering.yaml", f"recipes/{name}"]
    cli = build(name, monkeypatch)
    dp, (steps, examples) = dp_of(cli), re.findall(r"([\d,]+) steps x ([\d,]+) examples", fields["cost"])[0]
    assert cli.trainer.max_steps == int(steps.replace(",", ""))
    assert cli.trainer.max_steps % cli.trainer.val_check_interval == 0, "the last step is validated"
    assert dp.expected_batch_size == cli.datamodule.batch_size == int(examples.replace(",", ""))
    assert (dp.epsilon, dp.delta, dp.clip_norm) == (float(name.split("eps")[1].removesuffix(".yaml")), 1e-5, 1.0)
    assert (dp.seed, dp.simulate) == (None, 1)
    assert isinstance(cli.model.network, TanhCNN)
    assert sum(p.numel() for p in cli.model.parameters()) == 187_210
    assert cli.config["trainer"]["logger"]["init_args"]["name"] == Path(name).stem


def test_two_steps_on_small_random_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cli = build(RECIPES[0], monkeypatch, "--trainer.max_steps=2", "--trainer.val_check_interval=2", *OFF)
    random = np.random.default_rng(0)
    few = ImageArray(random.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8), np.arange(12) % 10)
    cli.datamodule.images.load = lambda: (few, few, few)
    cli.datamodule.images.prepare_data = lambda: None
    cli.datamodule.cache_dir, cli.datamodule.batch_size, dp_of(cli).expected_batch_size = tmp_path, 4, 4
    before = [p.detach().clone() for p in cli.model.parameters()]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.trainer.global_step == 2
    assert all(not torch.equal(a, b) for a, b in zip(before, cli.model.parameters(), strict=True))
    assert dp_of(cli).statement().epsilon <= 3.0
    assert "val/accuracy" in cli.trainer.callback_metrics


def test_without_a_recipe_the_shared_part_does_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = str(FOLDER / "shared" / "cifar10_jpeg_scattering.yaml")
    monkeypatch.setattr(sys, "argv", ["lightning-dp", "--config", shared, "--trainer.max_steps=1", *OFF])
    cli = RecipeCLI(run=False, save_config_callback=None)
    with pytest.raises(ValueError, match="without DifferentialPrivacy: expected the callback"):
        cli.trainer.fit(cli.model, [(torch.zeros(2, 243, 8, 8), torch.zeros(2).long())])


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_fine_tuning_from_public_weights_has_its_recipes_and_they_say_what_they_do() -> None:
    kinds = [f"{kind}_eps{epsilon}" for kind in ("last", "squares") for epsilon in ("0.1", "0.5", "1", "2", "4", "8")]
    kinds += [f"covariance_eps{epsilon}" for epsilon in ("0.1", "0.5", "1", "8")]
    assert sorted(f"cifar10/efficientnet_lite_{kind}.yaml" for kind in [*kinds, "last_nonprivate"]) == FINE_TUNING
    for name in FINE_TUNING:
        fields = header(name)
        assert set(fields) >= {"command", "source", "published", "obtained", "cost", "note"}
        assert configs(name) == ["recipes/shared/cifar10_jpeg_efficientnet_lite.yaml", f"recipes/{name}"]
        recipe = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
        shared = yaml.safe_load((FOLDER / "shared/cifar10_jpeg_efficientnet_lite.yaml").read_text(encoding="utf-8"))
        steps, examples = map(number, re.findall(r"([\d,]+) steps x ([\d,]+) examples", fields["cost"])[0])
        assert (recipe["trainer"]["max_steps"], recipe["trainer"]["val_check_interval"]) == (steps, steps)
        batch = recipe.get("data", shared["data"])["init_args"]["batch_size"]
        assert batch == examples
        assert recipe["trainer"]["logger"]["init_args"]["name"] == Path(name).stem
        if "_eps" in name:
            (dp,) = (c["init_args"] for c in recipe["trainer"]["callbacks"])
            assert dp["epsilon"] == float(name.split("eps")[1].removesuffix(".yaml"))
            assert (dp["delta"], dp["expected_batch_size"]) == (1e-5, examples)


@pytest.mark.parametrize("name", [n for n in FINE_TUNING if n.endswith(("_eps1.yaml", "_nonprivate.yaml"))])
def test_fine_tuning_takes_its_steps_on_a_few_random_images(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    steps = 1 if "squares" in name else 2
    small = ["--data.init_args.features.init_args.size=32", f"--trainer.max_steps={steps}"]
    small += ["--model.init_args.covariance_steps=1"] if "covariance" in name else []
    cli = build(name, monkeypatch, *small, f"--trainer.val_check_interval={steps}", *OFF)
    random = np.random.default_rng(0)
    few = ImageArray(random.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8), np.arange(12) % 10)
    cli.datamodule.images.load = lambda: (few, few, few)
    cli.datamodule.images.prepare_data = lambda: None
    cli.datamodule.cache_dir, cli.datamodule.batch_size = tmp_path, 12
    if "_eps" in name:
        dp_of(cli).expected_batch_size = 12
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.trainer.global_step == steps
    assert all(bool(p.any()) for p in cli.model.parameters())
    assert "val/accuracy" in cli.trainer.callback_metrics
    if "_eps" in name:
        assert dp_of(cli).statement().epsilon <= 1.0
