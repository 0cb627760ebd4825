"""A function in the place of a method, on one object: copies and pickles of that object have the method itself."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any


class Instead:
    """Stands in an object's ``__dict__`` under the name of a method.

    A bare function there would travel with every copy of the object and act on the original, and a local one could not be
    pickled at all. This one is called like the function, but a copy of the object gets what the object would have without it,
    bound to the copy.

    Args:
        owner: the object.
        name: of the method.
        function: what is called in its place.
        before: what stood in the object's own ``__dict__`` under the name, or ``None``.

    Example:
        >>> class Greeter:
        ...     def greet(self): return "hello"
        >>> one = Greeter()
        >>> one.greet = Instead(one, "greet", lambda: "good day")
        >>> one.greet(), copy.deepcopy(one).greet()
        ('good day', 'hello')
    """

    def __init__(self, owner: object, name: str, function: Callable[..., Any], before: Any = None) -> None:
        functools.update_wrapper(self, function)  # so that its signature is the function's
        self._owner, self._name, self._function, self._before = owner, name, function, before

    @property
    def before(self) -> Any:
        """What stood in the object's own ``__dict__``, or ``None``."""
        return self._before

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What the function gives."""
        return self._function(*args, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._before is not None:
            return copy.deepcopy(self._before, memo)
        owner = memo.get(id(self._owner), self._owner)
        return getattr(type(owner), self._name).__get__(owner)

    def __reduce__(self) -> tuple[Any, ...]:
        if self._before is not None:
            return _itself, (self._before,)
        return getattr, (
            self._owner,
            self._name,
        )  # looked up before the copy has a __dict__ of its own, so in its class


def _itself(value: Any) -> Any:
    return value
