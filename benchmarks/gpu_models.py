"""The models of ``benchmarks/gpu.py``: those of ``engine_models``, sizes that a GPU is bought for, and toys for its tests."""

from __future__ import annotations

import math

import torch
from engine_models import (
    TASKS,
    Task,
    _images,
    _Layer,
    _Pooled,
    _Positions,
    _sentences,
    _Transposed,
    language_model,
    with_lora,
)
from torch import Tensor, nn

from lightning_dp.models import WideResNet


def vision_transformer_base() -> nn.Module:
    """ViT-B/16 for 224 × 224 images, averaged over its 196 positions: 86 million parameters."""
    layers = [_Layer(768, 12, causal=False) for _ in range(12)]
    patches = [nn.Conv2d(3, 768, 16, 16), nn.Flatten(2), _Transposed(), _Positions()]
    return nn.Sequential(*patches, *layers, nn.LayerNorm(768), _Pooled(), nn.Linear(768, 1000))


def gpt2() -> nn.Module:
    """GPT-2 small in size, its output layer not tied: 12 layers of width 768, 50,257 words."""
    return language_model(depth=12, width=768, heads=12, words=50_257)


def toy() -> nn.Module:
    """Two convolutions with GroupNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4), nn.GroupNorm(2, 8), nn.GELU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip


def _large_images(size: int, views: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, views, 3, 224, 224), torch.randint(1000, (size, 1)).expand(size, views)


def _long_texts(size: int, views: int) -> tuple[Tensor, Tensor]:
    text = torch.randint(50_257, (size, views, 257))
    return text[..., :-1], text[..., 1:]


TASKS |= {
    "vit-b": Task(vision_transformer_base, _large_images),
    "gpt2": Task(gpt2, _long_texts),
    "gpt2-lora": Task(lambda: with_lora(gpt2()), _long_texts),
    "wrn-ws-last": Task(lambda: WideResNet(16, 4).to(memory_format=torch.channels_last), _images),
    "toy": Task(toy, _images),
    "toy-last": Task(lambda: toy().to(memory_format=torch.channels_last), _images),
    "toy-lora": Task(lambda: with_lora(language_model(1, 16, 2)), _sentences),
}


def parameters_of(name: str) -> int:
    """How many numbers of a task's model are trained."""
    with torch.device("meta"):
        return sum(math.prod(p.shape) for p in TASKS[name].model().parameters() if p.requires_grad)
