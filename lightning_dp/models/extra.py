"""Packages that are not needed by everybody: imported when asked for, or said how to install."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


class MissingExtraError(ImportError):
    """A package that is needed for what was asked is not installed."""


def import_extra(name: str, extra: str, because: str) -> ModuleType:
    """Import a package, or say how to install it.

    Args:
        name: of the module to import, such as ``"torchvision.datasets"``.
        extra: of this package, that brings it.
        because: what needs it, the beginning of the error's message.

    Raises:
        MissingExtraError: it is not installed.
    """
    package = name.split(".")[0]
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise MissingExtraError(
            f"{because}, and {package} is not installed: expected the extra {extra!r}. "
            f"Run pip install 'lightning-dp[{extra}]'."
        ) from error
