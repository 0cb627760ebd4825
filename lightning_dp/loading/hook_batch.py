"""What hooks and callbacks get for the batch of a private step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.containers import open_containers
from lightning_dp.loading.loader import LogicalBatch
from lightning_dp.loading.placeholder import Withheld, emptied_object, held_inside, without_content


class HookBatch:
    """Hands a placeholder to the hooks around each private step, and keeps the step's sample for training_step.

    The placeholder is of the type that training_step gets, with the shapes of the dataset's first example and without its
    content: zeros. So a hook that reads its batch runs, and it can carry nothing from one step's examples to another's; not
    even the size of the draw is in it.

    Args:
        first_example: the dataset's first example as a batch on the device, opened, with the example on the first axis.
        to_user: from there to the batch that training_step takes.

    Attributes:
        sample: of the step under way. **Private**.
    """

    def __init__(self, first_example: Callable[[], Any], to_user: Callable[[Any], Any]) -> None:
        self._first_example, self._to_user = first_example, to_user
        self._blank: Any = None
        self._reason: str | None = None
        self._shown: Any = None
        self._leaves: list[tuple[str, Any, int]] = []
        self.sample: LogicalBatch | None = None

    def instead_of(self, sample: LogicalBatch) -> Any:
        """What the hooks around the step of ``sample`` get, made anew for each step."""
        self.sample, self._shown = sample, self.placeholder()
        self._leaves = leaves(self._shown)
        return self._shown

    def was_shown(self, batch: Any) -> bool:
        """Whether this very object was given to the hooks of the step under way."""
        return self.sample is not None and batch is self._shown

    def changed(self) -> list[str]:
        """Where hooks have changed the batch that they were shown."""
        return changes(self._leaves, leaves(self._shown))

    def placeholder(self) -> Any:
        """A batch without content, of the type that training_step takes."""
        if self._blank is None and self._reason is None:
            try:
                with isolate_rng():
                    self._blank = without_content(self._first_example(), emptied_object)
                self._made()
            except Exception as error:  # a collate_fn that needs several records, say; training itself will tell
                self._reason = f"the batch ({type(error).__name__}: {error})"
        return Withheld(self._reason) if self._reason is not None else self._made()

    def _made(self) -> Any:
        return self._to_user(
            pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, self._blank)
        )


def leaves(batch: Any) -> list[tuple[str, Any, int]]:
    """Everything that a batch holds: where, what, and for a tensor how often it was written into."""
    found = [
        (f"batch{pytree.keystr(path)}{inner}", leaf)
        for path, one in pytree.tree_leaves_with_path(open_containers(batch))
        for inner, leaf in held_inside(one)
    ]
    return [(where, leaf, leaf._version if isinstance(leaf, Tensor) else 0) for where, leaf in found]


def changes(before: list[tuple[str, Any, int]], after: list[tuple[str, Any, int]]) -> list[str]:
    """Where a batch holds something else than before, in its structure or content."""
    then = {where: (leaf, version) for where, leaf, version in before}
    now = {where: (leaf, version) for where, leaf, version in after}

    def same(where: str) -> bool:
        (old, old_version), (new, new_version) = then[where], now[where]
        if isinstance(old, _PLAIN) and type(old) is type(new):
            return bool(old == new)
        return old is new and old_version == new_version

    there = [*then, *(where for where in now if where not in then)]
    return [where for where in there if where not in then or where not in now or not same(where)]


_PLAIN = (str, bytes, int, float, complex, bool, type(None))
