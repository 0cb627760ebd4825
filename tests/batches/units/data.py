"""Users with different numbers of examples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import SumMetric

from tests.conftest import Regressor, regression_data
from tests.harness import OWNERS

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

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        inputs, targets = batch["inputs"], batch["target"]
        loss = nn.functional.mse_loss(self.net(inputs).squeeze(-1), targets)
        self.seen.update(torch.ones_like(targets))
        self.log("train/loss", loss)
        return loss


def dict_regressor(seed: int = 0, **options: Any) -> DictRegressor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DictRegressor(**options)
