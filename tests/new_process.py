"""Tests that fork, in an interpreter where nothing else has run.

A fork takes over what other threads held. Once OpenMP has had two threads in a process (Lightning asks for as many as there
are processors when a test trains with ``ddp``), the first large operation of a forked child waits for ever.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from tests.conftest import PATIENCE


def in_a_new_process(test: Callable[..., None], **variables: str) -> Callable[..., None]:
    """Let a test of a module run, in its folder, in an interpreter for such tests alone. Its arguments are pickled.

    With variables of the environment: in an interpreter that began with these.
    """
    environment = tuple(variables.items())

    @functools.wraps(test)
    def run(**arguments: Any) -> None:
        told = test.__module__, test.__name__, arguments, os.getcwd()
        try:
            _process(environment).submit(_call, *told).result(timeout=PATIENCE)
        except (BrokenExecutor, TimeoutError):
            _process.cache_clear()  # the next test gets another
            raise

    return run


@functools.cache
def _process(environment: tuple[tuple[str, str], ...]) -> ProcessPoolExecutor:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment:
            patch.setenv(name, value)
        process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        process.submit(os.getpid).result(timeout=PATIENCE)  # which begins it
        return process


def _call(module: str, name: str, arguments: dict[str, Any], folder: str) -> None:
    os.chdir(folder)
    getattr(importlib.import_module(module), name).__wrapped__(**arguments)
