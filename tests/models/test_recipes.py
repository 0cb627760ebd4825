"""Every recipe: its header's own command parses, instantiates and takes two steps on small random images."""

from __future__ import annotations

import re
import shlex
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy, ExponentialMovingAverage
from lightning_dp.cli.recipe_files import layers
from lightning_dp.cli.recipes import RecipeCLI
from lightning_dp.models import ImageClassifier, NormFreeNet, WideResNet
from lightning_dp.optim import DPAdamW, DPMicroAdam, DPMuon

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes"
PARTS = sorted(
    p.relative_to(FOLDER).as_posix()
    for p in (FOLDER / "shared").glob("*.yaml")
    if not p.name.startswith(("e2e_", "debian_"))  # test_text_recipes.py
    and p.name
    not in (  # test_recipes_for_a_cpu.py, test_random_prior.py
        "cifar10_jpeg_scattering.yaml",
        "cifar10_jpeg_efficientnet_lite.yaml",
        "cifar10_jpeg_random_prior.yaml",
    )
)
RECIPES = sorted(
    p.relative_to(FOLDER).as_posix()
    for folder in ("cifar10", "cifar100", "imagenet", "imagenet32", "places365")
    for p in (FOLDER / folder).glob("*.yaml")
    if re.match(r"wrn_|nf_|nfnet_|tan_|ablation_|simulated_", p.name)
)
PRIVATE = [name for name in RECIPES if "_eps" in name]
FIELDS = ("command", "source", "noise", "published", "obtained", "cost", "note")


def header(name: str) -> dict[str, str]:
    """The header's fields, each on one line."""
    text = (FOLDER / name).read_text(encoding="utf-8").split("\n\n")[0]
    fields: dict[str, str] = {}
    for line in text.splitlines()[2:]:
        key, value = line[2:12].strip(), line[12:].strip()
        if key in FIELDS:
            fields[key] = current = value
            last = key
        else:
            current = f"{fields[last]} {line[2:].strip()}"
        fields[last] = current
    return fields


def configs(name: str) -> list[str]:
    """The files that the header's command is made of, the recipe last."""
    words = shlex.split(header(name)["command"])
    assert words[:5] == ["uv", "run", "lightning-dp", "fit", "--config"]
    (path,) = words[5:]
    return [layer.relative_to(ROOT).as_posix() for layer in layers(ROOT / path)]


def build(name: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> RecipeCLI:
    """What ``lightning-dp`` makes of the header's command, up to and without ``fit``."""
    if "mix_public" in name:  # a pool as its header asks for
        Path("data").mkdir(exist_ok=True)
        np.save("data/public_pool.npy", np.random.default_rng(0).standard_normal((4, 3, 32, 32), dtype=np.float32))
    monkeypatch.setattr(sys, "argv", ["lightning-dp", "--config", str(FOLDER / name), *more])
    return RecipeCLI(run=False, save_config_callback=None)


def shape(name: str) -> str:
    """A recipe without its numbers and its name, and what it is put together from."""
    text = re.sub(r"^#.*$", "", (FOLDER / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = re.sub(r"\bname: \w+|[-+]?\b[\d.]+(e[-+]?\d+)?\b", "", text)
    return f"{configs(name)[:-1]} {text.split()}"


def one_of_each_shape() -> list[Any]:
    """All recipes; those that differ from one before in numbers alone are stepped at night."""
    seen: set[str] = set()
    found: list[Any] = []
    for name in RECIPES:
        again = shape(name) in seen
        seen.add(shape(name))
        found.append(pytest.param(name, marks=pytest.mark.nightly) if again else name)
    return found


def small(name: str) -> list[str]:
    """Overrides that make the networks small enough for a test, and ask for no file of weights."""
    network = "--model.init_args.network.init_args"
    merged = {
        **{k: v for config in configs(name) for k, v in flat(yaml.safe_load((ROOT / config).read_text())).items()}
    }
    rate = ["--model.init_args.optimizer.init_args.lr", "0.001"]  # the batch of a test is all noise
    words = [f"{network}.name", "test_nfnet"]
    if merged["model.init_args.network.class_path"].endswith("WideResNet"):
        words = [f"{network}.depth", "10", f"{network}.width", "1"]
    elif merged["model.init_args.network.init_args.name"] == "nf_resnet50":
        words = [f"{network}.name", "nf_resnet26"]
    return rate + words + (["--model.init_args.init_from", "null"] if "model.init_args.init_from" in merged else [])


def flat(node: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {path: node}
    return {k: v for key, value in node.items() for k, v in flat(value, f"{path}.{key}" if path else key).items()}


def callback(cli: RecipeCLI, kind: type[L.Callback]) -> Any:
    found = [c for c in cli.trainer.callbacks if isinstance(c, kind)]
    assert len(found) <= 1
    return found[0] if found else None


def test_no_recipe_and_no_part_is_forgotten() -> None:
    used = {config.removeprefix("recipes/") for name in RECIPES for config in configs(name)}
    assert used >= set(RECIPES)
    assert set(PARTS) <= used
    assert len(RECIPES) == 76


@pytest.mark.parametrize("name", RECIPES)
def test_header_says_everything_and_its_cost_is_right(name: str) -> None:
    fields = header(name)
    assert set(fields) >= {"command", "source", "published", "obtained", "cost"}
    assert ("noise" in fields) == (name in PRIVATE)
    assert configs(name)[-1] == f"recipes/{name}"
    steps, examples, views = (
        int(number.replace(",", ""))
        for number in re.findall(r"([\d,]+) steps x ([\d,]+) examples x (\d+) view", fields["cost"])[0]
    )
    total = float(re.match(r"(\S+) view-gradients", fields["cost"])[1])
    assert total == pytest.approx(steps * examples * views, rel=0.06)


@pytest.mark.filterwarnings("ignore:sampling=.* steps to take in blocks of")  # two of them are no block
@pytest.mark.parametrize("name", one_of_each_shape())
def test_it_parses_instantiates_and_takes_two_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = yaml.safe_load((FOLDER / name).read_text())["trainer"].get("max_steps")
    off = ["--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false"]
    quiet = ["--trainer.logger", "false", "--trainer.enable_model_summary", "false", "--trainer.accelerator", "cpu"]
    cli = build(
        name, monkeypatch, "--trainer.max_steps", "2", "--trainer.val_check_interval", "2", *off, *quiet, *small(name)
    )
    assert isinstance(cli.model, ImageClassifier)
    assert planned is None or cli.config["trainer"]["max_steps"] == 2
    private, views = callback(cli, DifferentialPrivacy), callback(cli, AugmentationMultiplicity)
    stated = re.findall(r"x ([\d,]+) examples x (\d+) view(?!.*no augmentation)", header(name)["cost"])
    assert [int(k) for _, k in stated] == ([] if views is None else [views.views.total])
    assert (private is None) == ("nonprivate" in name)
    size = 32 if isinstance(cli.model.network, WideResNet) else 64
    classes = cli.model.train_accuracy.num_classes
    if private is not None:  # as in the recipe, but for a small batch of a small data set
        assert private.expected_batch_size == cli.datamodule.batch_size
        private.expected_batch_size = 2
        private.delta = 1e-3
        private.noise_bands = min(private.noise_bands, 2)  # at most as many as steps
    if views is not None:
        views.k = min(views.k, 2)
        for transform in views.transform.transforms:
            if getattr(transform, "size", None):
                transform.size = size
    images = torch.randint(0, 256, (8, 3, size + 8, size + 8) if size > 32 else (8, 3, 32, 32), dtype=torch.uint8)
    cli.datamodule.load = lambda: (TensorDataset(images, torch.arange(8) % classes),) * 3
    cli.datamodule.prepare_data = lambda: None
    cli.datamodule.batch_size = cli.datamodule.val_batch_size = 2
    cli.datamodule.num_workers = 0
    before = [p.detach().clone() for p in cli.model.network.parameters()]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.trainer.global_step == 2
    moved = [not torch.equal(a, b) for a, b in zip(before, cli.model.network.parameters(), strict=True)]
    trained = [p.requires_grad for p in cli.model.network.parameters()]
    assert any(moved)
    if private is not None:
        assert moved == trained, "noise moves every trained parameter, and no other"
        assert private.clip_norm == 1.0
    if name in PRIVATE:
        assert private.statement().epsilon <= private.epsilon


@pytest.mark.parametrize("name", RECIPES)
def test_steps_and_batch_are_those_of_the_header_and_the_last_step_is_validated(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = build(name, monkeypatch, *small(name))
    steps, examples = re.findall(r"([\d,]+) steps x ([\d,]+) examples", header(name)["cost"])[0]
    assert cli.trainer.max_steps == int(steps.replace(",", ""))
    assert cli.datamodule.batch_size == int(examples.replace(",", ""))
    assert cli.trainer.max_steps % cli.trainer.val_check_interval == 0
    assert cli.config["trainer"]["logger"]["init_args"]["name"] == Path(name).stem
    if "nonprivate" in name:
        assert callback(cli, DifferentialPrivacy) is None
        return
    private = callback(cli, DifferentialPrivacy)
    if "simulated" in name:
        assert "NOT PRIVATE" in (FOLDER / name).read_text(encoding="utf-8").splitlines()[0]
        return
    epsilon = float(re.search(r"_eps([\d.]+)\.yaml$", name)[1])
    delta = {"cifar10": 1e-5, "cifar100": 1e-5, "imagenet": 8e-7, "places365": 5e-7}[name.split("/")[0]]
    assert (private.epsilon, private.delta, private.clip_norm) == (epsilon, delta, 1.0)
    assert private.seed is None, "a shipped recipe draws its noise from secret entropy"
    optimizer = cli.model.configure_optimizers()
    known = [kind for kind in (DPAdamW, DPMicroAdam, DPMuon) if kind.__name__[2:].lower() in name.replace("_", "")]
    assert type(optimizer) is (known or [torch.optim.SGD])[0]
    assert optimizer.defaults["weight_decay"] == 0
    momentum = 0.0 if private.noise == "independent" else 0.9  # correlated noise cancels in what momentum adds up
    assert known or optimizer.defaults["momentum"] == momentum


def test_a_pool_that_is_not_there_is_an_error_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "save", lambda *_: None)
    with pytest.raises(
        ValueError, match=r"public_images='data/public_pool.npy': expected the path of a .npy or .pt file"
    ):
        build("cifar10/wrn_16_4_mix_public_eps3.yaml", monkeypatch)


def test_parts_without_a_recipe_do_not_train_without_privacy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgetting the last --config must not give an ordinary run that looks like a private one."""
    parts = [str(FOLDER / "shared" / f"{part}.yaml") for part in ("cifar10", "wrn_16_4")]
    words = [word for part in parts for word in ("--config", part)]
    monkeypatch.setattr(
        sys, "argv", ["lightning-dp", *words, "--trainer.max_steps", "1", "--trainer.accelerator", "cpu"]
    )
    cli = RecipeCLI(run=False, save_config_callback=None)
    with pytest.raises(ValueError, match="without DifferentialPrivacy: expected the callback"):
        cli.trainer.fit(cli.model, DataLoader(TensorDataset(torch.zeros(4, 3, 32, 32), torch.zeros(4).long())))


def test_the_ladder_ends_at_the_recipe_it_explains(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [build(f"cifar10/{name}.yaml", monkeypatch) for name in ("ablation_5_average_eps8", "wrn_16_4_eps8")]
    for kind in (DifferentialPrivacy, AugmentationMultiplicity, ExponentialMovingAverage):
        public = [
            {k: v for k, v in vars(callback(cli, kind)).items() if isinstance(v, (int, float, str)) and k[0] != "_"}
            for cli in ends
        ]
        assert public[0] == public[1]
    first, second = (cli.config["model"]["init_args"] for cli in ends)
    assert first["network"]["init_args"] == second["network"]["init_args"]
    assert first["optimizer"]["init_args"] == second["optimizer"]["init_args"]
    assert ends[0].trainer.max_steps == ends[1].trainer.max_steps
    assert ends[0].datamodule.batch_size == ends[1].datamodule.batch_size


def test_each_rung_adds_one_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    rungs = [build(name, monkeypatch) for name in RECIPES if "ablation" in name]
    facts = [
        (
            cli.datamodule.batch_size,
            cli.config["model"]["init_args"]["network"]["init_args"]["weight_standardisation"],
            callback(cli, AugmentationMultiplicity) is not None,
            callback(cli, ExponentialMovingAverage) is not None,
        )
        for cli in rungs
    ]
    assert len(facts) == 5
    for before, after in pairwise(facts):
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("cifar10/wrn_40_4_eps8.yaml", (WideResNet, 8_961_306)),
        ("cifar100/wrn_28_10_last_eps1.yaml", (WideResNet, 36_558_068)),
        ("imagenet/nf_resnet50_eps8.yaml", (NormFreeNet, 25_557_048)),
    ],
)
def test_networks_are_those_of_the_paper(name: str, network: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cli = build(name, monkeypatch, *(["--model.init_args.init_from", "null"] if "28_10" in name else []))
    assert type(cli.model.network) is network[0]
    assert sum(p.numel() for p in cli.model.network.parameters()) == network[1]


def test_weights_that_are_not_there_are_an_error_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"init_from='checkpoints/wrn_28_10_imagenet32.ckpt': expected a file of weights"
    ):
        build("cifar10/wrn_28_10_all_eps1.yaml", monkeypatch)


def test_a_key_that_does_not_exist_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    typo = tmp_path / "typo.yaml"
    typo.write_text("data:\n  init_args:\n    batchsize: 64\n")
    with pytest.raises(SystemExit):
        build("cifar10/wrn_16_4_eps8.yaml", monkeypatch, "--config", str(typo))
    assert "batchsize" in capsys.readouterr().err


def test_cifar_as_jpeg_takes_the_place_of_cifar(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = ["cifar10/wrn_16_4_eps1.yaml", "shared/cifar10_jpeg.yaml"]
    words = [word for path in paths for word in ("--config", str(FOLDER / path))]
    monkeypatch.setattr(sys, "argv", ["lightning-dp", *words])
    cli = RecipeCLI(run=False, save_config_callback=None)
    assert cli.datamodule.batch_size == 4096
    assert cli.datamodule.in_memory
