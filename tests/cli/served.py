"""Several runs of ``python -m lightning_dp`` in one process, which imports PyTorch and Lightning once for all of them.

``python -m tests.cli.served FOLDER``: each folder in it that holds ``words.json`` is a run with these words, from an empty
folder of its own. What it says and how it ends are put beside them.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback
from contextlib import chdir
from pathlib import Path


def run(folder: Path) -> None:
    """One command, as from a shell."""
    words, ended = json.loads((folder / "words.json").read_text()), 0
    (folder / "here").mkdir()
    terminal = [os.dup(descriptor) for descriptor in (1, 2)]
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    before, sys.argv = sys.argv, ["lightning-dp", *words]
    try:
        with chdir(folder / "here"):
            runpy.run_module("lightning_dp", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        ended = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        traceback.print_exc()
        ended = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.argv = before
        for descriptor, saved in enumerate(terminal, start=1):
            os.dup2(saved, descriptor)
            os.close(saved)
        (folder / "code").write_text(str(ended))


if __name__ == "__main__":
    for file in sorted(Path(sys.argv[1]).glob("*/words.json")):
        run(file.parent)
