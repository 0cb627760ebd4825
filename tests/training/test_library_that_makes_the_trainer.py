"""A Trainer that another library makes: the refusal says whose argument it is."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from lightning_dp import DifferentialPrivacy, PreflightError
from lightning_dp.engines import user_code
from tests.conftest import loader, regressor, trainer

LIBRARY = """
def train(make, module, data, private, **trainer_kwargs):
    make(private, **{"gradient_clip_val": 10.0, "max_steps": 1, **trainer_kwargs}).fit(module, data)
"""


def library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """An installed package whose estimator clips gradients unless it is told not to."""
    (folder / "forecasts").mkdir()
    file = folder / "forecasts" / "estimator.py"
    file.write_text(LIBRARY)
    monkeypatch.setattr(user_code, "_PACKAGES", (*user_code._PACKAGES, str(folder)))
    spec = importlib.util.spec_from_file_location("estimator", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_library_is_named_and_its_argument_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = library(tmp_path, monkeypatch)
    private = DifferentialPrivacy(noise_multiplier=1.0)
    with pytest.raises(
        PreflightError, match=r"gradient_clip_val=10\.0, an argument of the Trainer.*Here forecasts makes"
    ):
        estimator.train(trainer, regressor(), loader(), private)
    for none in (None, 0, 0.0):
        private = DifferentialPrivacy(noise_multiplier=1.0)
        estimator.train(trainer, regressor(), loader(), private, gradient_clip_val=none)
        assert private.ledger is not None
        assert private.ledger.steps == 1


def test_a_trainer_of_the_users_own_names_no_library() -> None:
    with pytest.raises(PreflightError, match=r"Leave it out of Trainer\(\.\.\.\)") as caught:
        trainer(DifferentialPrivacy(noise_multiplier=1.0), gradient_clip_val=1.0).fit(regressor(), loader())
    assert "Here" not in str(caught.value)
