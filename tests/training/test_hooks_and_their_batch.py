"""Hooks around a step get a batch of their own batch's type, without anybody's data; what they change in it is done."""

from __future__ import annotations

import math
from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import BatchEncoding

from lightning_dp import DifferentialPrivacy, PreflightError
from lightning_dp.loading.hook_batch import HookBatch
from lightning_dp.step.batch_hooks import BatchHooks, writes_into_argument
from tests.conftest import Regressor, loader, regression_data, trainer, weights
from tests.guarantees.mutations import caught, patched


@dataclass
class Item:
    image: Tensor
    label: Tensor


class Pair(NamedTuple):
    image: Tensor
    label: Tensor


class Own:
    def __init__(self, image: Tensor, label: Tensor) -> None:
        self.image, self.label = image, label


KINDS: dict[str, Any] = {
    "tuple": (lambda x, y: (x, y), lambda b: b),
    "list": (lambda x, y: [x, y], lambda b: b),
    "dict": (lambda x, y: {"image": x, "label": y}, lambda b: (b["image"], b["label"])),
    "dataclass": (Item, lambda b: (b.image, b.label)),
    "named tuple": (Pair, lambda b: b),
    "UserDict": (lambda x, y: UserDict(image=x, label=y), lambda b: (b["image"], b["label"])),
    "BatchEncoding": (lambda x, y: BatchEncoding({"image": x, "label": y}), lambda b: (b["image"], b.label)),
    "class": (Own, lambda b: (b.image, b.label)),
}


class Reader(Regressor):
    """Reads its batch in training_step and in the hooks around it."""

    def __init__(self, parts: Any) -> None:
        super().__init__()
        self.parts, self.seen = parts, []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(tuple(self.parts(batch)), batch_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append((type(batch), *(part.clone() for part in self.parts(batch))))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((type(batch), *(part.clone() for part in self.parts(batch))))


class Reading(L.Callback):
    def __init__(self, parts: Any) -> None:
        self.parts, self.seen = parts, []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((type(batch), *(part.clone() for part in self.parts(batch))))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module.log("rows", float(len(self.parts(batch)[0])), on_step=False, on_epoch=True, batch_size=1)
        self.seen.append((type(batch), *(part.clone() for part in self.parts(batch))))


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_meet_the_type_of_their_own_batch_and_no_content(kind: str) -> None:
    make, parts = KINDS[kind]
    module, reading = Reader(parts), Reading(parts)
    collate = lambda rows: make(*default_collate(rows))  # noqa: E731  # a collate_fn in one line
    private = DifferentialPrivacy(noise_multiplier=1.0)
    fit = trainer(reading, private, max_steps=2)
    fit.fit(module, loader(collate_fn=collate))
    expected = type(make(torch.zeros(1, 4), torch.zeros(1)))
    for seen in (module.seen, reading.seen):
        assert len(seen) == 4
        for found, image, label in seen:
            assert found is expected
            assert image.shape == (1, 4)
            assert label.shape == (1,)
            assert not image.any()
            assert not label.any()
    assert private.ledger is not None
    assert private.ledger.steps == 2
    assert float(fit.callback_metrics["rows"]) == 1.0


def nothing_private_reaches_a_hook() -> None:
    for seed in (1, 2):
        reading = Reading(lambda b: b)
        private = DifferentialPrivacy(noise_multiplier=1.0, seed=seed)
        trainer(reading, private, max_steps=3).fit(Reader(lambda b: b), loader(regression_data(seed=seed)))
        assert not any(part.any() for _, *parts in reading.seen for part in parts)


def test_no_example_and_no_size_of_a_draw_is_in_a_hooks_batch() -> None:
    nothing_private_reaches_a_hook()
    as_it_is = lambda self: self._form.closed(self._first_example())  # noqa: E731  # the mutation
    with caught(patched((HookBatch, "placeholder", as_it_is))):
        nothing_private_reaches_a_hook()


class PreProcessor(nn.Module, L.Callback):
    """As an anomaly-detection library does: the transform of a model is a callback of its own."""

    def __init__(self, how: str = "attribute") -> None:
        super().__init__()
        self.how, self.calls, self.latest = how, [], None

    def transform(self, image: Tensor) -> Tensor:
        return 3 * image + 1

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.calls.append(batch_idx)
        self.latest = batch.image
        if self.how == "attribute":
            batch.image = self.transform(batch.image)
        elif self.how == "in place":
            batch.image.mul_(3).add_(1)
        elif self.how == "by content" and batch.label.abs().max() > 0:  # never true of zeros
            batch.image = self.transform(batch.image)
        elif self.how == "elsewhere":
            _elsewhere(batch, self.transform)


def _elsewhere(batch: Any, transform: Any) -> None:
    batch.image = transform(batch.image)


def moved(*callbacks: L.Callback, module: Any = None, **options: Any) -> Tensor:
    module = Reader(KINDS["dataclass"][1]) if module is None else module
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    trainer(*callbacks, max_steps=2).fit(
        module, loader(regression_data(32), 32, collate_fn=lambda rows: Item(*default_collate(rows)))
    )
    return weights(module)


def plain_sum(**options: Any) -> DifferentialPrivacy:
    return DifferentialPrivacy(noise_multiplier=0.0, clip_norm=math.inf, expected_batch_size=32, **options)


@pytest.mark.parametrize("how", ["attribute", "in place", "by content", "elsewhere"])
def test_a_hook_that_changes_its_batch_changes_what_training_sees(how: str) -> None:
    processor = PreProcessor(how)
    found = moved(processor, plain_sum(physical_batch_size=5))
    torch.testing.assert_close(found, moved(PreProcessor(how)), rtol=1e-4, atol=1e-5)  # float32, another order of sums
    assert not torch.allclose(found, moved(), atol=1e-3)
    assert len(processor.calls) <= 3  # once a step, and once to find it: what runs on examples leaves nothing behind
    assert len(processor.latest.unique()) == 1  # of the placeholder


def test_a_hook_of_the_module_that_changes_its_batch() -> None:
    class Scaling(Reader):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            batch.image = batch.image - 2.0

    private = moved(plain_sum(), module=Scaling(KINDS["dataclass"][1]))
    torch.testing.assert_close(private, moved(module=Scaling(KINDS["dataclass"][1])), rtol=1e-4, atol=1e-5)


def no_example_reaches_another_through_a_hook() -> None:
    """A hook that takes the first of its batch from all others: removing one example changes the sum by no more than C."""

    class Centring(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            batch.image = batch.image - batch.image[:1]

    sums = []
    for rows in (range(24), range(1, 24)):
        module = Reader(KINDS["dataclass"][1])
        torch.manual_seed(0)
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        before = weights(module)
        private = DifferentialPrivacy(
            noise_multiplier=0.0, clip_norm=1.0, expected_batch_size=24, dataset_size=24, physical_batch_size=24
        )
        data = loader(
            torch.utils.data.Subset(regression_data(24), rows),
            24,
            collate_fn=lambda items: Item(*default_collate(items)),
        )
        trainer(Centring(), private, max_steps=1).fit(module, data)
        sums.append((before - weights(module)) * 24 / module.lr)
    assert float((sums[0] - sums[1]).norm()) <= 1.001


def test_a_hook_cannot_mix_examples() -> None:
    no_example_reaches_another_through_a_hook()

    def on_the_whole(self: BatchHooks, batch: Any) -> Any:
        from lightning_dp.batches.containers import close_containers, open_containers

        whole = close_containers(batch)
        self._run(self._to_be_run(), whole)
        return open_containers(whole)

    with patched((BatchHooks, "applied", on_the_whole)), pytest.raises((AssertionError, PreflightError)):
        no_example_reaches_another_through_a_hook()  # also the look before the first step notices


def test_a_hook_that_keeps_statistics_of_what_it_changes_is_refused() -> None:
    class Running(L.Callback):
        mean = torch.zeros(4)

        def __init__(self) -> None:
            self.mean = torch.zeros(4)

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.mean.mul_(0.9).add_(batch.image.mean(0), alpha=0.1)
            batch.image = batch.image - self.mean

    with pytest.raises(
        PreflightError, match=r"Running\.on_train_batch_start changes its batch, and writes into a tensor"
    ):
        moved(Running(), plain_sum())


def test_a_change_that_no_hook_makes_again_is_refused() -> None:
    class Once(L.Callback):
        done = 0

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            Once.done += 1
            if Once.done == 1:
                _elsewhere(batch, lambda image: image + 1)

    with pytest.raises(PreflightError, match=r"batch\.image was changed before training_step.*on_after_batch_transfer"):
        moved(Once(), plain_sum())


def test_what_in_a_hooks_batch_cannot_be_emptied_is_withheld() -> None:
    class Opaque:
        def __init__(self) -> None:
            self.name = iter("Ada")

    class Looking(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if self.look:
                batch[2][0].name  # noqa: B018  # looks
            assert batch[0].shape == (1, 4)

        def __init__(self, look: bool) -> None:
            self.look = look

    def collate(rows: list[Any]) -> Any:
        return [*default_collate(rows), [Opaque() for _ in rows]]

    def fit(look: bool) -> None:
        private = DifferentialPrivacy(noise_multiplier=1.0)
        trainer(Looking(look), private, max_steps=1).fit(Reader(lambda b: b[:2]), loader(collate_fn=collate))

    fit(look=False)
    with pytest.raises(TypeError, match=r"a hook looks into its batch, where a Opaque is withheld.*expected the hook"):
        fit(look=True)


def test_writing_is_seen_in_the_source() -> None:
    def attribute(batch: Any) -> None:
        batch.x = 1

    def item(batch: Any) -> None:
        batch["x"]["y"] += 1

    def unpacked(batch: Any) -> None:
        batch.x, batch.y = 1, 2

    def in_place(batch: Any) -> None:
        batch[0].mul_(2)

    def reads(batch: Any) -> Any:
        x = batch.x
        batch = x.y
        return batch.mean(), x.__len__()

    assert all(writes_into_argument(one, 0) for one in (attribute, item, unpacked, in_place))
    assert not writes_into_argument(reads, 0)
    assert not writes_into_argument(print, 0)
