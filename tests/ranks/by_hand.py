"""A private run as a loop anybody can check: no Lightning, no loader, no engine, no ranks.

What the tests with several processes must reach. Taken from the package are only the streams of random numbers, that is
which examples a seed draws and the noise it gives; gradients, clipping, the sum and the step are written out here.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lightning_dp.mechanism.gaussian import add_gaussian_noise
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.sampling import poisson_sample
from tests.conftest import Regressor, weights


def sgd(
    module: Regressor,
    data: Dataset[tuple[Tensor, Tensor]],
    steps: Iterable[int],
    *,
    seed: int,
    noise_multiplier: float,
    clip_norm: float,
    expected_batch_size: int,
    changed: str = "",
) -> Tensor:
    """The weights after private SGD on the noisy gradients with the numbers ``steps``, and on no others.

    Args:
        module: whose weights move.
        data: what is sampled.
        steps: the numbers.
        seed: of all random numbers.
        noise_multiplier: σ.
        clip_norm: C.
        expected_batch_size: of a sample.
        changed: what enters the key beside the seed.
    """
    key, size = RandomKey.from_seed(seed, changed), len(data)
    parameters = list(module.parameters())
    for step in steps:
        total = torch.zeros(sum(p.numel() for p in parameters))
        for index in poisson_sample(key.generator(Stream.SAMPLING, step), size, expected_batch_size / size):
            inputs, target = data[int(index)]
            loss = nn.functional.mse_loss(module.net(inputs).squeeze(-1), target)
            gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
            total += gradient * min(1.0, clip_norm / float(gradient.norm()))
        add_gaussian_noise([(0, total)], total.numel(), noise_std=noise_multiplier * clip_norm, key=key, step=step)
        with torch.no_grad():
            for p, share in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
                p -= module.lr * share.view_as(p) / expected_batch_size
    return weights(module)
