"""Data modules for the recipes: ordinary Lightning code."""

from lightning_dp.data.cifar import CIFARDataModule
from lightning_dp.data.digits import DigitsDataModule
from lightning_dp.data.e2e import E2EDataModule
from lightning_dp.data.features import FixedFeatures
from lightning_dp.data.folder import ImageFolderDataModule
from lightning_dp.data.images import DataError
from lightning_dp.data.labelled_texts import LabelledTexts
from lightning_dp.data.random_process import RandomProcessImages

__all__ = [
    "CIFARDataModule",
    "DataError",
    "DigitsDataModule",
    "E2EDataModule",
    "FixedFeatures",
    "ImageFolderDataModule",
    "LabelledTexts",
    "RandomProcessImages",
]
