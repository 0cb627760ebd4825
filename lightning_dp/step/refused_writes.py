"""The refusal of a write into the module, with the line that makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_dp.engines.writes import line_that_changes
from lightning_dp.step.contents import Contents, WriteError, check_nothing_written, written
from lightning_dp.step.undone import undone


def with_line(error: WriteError, module: nn.Module, before: Contents, call: Callable[[], object]) -> WriteError:
    """The same refusal with the line that writes, if ``call`` makes the write too.

    Args:
        error: the refusal.
        module: the user's. What it held before is put back first, where there is a copy.
        before: what that was.
        call: runs training_step, on an example that is known to make the write or may make it. The caller puts back what it
            changes.
    """
    if error.line is not None:
        return error
    before.put_back()
    now, places = before.again(error.names), _Places(module, error.names)
    line = line_that_changes(call, lambda: places.changed() or bool(now.changed()))
    return written(module, error.names, line)


@contextmanager
def undone_unless_written(module: nn.Module) -> Iterator[None]:
    """:func:`undone`, for a pass of which it is asked whether it writes into the module.

    Raises:
        WriteError: it does.
    """
    with undone(module) as before:
        yield
        check_nothing_written(module, before)


class _Places:
    """Which tensors a module holds under some names, from the first time that it is asked for: inside a pass."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        self._module, self._names = module, set(names)
        self._found: list[tuple[Mapping[str, Any], str, Tensor | None]] | None = None

    def changed(self) -> bool:
        """Whether one of them is another tensor now."""
        if self._found is None:
            self._found = list(self._held())
        return any(table.get(name) is not tensor for table, name, tensor in self._found)

    def _held(self) -> Iterator[tuple[Mapping[str, Any], str, Tensor | None]]:
        for path, one in self._module.named_modules():
            for table in (one._parameters, one._buffers):
                for name in {full.rpartition(".")[2] for full in self._names if full.rpartition(".")[0] == path}:
                    yield table, name, table.get(name)
