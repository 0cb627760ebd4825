"""Models for the recipes: ordinary Lightning code."""

from lightning_dp.models.digits_cnn import DigitsCNN

__all__ = ["DigitsCNN"]
