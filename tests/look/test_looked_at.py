"""One row of the panel says what was looked at before the first step, and what was not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import default_collate

from lightning_dp import DifferentialPrivacy
from tests.conftest import Regressor, loader, trainer


class Hooked(Regressor):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


class OneOnly(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + 0 * batch[1].item())


def collate(rows: list[Any]) -> Any:
    return default_collate(rows)


AGREES = "2 examples for the engine, which gives the gradients of plain backward passes (within 1%); "
TOGETHER = "8 in one batch, which does not couple them"
ALONE = "; each is a batch of its own in training"
CASES: dict[str, tuple[type[Regressor], dict[str, Any], Any, str]] = {
    "ordinary": (Regressor, {}, None, f"{AGREES}{TOGETHER}."),
    "loop": (Regressor, {"engine": "loop"}, None, f"2 examples for the engine; {TOGETHER}."),
    "one": (
        Regressor,
        {"physical_batch_size": 1},
        None,
        f"not whether a batch couples them, since micro-batches hold one (physical_batch_size=1){ALONE}.",
    ),
    "item": (OneOnly, {"engine": "loop"}, None, "not whether a batch couples them, since a Tensor with"),
    "each": (Regressor, {"batch_axis": "each"}, None, f"since each is collated by itself{ALONE}."),
    "own functions": (Hooked, {}, collate, f"{TOGETHER}. One example at a time: collate_fn, on_after_batch_transfer."),
    "vouched": (Hooked, {"row_wise": ["collate_fn"]}, collate, "One example at a time: on_after_batch_transfer."),
}


@pytest.mark.parametrize("name", CASES)
def test_it_says_what_was_seen(name: str, caplog: pytest.LogCaptureFixture) -> None:
    module, options, collate_fn, said = CASES[name]
    torch.manual_seed(0)
    private = DifferentialPrivacy(noise_multiplier=1.0, **options)
    trainer(private, max_steps=1).fit(module(), loader(collate_fn=collate_fn))
    told = [line for record in caplog.records for line in record.getMessage().splitlines()]
    lines = [line for line in told if line.startswith("  checked ")]
    assert len(lines) == 1
    assert said in lines[0]


def test_it_says_that_examples_of_many_shapes_run_apart(caplog: pytest.LogCaptureFixture) -> None:
    """And nothing of it once they are padded to a multiple."""

    class Mean(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(torch.stack([batch[0].mean(1)] * 4, -1)).mean()

    def padding_to(multiple: int) -> Any:
        def pad(rows: list[Any]) -> Any:
            longest = max(len(x) for x, _ in rows)
            length = -(-longest // multiple) * multiple
            return torch.stack([F.pad(x, (0, length - len(x))) for x, _ in rows]), torch.stack([y for _, y in rows])

        return pad

    data = [(torch.randn(2 + index), torch.tensor(0.0)) for index in range(16)]
    for multiple, many in ((1, True), (32, False)):
        caplog.clear()
        private = DifferentialPrivacy(noise_multiplier=1.0)
        trainer(private, max_steps=1).fit(Mean(), loader(data, 4, collate_fn=padding_to(multiple)))
        assert ("8 shapes among them, of which equal ones run together" in caplog.text) == many
