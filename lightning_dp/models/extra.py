"""timm is optional: asked for when a recipe names one of its models, and never before."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


class MissingExtraError(ImportError):
    """A package that only some recipes need is not installed."""


def import_timm(because: str) -> ModuleType:
    """Import timm, or say how to install it.

    Args:
        because: what needs it, the beginning of the error's message.

    Raises:
        MissingExtraError: timm is not installed.
    """
    try:
        return import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise MissingExtraError(
            f"{because}, and timm is not installed: expected the extra 'timm'. Run pip install 'lightning-dp[timm]'."
        ) from error
