"""What records of many lengths cost, and how padding helps: a step, as a multiple of one that pads to the longest of its batch.

    OMP_NUM_THREADS=1 uv run python benchmarks/lengths.py

A small transformer is trained on texts of 8 to 64 words. The private loader has each of them collated by itself, so a
``collate_fn`` that pads to a multiple pads by the text alone, and texts of one padded length run together. Cases take
turns, and time is processor time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_dp import DifferentialPrivacy

COUNT, BATCH, LONGEST, WORDS = 512, 256, 64, 2000
LENGTHS = (8 + torch.randint(LONGEST - 7, (COUNT,), generator=torch.Generator().manual_seed(0))).tolist()
TEXTS = [torch.randint(1, WORDS, (length,)) for length in LENGTHS]


class Texts(Dataset[Any]):
    """Words and a class."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        return TEXTS[index], index % 2


class Reader(L.LightningModule):
    """Masks its padding in the attention and in the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 128)
        self.layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
        self.head = nn.Linear(128, 2)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        mask = batch["mask"]
        hidden = self.layer(self.words(batch["words"]), src_key_padding_mask=~mask) * mask.unsqueeze(-1)
        return nn.functional.cross_entropy(self.head(hidden.sum(1) / mask.sum(1, keepdim=True)), batch["class"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def padding_to(multiple: int) -> Callable[[list[Any]], dict[str, Tensor]]:
    """A collate function, as of transformers' ``DataCollatorWithPadding(pad_to_multiple_of=multiple)``."""

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        length = -(-max(len(words) for words, _ in rows) // multiple) * multiple
        padded = torch.zeros(len(rows), length, dtype=torch.long)
        for row, (words, _) in zip(padded, rows, strict=True):
            row[: len(words)] = words
        return {"words": padded, "mask": padded > 0, "class": torch.tensor([label for _, label in rows])}

    return collate


class Steps(L.Callback):
    """How long steps take; of no user's, so that its own hooks are not watched."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin."""
        self._begun = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        """End."""
        self.seconds.append(time.process_time() - self._begun)


for hook in (Steps.on_train_batch_start, Steps.on_train_batch_end):
    hook.__module__ = "lightning_dp.benchmarks"

CASES: dict[str, tuple[int, list[str]]] = {
    "the longest of its batch, vouched for": (1, ["collate_fn"]),
    "nothing": (1, []),
    **{f"a multiple of {multiple}": (multiple, []) for multiple in (8, 16, 32)},
    "the longest of all": (LONGEST, []),
}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print("| each text is padded to | engine | ms an example | ÷ the first |\n|---|---|--:|--:|")
    for engine in ("ghost", "vmap"):
        found: dict[str, list[float]] = {name: [] for name in CASES}
        for _ in range(rounds):
            for name, (multiple, row_wise) in CASES.items():
                torch.manual_seed(0)
                times = Steps()
                given: dict[str, Any] = {"engine": engine, "row_wise": row_wise, "physical_batch_size": 128}
                privacy = DifferentialPrivacy(noise_multiplier=1.0, seed=0, expected_batch_size=BATCH, **given)
                trainer = L.Trainer(
                    max_steps=4, callbacks=[privacy, times], logger=False, enable_checkpointing=False,
                    enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1,
                )  # fmt: skip
                trainer.fit(Reader(), DataLoader(Texts(), batch_size=64, collate_fn=padding_to(multiple)))
                found[name].append(statistics.median(times.seconds[1:]))
        first = found["the longest of its batch, vouched for"]
        for name, times_of in found.items():
            ratio = statistics.median(one / other for one, other in zip(times_of, first, strict=True))
            print(f"| {name} | `{engine}` | {1e3 * statistics.median(times_of) / BATCH:.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
