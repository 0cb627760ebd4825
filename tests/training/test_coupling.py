"""Whatever couples examples is found before the first step; whatever does not is left alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy, PreflightError
from tests.conftest import Notes, Regressor, loader, trainer, weights
from tests.training.manual_modules import Gan, ManualRegressor

Loss = Callable[["Net", Tensor, Tensor], Tensor]
IMAGES = TensorDataset(torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3)


class Net(Regressor):
    """A loss of vectors and classes."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(hidden=6)
        with torch.random.fork_rng():
            torch.manual_seed(0)  # so that not all examples happen to have one expert
            self.body, self.head, self.drop = nn.Linear(4, 8), nn.Linear(8, 3), nn.Dropout(0.3)
            self.experts = nn.Linear(4, 4)
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self, *batch)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.drop(torch.tanh(self.body(x))))


def contrastive(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """SimCLR's loss: the other examples of the batch are the negatives (Chen et al. 2020, equation 1)."""
    one, two = (F.normalize(net.body(x + 0.1 * torch.randn_like(x)), dim=1) for _ in range(2))
    return F.cross_entropy(one @ two.T / 0.1, torch.arange(len(x)))


def mixed_up(net: Net, x: Tensor, y: Tensor) -> Tensor:
    order = torch.randperm(len(x))
    logits = net.logits(0.7 * x + 0.3 * x[order])
    return 0.7 * F.cross_entropy(logits, y) + 0.3 * F.cross_entropy(logits, y[order])


def balanced(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """The balancing loss of a mixture of experts (Fedus, Zoph, Shazeer 2022, equation 4)."""
    gates = net.experts(x).softmax(-1)
    load = F.one_hot(gates.argmax(-1), 4).double().mean(0).to(gates)
    return F.cross_entropy(net.logits(x), y) + 0.01 * 4 * (load * gates.mean(0)).sum()


def standardised(net: Net, x: Tensor, y: Tensor) -> Tensor:
    hidden = net.body(x)
    return F.cross_entropy(net.head(hidden - hidden.mean(0)), y)


def variance(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net.logits(x), y) - 0.1 * net.body(x).var(0, correction=0).sum()


COUPLED = [contrastive, mixed_up, balanced, standardised, variance]


@pytest.mark.parametrize("loss", COUPLED, ids=lambda loss: loss.__name__)
def test_a_loss_that_couples_examples_is_refused_before_the_first_step(loss: Loss) -> None:
    module = Net(loss)
    before = weights(module).clone()
    with pytest.raises(
        PreflightError, match=r"training_step couples examples.*expected a loss that is a sum or a mean"
    ):
        trainer(DifferentialPrivacy(noise_multiplier=1.0)).fit(module, loader(IMAGES, 8))
    assert torch.equal(weights(module), before)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("loss", [mixed_up, balanced, variance], ids=lambda loss: loss.__name__)
def test_it_is_refused_in_small_micro_batches_too(loss: Loss, size: int) -> None:
    with pytest.raises(PreflightError, match="training_step couples examples"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0, physical_batch_size=size)).fit(Net(loss), loader(IMAGES, 8))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, "auto", None])
def test_nothing_is_worked_on_in_larger_pieces_than_in_training(size: Any) -> None:
    """Also before the first step, when engines are tried and losses are looked at."""
    seen: dict[str, list[int]] = {"collated": Notes(), "moved": Notes(), "looked at": Notes()}

    class Watched(Net):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            seen["moved"].append(len(batch[0]))
            return batch

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen["looked at"].append(len(batch[0]))
            return mean(self, *batch)

    def collate(rows: list[Any]) -> Any:
        seen["collated"].append(len(rows))
        return torch.utils.data.default_collate(rows)

    private = DifferentialPrivacy(noise_multiplier=1.0, physical_batch_size=size)
    fit = trainer(private, max_steps=1)
    fit.fit(Watched(mean), loader(IMAGES, 8, collate_fn=collate))
    allowed = (
        max(2, fit.train_dataloader.physical_batch_size) if size == "auto" else fit.train_dataloader.physical_batch_size
    )
    assert all(max(sizes) <= allowed for sizes in seen.values()), seen
    assert (max(seen["looked at"]) > 1) == (fit.train_dataloader.physical_batch_size > 1), seen


def mean(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net.logits(x), y)


def with_noise_of_its_own(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """As in a denoising model: every example draws its own noise and its own level of it."""
    level = torch.rand(len(x), 1)
    return F.mse_loss(net.experts(net.drop(x + level * torch.randn_like(x))), x)


def regularised(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net.logits(x), y) + 0.1 * net.head.weight.square().sum()


def pairs_of_its_own(net: Net, x: Tensor, y: Tensor) -> Tensor:
    """Two views of each example and no other example."""
    one, two = (F.normalize(net.body(x + 0.1 * torch.randn_like(x)), dim=1) for _ in range(2))
    return -(one * two).sum(1).mean()


def no_gradient(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net.logits(x), y) * 0.0


MEANS = [mean, with_noise_of_its_own, regularised, pairs_of_its_own, no_gradient]


def summed(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net.head(net.body(x)), y, reduction="sum")


def class_weighted(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(net.logits(x), y, weight=torch.tensor([0.1, 1.0, 5.0], dtype=x.dtype))


def fit(loss: Loss, **options: Any) -> None:
    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=1, **options).fit(Net(loss), loader(IMAGES, 8))


@pytest.mark.parametrize("loss", MEANS, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_mean_over_examples_is_left_alone(loss: Loss, precision: str, caplog: pytest.LogCaptureFixture) -> None:
    fit(loss, precision=precision)
    assert "adds up" not in caplog.text


def test_a_sum_over_examples_is_told_what_it_is_divided_by(caplog: pytest.LogCaptureFixture) -> None:
    fit(summed)
    assert "training_step adds up the losses of its examples" in caplog.text


def test_weights_that_vanish_in_a_batch_of_one_are_warned_about() -> None:
    with pytest.warns(UserWarning, match="neither the mean nor the sum.*counts the same"):
        fit(class_weighted)


def one_at_a_time(net: Net, x: Tensor, y: Tensor) -> Tensor:
    return mean(net, x, y) if x.sum(1) > 0 else mean(net, -x, y)


def test_a_step_that_takes_single_examples_only_is_trained_and_told(caplog: pytest.LogCaptureFixture) -> None:
    fit(one_at_a_time)
    assert (
        "not whether a batch couples them, since Boolean value of Tensor with more than one value is ambiguous"
        in caplog.text
    )
    assert "test_coupling.py:" in caplog.text


def test_with_views_the_loss_is_checked_too() -> None:
    images = TensorDataset(torch.randn(24, 3, 8, 8), torch.arange(24) % 3)

    def flat(loss: Loss) -> Loss:
        return lambda net, x, y: loss(net, x.flatten(1)[:, :4], y)

    private = [DifferentialPrivacy(noise_multiplier=1.0), AugmentationMultiplicity(2)]
    trainer(*private, max_steps=1).fit(Net(flat(mean)), loader(images, 8))
    with pytest.raises(PreflightError, match="couples examples"):
        trainer(*private, max_steps=1).fit(Net(flat(standardised)), loader(images, 8))


class Sequences(Regressor):
    """Padded sequences; ``masked`` says whether the padding is left out of the mean."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        sequences, mask = batch["sequences"], batch["mask"]
        outputs = self.net(sequences).squeeze(-1)
        if self.masked:
            return ((outputs * mask).sum(1) / mask.sum(1)).square().mean()
        return outputs.mean(1).square().mean()


LENGTHS = [torch.randn(2 + index % 5, 4, generator=torch.Generator().manual_seed(index)) for index in range(24)]


def padded(rows: list[Tensor]) -> Any:
    sequences = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row)) for row in rows], batch_first=True)
    return {"sequences": sequences, "mask": mask}


def sorted_by_length(rows: list[Tensor]) -> Any:
    return padded(sorted(rows, key=len, reverse=True))


def with_noise(rows: list[Tensor]) -> Any:
    return padded([row + 0.1 * torch.randn_like(row) for row in rows])


def minus_their_mean(rows: list[Tensor]) -> Any:
    whole = torch.stack([row[:2] for row in rows])
    return {"sequences": whole - whole.mean(0), "mask": torch.ones(len(rows), 2)}


def shuffled_together(rows: list[Tensor]) -> Any:
    whole = torch.stack([row[:2] for row in rows])
    return {"sequences": 0.5 * (whole + whole[torch.randperm(len(rows))]), "mask": torch.ones(len(rows), 2)}


def fit_sequences(
    collate: Callable[[list[Tensor]], Any], masked: bool, size: int | None = None, vouched: bool = False
) -> None:
    row_wise = ["collate_fn"] if vouched else None
    private = DifferentialPrivacy(noise_multiplier=1.0, physical_batch_size=size, row_wise=row_wise)
    trainer(private, max_steps=1).fit(Sequences(masked), loader(LENGTHS, 8, collate_fn=collate))


@pytest.mark.parametrize("size", [1, 2, 3, None])
@pytest.mark.parametrize("collate", [padded, sorted_by_length, with_noise], ids=lambda f: f.__name__)
def test_padding_that_is_masked_is_left_alone(collate: Any, size: int | None) -> None:
    fit_sequences(collate, masked=True, size=size)


@pytest.mark.parametrize("size", [2, 3, None])
@pytest.mark.parametrize("collate", [padded, sorted_by_length], ids=lambda f: f.__name__)
def test_padding_that_enters_the_loss_is_refused_where_it_is_vouched_for(collate: Any, size: int | None) -> None:
    """Else removing the longest record would change every other record's gradient. One by one, nothing is padded."""
    with pytest.raises(PreflightError, match=r"collate_fn pads examples.*changed by .*%.*Mask the padding"):
        fit_sequences(collate, masked=False, size=size, vouched=True)
    fit_sequences(collate, masked=False, size=size)


def test_in_micro_batches_of_one_nothing_is_padded_to_fit_another() -> None:
    fit_sequences(padded, masked=False, size=1)


def test_records_too_short_by_themselves_are_no_cause_for_alarm() -> None:
    class Convolution(Sequences):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            outputs = F.conv1d(self.net(batch["sequences"]).mT, torch.ones(1, 1, 5))
            return outputs.square().mean()

    trainer(DifferentialPrivacy(noise_multiplier=1.0, row_wise=["collate_fn"]), max_steps=1).fit(
        Convolution(masked=True), loader(LENGTHS[3:], 21, collate_fn=padded)
    )


@pytest.mark.parametrize("size", [2, 3, None])
@pytest.mark.parametrize("collate", [minus_their_mean, shuffled_together], ids=lambda f: f.__name__)
def test_a_collate_fn_that_mixes_examples_is_refused(collate: Any, size: int | None) -> None:
    with pytest.raises(PreflightError, match="collate_fn mixes examples"):
        fit_sequences(collate, masked=True, size=size)


def test_rows_that_change_with_their_company_are_told_where_pairs_are_collated_apart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fit_sequences(padded, masked=True, size=2)
    assert (
        "not whether a batch couples them, since collate_fn makes other rows of an example in other company"
        in caplog.text
    )


class Discriminating(Gan):
    """A GAN whose discriminator may compare the images of a batch (minibatch discrimination, Salimans et al. 2016)."""

    def __init__(self, compares: bool) -> None:
        super().__init__()
        self.compares, self.features = compares, nn.Linear(4, 3)
        self.discriminator = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def adversarial_loss(self, images: Tensor, real: float) -> Tensor:
        features = self.features(images)
        others = features if self.compares else features.new_zeros(1, 3)
        closeness = torch.exp(-(features[:, None] - others).abs().sum(2)).sum(1, keepdim=True)
        return super().adversarial_loss(torch.cat([images, closeness], 1), real)

    def configure_optimizers(self) -> Any:
        own = [*self.discriminator.parameters(), *self.features.parameters()]
        return [torch.optim.SGD(self.generator.parameters(), lr=0.1), torch.optim.SGD(own, lr=0.1)]


def fit_by_hand(module: Any, data: Any = None, public: Any = (), **options: Any) -> DifferentialPrivacy:
    private = DifferentialPrivacy(noise_multiplier=1.0, public_optimizers=public, row_wise=["collate_fn"])
    trainer(private, max_steps=2).fit(module, loader(data, 8, **options))
    return private


def test_a_discriminator_that_compares_the_images_of_a_batch_is_refused() -> None:
    module = Discriminating(compares=True)
    before = weights(module).clone()
    with pytest.raises(PreflightError, match="training_step couples examples"):
        fit_by_hand(module, public=[0])
    assert torch.equal(weights(module), before)
    assert fit_by_hand(Discriminating(compares=False), public=[0]).ledger.steps == 1


class TwoByHand(ManualRegressor):
    """Two private optimizers, the second of which has a loss of its own."""

    def __init__(self, second: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.second = second

    def training_step(self, batch: Any, batch_idx: int) -> None:
        one, two = self.optimizers()
        self.manual_backward(self.net[0](batch[0]).square().mean())
        one.step()
        self.manual_backward(self.second(self.net[2](torch.tanh(self.net[0](batch[0]).detach()))))
        two.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[place].parameters(), lr=0.1) for place in (0, 2)]


def test_every_private_steps_own_loss_is_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(PreflightError, match="training_step couples examples"):
        fit_by_hand(TwoByHand(lambda output: output.var(0, correction=0).sum()))
    fit_by_hand(TwoByHand(lambda output: output.square().mean()))
    assert "adds up" not in caplog.text
    fit_by_hand(TwoByHand(lambda output: output.square().sum()))
    assert "adds up the losses of its examples" in caplog.text


class SequencesByHand(Sequences):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


def test_padding_is_looked_at_under_manual_optimization_too() -> None:
    for masked in (True, False):
        module = SequencesByHand(masked)
        module.automatic_optimization = False
        with nullcontext() if masked else pytest.raises(PreflightError, match="collate_fn pads examples"):
            fit_by_hand(module, LENGTHS, collate_fn=padded)
