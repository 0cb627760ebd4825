"""The digits recipes: complete, consistent with one another, and made of classes that exist."""

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "recipes" / "digits"
PRIVATE = {"cnn_eps8": 8.0, "cnn_eps2": 2.0}
NAMES = [*PRIVATE, "cnn_nonprivate"]


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))


def specs(node: Any) -> list[dict[str, Any]]:
    """Every ``class_path`` entry of a recipe, however deep."""
    if isinstance(node, dict):
        mine = [node] if "class_path" in node else []
        return mine + [spec for value in node.values() for spec in specs(value)]
    return [spec for item in node for spec in specs(item)] if isinstance(node, list) else []


def without_privacy(recipe: dict[str, Any]) -> dict[str, Any]:
    callbacks = recipe["trainer"]["callbacks"]
    kept = [spec for spec in callbacks if spec["class_path"] != "lightning_dp.DifferentialPrivacy"]
    return {**recipe, "trainer": {**recipe["trainer"], "callbacks": kept}}


def test_no_recipe_is_forgotten_here():
    assert {path.stem for path in FOLDER.iterdir()} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_class_exists_and_accepts_its_arguments(name):
    found = specs(load(name))
    assert len(found) == (5 if name in PRIVATE else 4)
    for spec in found:
        module, _, attribute = spec["class_path"].rpartition(".")
        cls = getattr(importlib.import_module(module), attribute)
        inspect.signature(cls).bind_partial(**spec["init_args"])
        if "CSVLogger" not in attribute:
            cls(**spec["init_args"])


@pytest.mark.parametrize("name", NAMES)
def test_header_says_command_source_expected_and_obtained(name):
    header = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").split("\n\n")[0]
    assert all(line.startswith("#") for line in header.splitlines())
    fields = dict(re.findall(r"^# (command|source|expected|obtained)  +(\S.*)$", header, flags=re.MULTILINE))
    assert fields.keys() == {"command", "source", "expected", "obtained"}
    assert fields["command"] == f"uv run lightning-dp fit --config recipes/digits/{name}.yaml"


@pytest.mark.parametrize("name", NAMES)
def test_the_last_step_is_validated(name):
    trainer = load(name)["trainer"]
    assert trainer["max_steps"] % trainer["val_check_interval"] == 0


@pytest.mark.parametrize(("name", "epsilon"), PRIVATE.items())
def test_budget(name, epsilon):
    (privacy,) = [s["init_args"] for s in specs(load(name)) if s["class_path"].endswith("DifferentialPrivacy")]
    assert (privacy["epsilon"], privacy["delta"]) == (epsilon, 1e-5)
    assert "seed" not in privacy, "a shipped recipe draws its noise from secret entropy"


def test_the_recipe_without_privacy_differs_in_callback_and_rate_alone():
    private, plain = without_privacy(load("cnn_eps8")), load("cnn_nonprivate")
    for recipe in (private, plain):
        recipe["trainer"]["logger"]["init_args"].pop("name")
        recipe["model"]["init_args"].pop("lr")
    assert private == plain


@pytest.mark.parametrize("name", NAMES)
def test_runs_are_filed_under_the_recipes_name(name):
    assert load(name)["trainer"]["logger"]["init_args"]["name"] == name
