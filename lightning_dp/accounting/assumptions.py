"""What the user vouches for, step by step: the guarantee of those steps rests on it for good."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_dp.validate import shown

NAMES = ("row_wise", "public_state", "sizes")
"""Under which it is written."""
MOST, LONGEST = 1000, 1000
SIZE_GIVEN, SIZE_READ = "dataset_size as given", "dataset_size of the data"
STEPS_READ = "steps of the data"
"""How N and T came about: what is of the data follows from how many examples there are."""


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What is taken on the user's word while a step is taken.

    Args:
        row_wise: code that is taken to treat each example by itself.
        public_state: attributes of the module that hooks may change by what they learn in private.
        sizes: how N and T came about, :data:`SIZE_GIVEN` and the like; empty where nobody knows. Nothing is computed from it.

    Example:
        >>> Assumptions(row_wise=("collate_fn",)).numbers
        {'row_wise': ['collate_fn'], 'public_state': [], 'sizes': []}
    """

    row_wise: tuple[str, ...] = ()
    public_state: tuple[str, ...] = ()
    sizes: tuple[str, ...] = field(default=(), repr=False)  # so that the key of a known seed is as it was

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Assumptions:
        """The inverse of :attr:`numbers`; other names in ``raw`` are left alone, and those missing are empty.

        Raises:
            ValueError: they are no lists of names.
        """
        for name in NAMES:
            given = raw.get(name, [])
            if type(given) is not list or len(given) > MOST or not all(map(_is_name, given)):
                raise ValueError(f"{name}={shown(given)}: expected a list of names.")
        return cls(*(tuple(raw.get(name, ())) for name in NAMES))

    @property
    def numbers(self) -> dict[str, list[str]]:
        """As plain values."""
        return {name: list(getattr(self, name)) for name in NAMES}


NOTHING_ASSUMED = Assumptions()


def caveats(current: Assumptions, past: Iterable[tuple[Assumptions, int]]) -> tuple[str, ...]:
    """What a reader of the statement has to know of them.

    Args:
        current: of the steps to come.
        past: of the steps taken under other plans, and how many these are.

    Example:
        >>> caveats(Assumptions(), [])
        ()
        >>> caveats(Assumptions(), [(Assumptions(row_wise=("collate_fn",)), 3)])[0][:64]
        'the user vouched for collate_fn in 3 steps of earlier fits: each'
    """
    found, before = [], [(assumed, steps) for assumed, steps in past if steps]
    if current.row_wise:
        found.append(f"the user vouches for {_list(current.row_wise)}: {_ROW_WISE}")
    earlier = _earlier(current.row_wise, [(assumed.row_wise, steps) for assumed, steps in before])
    found += [f"the user vouched for {names} in {when}: {_ROW_WISE}" for names, when in earlier]
    if current.public_state:
        found.append(f"the user declares {_list(current.public_state)} public: {_PUBLIC}")
    earlier = _earlier(current.public_state, [(assumed.public_state, steps) for assumed, steps in before])
    found += [f"the user declared {names} public in {when}: {_PUBLIC}" for names, when in earlier]
    return tuple(found)


_ROW_WISE = "each row that it makes is taken to depend on its own example alone, which is not enforced"
_PUBLIC = "what hooks write there is taken to follow from no example, which is not enforced"


def _earlier(now: Sequence[str], before: Sequence[tuple[Sequence[str], int]]) -> list[tuple[str, str]]:
    """Names that are not vouched for any more, those with equally many steps together."""
    steps: dict[str, int] = {}
    for names, count in before:
        for name in dict.fromkeys(names):
            if name not in now:
                steps[name] = steps.get(name, 0) + count
    found = []
    for count in dict.fromkeys(steps.values()):
        taken = "1 step" if count == 1 else f"{count} steps"
        found.append((_list([name for name in steps if steps[name] == count]), f"{taken} of earlier fits"))
    return found


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST
