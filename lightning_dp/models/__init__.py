"""Models for the recipes: ordinary Lightning code."""

from lightning_dp.models.digits_cnn import DigitsCNN
from lightning_dp.models.weight_standardisation import WSConv2d
from lightning_dp.models.wide_resnet import WideResNet

__all__ = ["DigitsCNN", "WSConv2d", "WideResNet"]
