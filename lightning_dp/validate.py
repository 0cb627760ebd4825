"""Is it a number at all? What comes from YAML, a command line or a checkpoint may be anything."""

from __future__ import annotations

from numbers import Integral, Real


def number(name: str, value: object) -> float:
    """``value`` as a float.

    Args:
        name: of the argument, for the message.
        value: anything.

    Raises:
        ValueError: it is no real number (a bool, a string, a tensor), or too large for a float.

    Example:
        >>> number("delta", 1e-5)
        1e-05
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}={shown(value)}: expected a plain number, and this is a {type(value).__name__}.")
    try:
        plain = float(value)
    except OverflowError:
        raise ValueError(f"{name}={shown(value)}: expected a number that a float can hold.") from None
    return plain


def whole(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """``value`` as an int.

    Args:
        name: of the argument, for the message.
        value: anything.
        low: the smallest number accepted, if there is one.
        high: the largest one, if there is one.

    Raises:
        ValueError: it is no whole number (a bool, a float, a string), or out of range.

    Example:
        >>> whole("steps", 875, low=0)
        875
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}={shown(value)}: expected a whole number, and this is a {type(value).__name__}.")
    plain = int(value)
    if low is not None and plain < low:
        raise ValueError(f"{name}={shown(value)}: expected at least {low}.")
    if high is not None and plain > high:
        raise ValueError(f"{name}={shown(value)}: expected at most {high:g}.")
    return plain


def truth(**values: object) -> None:
    """Raise ``ValueError`` unless each of the values is ``True`` or ``False``.

    Example:
        >>> truth(secure="no")
        Traceback (most recent call last):
        ValueError: secure='no': expected True or False.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={shown(value)}: expected True or False.")


def shown(value: object, most: int = 80) -> str:
    """``value`` in a message, cut to ``most`` characters, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # an int of thousands of digits, or an object whose repr fails
        text = f"<{type(value).__name__}>"
    return text if len(text) <= most else text[: most - 3] + "..."
