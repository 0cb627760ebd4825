"""Who is protected: an example, or everything that one user has in the dataset."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_dp.batches.axis import fields_of
from lightning_dp.batches.containers import open_containers
from lightning_dp.batches.units import Units
from lightning_dp.errors import PreflightError
from lightning_dp.loading.held_records import HeldRecords
from lightning_dp.loading.reading import item
from lightning_dp.validate import shown, whole

DEFAULT_MOST = 32
"""So many examples of a user take part in a step unless another number is given."""

FILES = (".json", ".npy", ".txt")
"""A string that ends in one of these is a path."""

PATIENCE = 10.0
"""After so many seconds of reading, progress is told, and again after as many."""


class PrivacyUnit:
    """The callback's ``privacy_unit`` and ``max_examples_per_unit``, checked; reads whose each example is.

    Args:
        given: the name of a field of the dataset's items (``"user_id"``, ``"meta.user"``, or ``"2"`` for a position), the
            path of a file, or the users themselves: a sequence with one for each example, or a mapping from index to user.
            Users are any hashable values. **Private**: of these, only the name is ever shown.
        most: k, the most examples of a user in a step; ``None`` for 32.

    Attributes:
        name: of the unit, for the statement: the field, the file's stem, or ``"user"``.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> unit = PrivacyUnit(["ada", "bob", "ada"], None)
        >>> unit, len(unit.read(range(3)))
        (PrivacyUnit('user', 3 values, at most 32 each), 2)
    """

    def __init__(self, given: Any, most: int | None) -> None:
        if most is not None and whole("max_examples_per_unit", most) < 1:
            raise ValueError(f"max_examples_per_unit={most}: expected at least 1, or None for {DEFAULT_MOST}.")
        kinds = (str, Path, Mapping, list, tuple, np.ndarray, Tensor)
        if not isinstance(given, kinds) or (isinstance(given, str) and not given) or getattr(given, "ndim", 1) != 1:
            raise ValueError(
                f"privacy_unit=<{type(given).__name__}>: expected the name of a field of the dataset's items, such as "
                f"'user_id', a file ({', '.join(FILES)}), or one user for each example."
            )
        self.most = DEFAULT_MOST if most is None else most
        self._path = Path(given) if isinstance(given, (str, Path)) and _is_file_name(given) else None
        self._field = given if isinstance(given, str) and self._path is None else None
        self._users = given if self._path is None and self._field is None else None
        self.name: str = self._field or (self._path.stem if self._path else "user")

    def __repr__(self) -> str:
        source = "field" if self._field else f"file {self._path}" if self._path else f"{len(self._users)} values"  # type: ignore[arg-type]  # one of the three is given
        return f"PrivacyUnit({self.name!r}, {source}, at most {self.most} each)"

    def read(self, dataset: Any) -> Units:
        """Whose each example of ``dataset`` is. A field is read from every item, once.

        Raises:
            PreflightError: a field is missing, or it is not clear whose an example is.
        """
        if isinstance(dataset, HeldRecords):
            raise PreflightError(
                f"privacy_unit={self.name!r} with HeldRecords: expected a dataset that every rank holds whole. A user's "
                "records could be on several ranks. Hold the whole dataset on each, or leave out privacy_unit."
            )
        if self._field is not None:
            users = self._fields(dataset, self._field)
        else:
            users = self._values(_from_file(self._path) if self._path else self._users, len(dataset))
        numbers: dict[Hashable, int] = {}
        of_each = [numbers.setdefault(self._checked(index, user), len(numbers)) for index, user in enumerate(users)]
        return Units.of(of_each, self.most, self.name)

    def _fields(self, dataset: Any, name: str) -> Iterable[Any]:
        told = time.monotonic()
        with isolate_rng():
            for index in range(len(dataset)):
                found = fields_of(open_containers(item(dataset, index)))
                if name not in found:
                    raise PreflightError(
                        f"privacy_unit={name!r} is no field of dataset[{index}], which has {', '.join(found) or 'none'}: "
                        "expected the name of one with the user in it, such as 'user_id', or '2' for a position. Or give "
                        "the users themselves, one for each example."
                    )
                yield found[name]
                if time.monotonic() - told > PATIENCE:
                    told = time.monotonic()
                    rank_zero_info(
                        f"lightning_dp: reading {name!r} of every item, {index + 1} of {len(dataset)}. Give privacy_unit the "
                        "users themselves, or a file of them, to save this."
                    )

    def _values(self, users: Any, examples: int) -> Iterable[Any]:
        if len(users) != examples:
            raise PreflightError(
                f"privacy_unit has {len(users)} users for a dataset of {examples} examples: expected one for each example, in "
                "the order of the dataset that the training loader reads (of the Subset, if it is one)."
            )
        if not isinstance(users, Mapping):
            return users  # type: ignore[no-any-return]  # as the user gave it
        by_index = {index if isinstance(index, int) else str(index): user for index, user in users.items()}
        by_index = {int(index): user for index, user in by_index.items() if isinstance(index, int) or index.isdecimal()}
        missing = next((index for index in range(examples) if index not in by_index), None)
        if missing is not None:
            raise PreflightError(
                f"privacy_unit has no user for example {missing}: expected a mapping from every index of the dataset, 0 to "
                f"{examples - 1}, to a user."
            )
        return [by_index[index] for index in range(examples)]

    def _checked(self, index: int, user: Any) -> Hashable:
        if isinstance(user, (Tensor, np.ndarray, np.generic)) and np.prod(user.shape) == 1:
            user = user.item()
        nobody = user is None or user == "" or (isinstance(user, float) and math.isnan(user))
        if nobody or not isinstance(user, Hashable) or isinstance(user, Tensor):
            raise PreflightError(
                f"privacy_unit={self.name!r} of example {index} is {'missing' if nobody else f'a {type(user).__name__}'}: "
                "expected a user for every example, as a number, a string or another hashable value. Leave examples of "
                "nobody out of the dataset, or give each a user of its own."
            )
        return user


def unit_from(given: Any, most: int | None, static_shapes: bool) -> PrivacyUnit | None:
    """The unit asked for, or ``None`` where every example is one.

    Raises:
        ValueError: an argument is out of range, or does not go with the others.
    """
    if given is None:
        if most is not None:
            raise ValueError(
                f"max_examples_per_unit={shown(most)} without privacy_unit: expected both. Name the field with the user, as in "
                "privacy_unit='user_id', or leave it out."
            )
        return None
    if static_shapes:
        raise ValueError(
            "static_shapes=True with privacy_unit: expected False. Users differ in how many examples they have, so shapes do."
        )
    return PrivacyUnit(given, most)


def _is_file_name(given: str | Path) -> bool:
    return isinstance(given, Path) or given.endswith(FILES)


def _from_file(path: Path) -> Any:
    """The users in a file: a JSON list or object, a NumPy array, or one line each.

    Raises:
        PreflightError: there is no such file, or it is of another kind.
    """
    if not path.is_file() or path.suffix not in FILES:
        raise PreflightError(
            f"privacy_unit={str(path)!r}: expected a file that is there, and ends in {', '.join(FILES)}: with a list or an "
            "object from index to user, an array, or a line for each example."
        )
    try:
        if path.suffix == ".npy":
            users: Any = np.load(path, allow_pickle=False)
        else:
            text = path.read_text(encoding="utf-8")
            users = json.loads(text) if path.suffix == ".json" else text.splitlines()
    except ValueError as error:
        raise PreflightError(
            f"privacy_unit={str(path)!r} cannot be read: {error}. Expected one user for each example."
        ) from error
    if not isinstance(users, (list, dict, np.ndarray)) or getattr(users, "ndim", 1) != 1:
        raise PreflightError(
            f"privacy_unit={str(path)!r} holds a {type(users).__name__}: expected a list of users, one for each example, or an "
            "object from index to user."
        )
    return users
