"""What treats every example by itself: known of torch's own functions and data sets, or vouched for by the user."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch.utils.data import ConcatDataset, StackDataset, Subset, TensorDataset, default_collate, default_convert
from torch.utils.data._utils import collate as torch_collate

from lightning_dp.lightning_internals import overridden
from lightning_dp.loading.held_records import HeldRecords
from lightning_dp.validate import shown

TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
ROW_WISE = ("__getitem__", "__getitems__", "collate_fn", *TRANSFER_HOOKS)
"""What ``row_wise`` may name."""

OURS = "lightning_dp.data."
"""Where hooks are made that are known to treat each example by itself."""


def check_row_wise(given: object) -> tuple[str, ...]:
    """The names given, in a fixed order; ``None`` for none.

    Raises:
        ValueError: one of them is not known.
    """
    if given is None:
        return ()
    names = list(given) if isinstance(given, (list, tuple)) else [given]
    if any(not isinstance(name, str) or name not in ROW_WISE for name in names) or isinstance(given, str):
        raise ValueError(
            f"row_wise={shown(given)}: expected a list of what you vouch for, of {', '.join(map(repr, ROW_WISE))}. Leave it "
            "out to have each of them see one example at a time, which is always right."
        )
    return tuple(name for name in ROW_WISE if name in names)


def is_written(name: str, owner: Any) -> bool:
    """Whether a batch transfer hook of a module or data module is the user's own.

    Lightning's are not, and neither are those of ``lightning_dp.data``: they work on each number by itself, draw nothing and
    leave nothing. Where a function comes from is told by the globals that it runs with; a wrapper can claim any name.

    Args:
        name: of :data:`TRANSFER_HOOKS`.
        owner: the module or data module.
    """
    if not overridden(name, owner):
        return False
    hook = getattr(owner, name)
    made_in = getattr(hook.__func__, "__globals__", {}).get("__name__", "") if isinstance(hook, MethodType) else ""
    return not str(made_in).startswith(OURS)


def is_row_wise(collate_fn: Any) -> bool:
    """Whether a ``collate_fn`` is torch's own, with nobody's rules for further types."""
    if collate_fn is not default_collate and collate_fn is not default_convert:
        return False
    rules = torch_collate.default_collate_fn_map.values()
    return all(str(getattr(rule, "__module__", "")).startswith("torch.") for rule in rules)


def draws_nothing(dataset: Any) -> bool:
    """Whether a data set is known to give the records that it holds, without random numbers or a look at others."""
    if type(dataset) in (TensorDataset, HeldRecords, list, tuple):
        return True
    if type(dataset) is Subset:
        return draws_nothing(dataset.dataset)
    if type(dataset) is ConcatDataset:
        return all(map(draws_nothing, dataset.datasets))
    if type(dataset) is StackDataset:
        parts = dataset.datasets
        return all(map(draws_nothing, parts.values() if isinstance(parts, dict) else parts))
    return False
