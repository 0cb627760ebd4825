"""What a version of November 2026 has written can be gone on with: its checkpoint, and the steps that only its journal has."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from lightning_dp import DifferentialPrivacy
from tests.conftest import loader, regressor, trainer
from tests.training.manual_modules import manual_regressor

DATA = Path(__file__).parent / "data" / "2026_11"
USERS = [index * index % 23 for index in range(64)]
CASES: dict[str, dict[str, Any]] = {
    "automatic": {"clipping": "automatic", "automatic_gamma": 0.02},
    "cut": {"max_batch_size": 40},
    "manual": {},
    "secure": {"secure": True, "seed": None},
    "users": {"privacy_unit": USERS, "expected_batch_size": 5},
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:An interrupted fit took"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),  # the checkpoint's own ModelCheckpoint
]


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on(name: str, tmp_path: Path) -> None:
    """Three steps are in the checkpoint and two more in the journal; five of the eight planned are left."""
    (tmp_path / "ck").mkdir()
    shutil.copy(DATA / name / "step=3.ckpt", tmp_path / "ck")
    shutil.copy(DATA / name / "old.journal", tmp_path / "privacy.journal")
    private = DifferentialPrivacy(**{"noise_multiplier": 1.0, "delta": 1e-4, "seed": 7, **CASES[name]})
    module = manual_regressor() if name == "manual" else regressor()
    fit = trainer(private, max_steps=8, default_root_dir=tmp_path)
    fit.fit(module, loader(), ckpt_path=str(tmp_path / "ck" / "step=3.ckpt"))
    assert private.ledger is not None
    assert private.ledger.steps == 3 + 2 + 5
    caveats = private.statement().caveats
    assert any("2 of the steps are in no checkpoint" in caveat for caveat in caveats)
    assert not any("written by an earlier version" in caveat for caveat in caveats)
    unknown = any("γ of automatic clipping was not written down for 5 steps" in caveat for caveat in caveats)
    assert unknown == (name == "automatic")
