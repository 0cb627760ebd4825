"""Users with different numbers of examples, and DP-SGD over users written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import SumMetric

from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.sampling import poisson_sample
from tests.conftest import Regressor, regression_data, regressor, weights

OWNERS = [0, 1, 0, 2, 0, 3, 4, 4, 0, 5, 5, 5, 6, 7, 7, 0, 8, 9, 9, 0, 10, 11, 11, 11]
"""Whose each of 24 examples is: twelve users with one to six examples."""

USERS = max(OWNERS) + 1


class WithUser(torch.utils.data.Dataset[Any]):
    """Regression data whose items are dicts with the user's name; ``left_out`` users are not in it."""

    def __init__(self, left_out: tuple[int, ...] = ()) -> None:
        self.data = regression_data(len(OWNERS))
        self.kept = [index for index, owner in enumerate(OWNERS) if owner not in left_out]

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        inputs, target = self.data[self.kept[index]]
        return {"inputs": inputs, "target": target, "user_id": f"user {OWNERS[self.kept[index]]}"}


class DictRegressor(Regressor):
    """The regressor on batches that are dicts; it counts the examples it is shown."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen = SumMetric()

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:  # type: ignore[override]  # other batches
        inputs, targets = batch["inputs"], batch["target"]
        loss = nn.functional.mse_loss(self.net(inputs).squeeze(-1), targets)
        self.seen.update(torch.ones_like(targets))
        self.log("train/loss", loss)
        return loss


def dict_regressor(seed: int = 0, **options: Any) -> DictRegressor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DictRegressor(**options)


def clipped(parts: list[Tensor], clip: float) -> Tensor:
    gradient = torch.cat([part.flatten() for part in parts])
    return gradient * min(1.0, clip / float(gradient.norm()))


def examples_drawn(user: int, most: int, key: RandomKey, step: int) -> list[int]:
    """A drawn user's examples: all, or ``most`` chosen with numbers of the step and the user."""
    own = [index for index, owner in enumerate(OWNERS) if owner == user]
    if len(own) <= most:
        return own
    chosen = key.generator(Stream.UNITS, step, user).choice(np.array(own), most, replace=False, shuffle=False)
    return sorted(int(index) for index in chosen)


def dp_sgd_over_users_by_hand(
    steps: int, *, sigma: float, clip: float, batch: int, seed: int, lr: float, most: int, dtype: torch.dtype
) -> Tensor:
    """One user at a time: the mean of the gradients of the user's examples, one backward pass each, is clipped once."""
    module, data, key = regressor().to(dtype), regression_data(len(OWNERS)), RandomKey.from_seed(seed)
    parameters = list(module.parameters())
    for step in range(steps):
        drawn = poisson_sample(key.generator(Stream.SAMPLING, step), USERS, batch / USERS)
        total = torch.zeros_like(weights(module))
        for user in drawn.tolist():
            of_each = []
            for index in examples_drawn(user, most, key, step):
                inputs, target = (tensor.to(dtype) for tensor in data[index])
                loss = (module.net(inputs[None])[0, 0] - target) ** 2
                of_each.append(torch.autograd.grad(loss, parameters))
            total += clipped([sum(column) / len(of_each) for column in zip(*of_each, strict=True)], clip)
        noise = key.generator(Stream.NOISE, step).standard_normal(len(total), dtype="float32")
        noisy = (total + sigma * clip * torch.from_numpy(noise)) / batch
        torch.nn.utils.vector_to_parameters(weights(module) - lr * noisy, parameters)
    return weights(module)
