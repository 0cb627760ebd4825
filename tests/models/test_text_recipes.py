"""The recipes for texts: their headers' commands parse, and one of each kind takes two steps on a few made-up texts."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
import yaml

from lightning_dp import DifferentialPrivacy
from lightning_dp.data import E2EDataModule, LabelledTexts
from tests.models.test_recipes import FOLDER, ROOT, build, configs, flat, header

RECIPES = sorted(
    p.relative_to(FOLDER).as_posix() for folder in ("debian", "e2e") for p in (FOLDER / folder).glob("*.yaml")
)
STEPPED = [
    "debian/minilm_last_eps8.yaml", "debian/minilm_lora_eps8.yaml", "e2e/gpt2_bitfit_eps8.yaml",
    "e2e/made_up_lora_eps8.yaml",
]  # fmt: skip
QUIET = [
    f"--trainer.{name}=false"
    for name in ("enable_progress_bar", "enable_checkpointing", "logger", "enable_model_summary")
]
NETWORK = "--model.init_args.network.init_args"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few records of our own, in the E2E data set's form and as labelled texts."""
    folder = tmp_path_factory.mktemp("records")
    pairs = [(f"name[Inn {i}], food[soup {i}]", f"Inn {i} cooks soup {i}.") for i in range(9)]
    for name in ("trainset", "devset", "testset_w_refs"):
        write(folder / f"{name}.csv", ("mr", "ref"), pairs)
    for name in ("train", "val"):
        write(folder / f"{name}.csv", ("text", "label"), [(text, "games") for _, text in pairs])
    return folder


def write(path: Path, head: tuple[str, str], rows: list[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(head)
        writer.writerows(rows)


def small(name: str, records: Path) -> list[str]:
    """Overrides that ask for no weights and no vocabulary from elsewhere."""
    of_random_weights = {"model": {"init_args": {"network": {"init_args": {"init_from": None}}}}}
    (records / "random.yaml").write_text(yaml.safe_dump(of_random_weights))
    words = [f"--config={records / 'random.yaml'}", "--data.init_args.tokenizer=made-up"]
    if name.startswith("debian"):
        first = (
            ["--model.init_args.targets=0.attention.self.query"] if "_lora_" in name else []
        )  # the small one's layer
        return [*words, *first, f"--data.init_args.root={records}"]
    words += [f"{NETWORK}.{key}={value}" for key, value in {"width": 8, "depth": 1, "heads": 2}.items()]
    if "gpt2" in name:
        return [*words, f"{NETWORK}.vocabulary=768", f"--data.init_args.root={records}"]
    return [*words, "--data.init_args.made_up=9", "--data.init_args.max_length=60"]


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_is_that_of_the_recipe(name: str) -> None:
    fields = header(name)
    assert set(fields) >= {"command", "source", "obtained", "cost"}
    assert configs(name)[-1] == f"recipes/{name}"
    parts = [yaml.safe_load((ROOT / config).read_text(encoding="utf-8")) for config in configs(name)]
    values = {key: value for part in parts for key, value in flat(part).items()}
    steps, examples = re.findall(r"([\d,]+) steps x ([\d,]+) examples", fields["cost"])[0]
    assert values["trainer.max_steps"] == int(steps.replace(",", ""))
    assert values["trainer.max_steps"] % values["trainer.val_check_interval"] == 0, "the last step is validated"
    batch = values["data.init_args.batch_size"]
    assert batch == int(examples.replace(",", ""))
    assert values["trainer.logger.init_args.name"] == Path(name).stem
    callbacks = {
        spec["class_path"]: spec.get("init_args", {})
        for part in parts
        for key in ("callbacks", "callbacks+")
        for spec in part.get("trainer", {}).get(key, [])
    }
    assert ("lightning_dp.AdaptersMoved" in callbacks) == (re.search("_(lora|bitfit|last)_", name) is not None)
    private = callbacks.get("lightning_dp.DifferentialPrivacy")
    assert (private is None) == ("_eps" not in name)
    assert (values["trainer.strategy"] == "private") == ("_eps" in name)
    if private is not None:
        epsilon = float(re.search(r"_eps([\d.]+)\.yaml$", name)[1])
        assert (private["epsilon"], private["delta"], private["expected_batch_size"]) == (epsilon, 1e-5, batch)
        assert "seed" not in private, "a shipped recipe draws its noise from secret entropy"


@pytest.mark.parametrize("name", STEPPED)
def test_it_takes_two_steps(name: str, monkeypatch: pytest.MonkeyPatch, records: Path, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    off = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.accelerator=cpu", *QUIET]
    cli = build(name, monkeypatch, *off, *small(name, records))
    assert isinstance(cli.datamodule, (E2EDataModule, LabelledTexts))
    cli.datamodule.batch_size = cli.datamodule.val_batch_size = 4
    for private in (c for c in cli.trainer.callbacks if isinstance(c, DifferentialPrivacy)):
        private.expected_batch_size = 4
    trained = {n for n, p in cli.model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in cli.model.named_parameters()}
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert cli.trainer.global_step == 2
    moved = {n for n, p in cli.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained
    assert {"lora" in name: "lora_", "bitfit" in name: "bias", "last" in name: "classifier"}[True] in " ".join(moved)
    assert "val/loss" in cli.trainer.callback_metrics
