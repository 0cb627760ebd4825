"""Write short texts with labels from Debian's own list of packages: the one-line description of each, and its section.

    uv run python benchmarks/debian_descriptions.py data/debian

Needs a Debian system (``apt-cache``), and no network beyond the list that ``apt-get update`` left there. Of the packages that
one source makes, the first is taken, so that a text and its near copy ("... (data files)") never lie on two sides of the split.
Every tenth source, in the order of a hash of its name, is to validate on. The texts are public: they stand in for records
of the same form, so that a private recipe for short texts can be run anywhere.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

SECTIONS = (
    "admin", "devel", "doc", "fonts", "games", "gnu-r", "golang", "graphics", "haskell", "java", "javascript", "lisp",
    "math", "net", "ocaml", "perl", "php", "python", "ruby", "rust", "science", "sound", "text", "utils", "web", "x11",
)  # fmt: skip
"""The sections that are told apart: those of many packages, but for libraries, which may be of any kind."""


def packages(listing: str) -> Iterator[dict[str, str]]:
    """The fields of each package of ``apt-cache dumpavail``, their first lines alone."""
    for block in listing.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(" "))
        if {"Package", "Section", "Description"} <= fields.keys():
            yield fields


def rows(listing: str) -> list[tuple[str, str, str]]:
    """Source, description and section, one for each source, in the order of the hashes."""
    found: dict[str, tuple[str, str, str]] = {}
    for fields in packages(listing):
        source = fields.get("Source", fields["Package"]).split(" ")[0]
        section = fields["Section"].split("/")[-1]
        if section in SECTIONS:
            found.setdefault(source, (source, fields["Description"], section))
    return sorted(found.values(), key=lambda row: hashlib.sha256(row[0].encode()).digest())


def main() -> None:
    """Write ``train.csv`` and ``val.csv`` with the columns ``text`` and ``label``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write; made if need be")
    folder: Path = parser.parse_args().folder
    listing = subprocess.run(["apt-cache", "dumpavail"], check=True, capture_output=True, text=True).stdout
    everything = rows(listing)
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("val", everything[::10]), ("train", [row for i, row in enumerate(everything) if i % 10])):
        path = folder / f"{name}.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("text", "label"))
            writer.writerows(row[1:] for row in part)
        print(f"{path}: {len(part)} texts, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}")


if __name__ == "__main__":
    main()
