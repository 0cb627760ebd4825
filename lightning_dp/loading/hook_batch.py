"""What hooks and callbacks get for the batch of a private step."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.containers import open_containers
from lightning_dp.loading.form import ExampleForm
from lightning_dp.loading.loader import LogicalBatch, PoissonLoader
from lightning_dp.loading.placeholder import Withheld, emptied_object, held_inside, without_content


class HookBatch:
    """Hands a placeholder to the hooks around each private step, and keeps the step's sample for training_step.

    The placeholder is of the type that training_step gets, with the shapes of the dataset's first example and without its
    content: zeros. So a hook that reads its batch runs, and it can carry nothing from one step's examples to another's; not
    even the size of the draw is in it.

    Args:
        form: how a batch comes to the engines and back, without what hooks change.
        loader: whose first example gives the form.

    Attributes:
        sample: of the step under way. **Private**.
    """

    def __init__(self, form: ExampleForm, loader: PoissonLoader) -> None:
        self._form, self._loader = form, loader
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

    def _first_example(self) -> Any:
        """The dataset's first example as hooks find it: not changed by them yet."""
        return self._form.to_engine(self._loader.first_examples(1)[0])

    def _made(self) -> Any:
        return self._form.closed(
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
