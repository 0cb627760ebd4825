"""The version is one number, wherever it is said."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import yaml

from lightning_dp.version import __version__

ROOT = Path(__file__).parents[1]


def test_version_citation_and_changelog_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    headings = re.findall(
        r"^## \[(.+?)\](?: - (.+))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    released = [version for version, _ in headings if version != "Unreleased"]
    assert released[0] == __version__
    date = dict(headings)[__version__]
    released_on = None if date == "unreleased" else datetime.date.fromisoformat(date)
    assert citation.get("date-released") == released_on, "a date only for what is released"
    assert all(
        date == "unreleased" or datetime.date.fromisoformat(date) for version, date in headings if version in released
    )


def test_a_changelog_has_each_kind_once_in_a_version() -> None:
    """Those of Keep a Changelog, and Privacy: what changes the meaning of a stated (ε, δ)."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    for version in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        kinds = re.findall(r"^### (.+)$", version, re.MULTILINE)
        assert len(set(kinds)) == len(kinds)
        assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Privacy"}
