"""Tests. Processes that they start find compiled what another has imported: a start takes less than half the time.

With ``PYTHONDONTWRITEBYTECODE`` each of them would compile PyTorch and Lightning anew. What is compiled then lies in a folder
of its own, which goes with the process that made it, so nothing is left among the sources.
"""

import atexit
import os
import shutil
import sys
import tempfile


def _compile_once() -> None:
    if not sys.dont_write_bytecode:
        return
    folder, owner = tempfile.mkdtemp(prefix="lightning_dp_bytecode_"), os.getpid()
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix = folder
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False

    def remove() -> None:
        if os.getpid() == owner:  # and not a child that was forked
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)


_compile_once()
