"""Tests as they stand, with every import of ``lightning`` changed to ``pytorch_lightning``.

``python -m tests.in_the_other_root FOLDER TEST...`` copies ``tests/`` and ``docs/`` to FOLDER, changes the imports of the copy
and runs the tests given, with the package of the working tree.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RENAMED = ((r"(?<!\")\blightning\.pytorch\b", "pytorch_lightning"), (r"\blightning\.fabric\b", "lightning_fabric"))


def renamed(source: str) -> str:
    """The source of a test or a script with its imports from the other root.

    Example:
        >>> renamed("import lightning as L\\nfrom lightning.pytorch.callbacks import Callback\\n")
        'import pytorch_lightning as L\\nfrom pytorch_lightning.callbacks import Callback\\n'
    """
    for before, after in (*RENAMED, (r"^(\s*)(import|from) lightning\b(?!\.)", r"\1\2 pytorch_lightning")):
        source = re.sub(before, after, source, flags=re.MULTILINE)
    return source


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest on a renamed copy of the tests."""
    for part in ("tests", "docs"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__", "_build"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for path in (folder / "tests").rglob("*.py"):
        path.write_text(renamed(path.read_text(encoding="utf-8")), encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


if __name__ == "__main__":
    done = run(Path(sys.argv[1]), *sys.argv[2:])
    print(done.stdout, done.stderr, sep="\n")
    sys.exit(done.returncode)
