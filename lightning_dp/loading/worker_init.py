"""The user's ``worker_init_fn`` in a worker that reads for the private loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.data import get_worker_info


class WorkerInit:
    """Lets ``get_worker_info().dataset`` be the user's own data set, and calls the user's function.

    Args:
        user: ``None`` for nothing.
    """

    def __init__(self, user: Callable[[int], None] | None) -> None:
        self.user = user

    def __call__(self, worker: int) -> None:
        """Called by torch in worker number ``worker``."""
        info: Any = get_worker_info()
        object.__setattr__(info, "dataset", info.dataset.dataset)
        if self.user is not None:
            self.user(worker)
