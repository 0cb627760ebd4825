"""Errors that stop training before anything is released."""

from __future__ import annotations


class PreflightError(ValueError):
    """Training cannot be private as configured. The message names the value, the expectation and the remedy."""
