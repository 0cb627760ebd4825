"""Data modules for the recipes: ordinary Lightning code."""

from lightning_dp.data.digits import DigitsDataModule

__all__ = ["DigitsDataModule"]
