"""Models for the recipes: ordinary Lightning code."""

from lightning_dp.models.classifier import ImageClassifier
from lightning_dp.models.contrastive import ContrastivePretraining
from lightning_dp.models.digits_cnn import DigitsCNN
from lightning_dp.models.efficientnet_lite import EfficientNetLite
from lightning_dp.models.feature_covariance import FeatureCovariance
from lightning_dp.models.frozen_body import FrozenBody
from lightning_dp.models.gpt2 import GPT2
from lightning_dp.models.head_first import HeadFirst
from lightning_dp.models.language_model import LanguageModel
from lightning_dp.models.least_squares import LeastSquares
from lightning_dp.models.norm_free import NormFreeNet
from lightning_dp.models.pooled_layers import PooledLayers
from lightning_dp.models.scattering import Scattering2d
from lightning_dp.models.strided_cnn import StridedCNN
from lightning_dp.models.tanh_cnn import TanhCNN
from lightning_dp.models.text_classifier import SentenceClassifier, TextClassifier
from lightning_dp.models.weight_standardisation import WSConv2d
from lightning_dp.models.wide_resnet import WideResNet

__all__ = [
    "GPT2",
    "ContrastivePretraining",
    "DigitsCNN",
    "EfficientNetLite",
    "FeatureCovariance",
    "FrozenBody",
    "HeadFirst",
    "ImageClassifier",
    "LanguageModel",
    "LeastSquares",
    "NormFreeNet",
    "PooledLayers",
    "Scattering2d",
    "SentenceClassifier",
    "StridedCNN",
    "TanhCNN",
    "TextClassifier",
    "WSConv2d",
    "WideResNet",
]
