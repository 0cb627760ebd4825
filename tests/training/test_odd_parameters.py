"""Parameters that are not simply there from the start: every engine gives what the loop gives, or a sentence says why not."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from lightning_dp import DifferentialPrivacy, PreflightError
from tests.conftest import Regressor, loader, regressor, trainer, weights


class TiedAndReused(L.LightningModule):
    """A weight with two names, a layer called twice, and two groups with rates of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.second.weight = self.first.weight

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = self.second(self.first(self.first(batch[0]).tanh()))
        return nn.functional.mse_loss(self.head(hidden).squeeze(-1), batch[1])

    def configure_optimizers(self) -> Any:
        others = [self.second.bias, *self.head.parameters()]
        return torch.optim.SGD([{"params": self.first.parameters()}, {"params": others, "lr": 0.3}], lr=0.1)


class ComplexBuffer(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("phase", torch.exp(1j * torch.arange(4.0)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(((batch[0] * self.phase).real, batch[1]), batch_idx)


class Complex(Regressor):
    """A layer of complex weights, and a complex parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Linear(4, 4, dtype=torch.complex64)
        self.phase = nn.Parameter(torch.exp(1j * torch.arange(4.0)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, targets = batch
        return super().training_step((self.turn(inputs * self.phase).abs(), targets), batch_idx)


class ConfiguredLate(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


class _Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


class Parametrized(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1))
        parametrize.register_parametrization(self.net[0], "weight", _Symmetric())
        parametrizations.weight_norm(self.net[2])
        parametrizations.orthogonal(self.net[3])


class SpectrallyNormalised(Regressor):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.spectral_norm(self.net[0])


def private(engine: Any = "auto", **options: Any) -> DifferentialPrivacy:
    return DifferentialPrivacy(**{"noise_multiplier": 0.5, "clip_norm": 0.5, "seed": 0, "engine": engine, **options})


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, about orthogonal under vmap
@pytest.mark.parametrize(
    "make", [TiedAndReused, Complex, ComplexBuffer, ConfiguredLate, Parametrized, SpectrallyNormalised]
)
def test_every_engine_trains_them_as_the_loop_does(make: Any) -> None:
    found = []
    for engine in ("auto", "vmap", "loop"):
        torch.manual_seed(0)
        module = make()
        trainer(private(engine), max_steps=3).fit(module, loader())
        found.append(weights(module))
    for other in found[:2]:
        torch.testing.assert_close(other, found[2], rtol=1e-5, atol=1e-6)


def test_without_noise_and_clipping_complex_parameters_take_lightnings_own_step() -> None:
    found = []
    for callbacks in ([], [private(noise_multiplier=0.0, clip_norm=math.inf, expected_batch_size=64)]):
        torch.manual_seed(0)
        module = Complex()
        trainer(*callbacks, max_steps=2).fit(module, loader(batch_size=64))
        found.append(weights(module))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
def test_noise_falls_on_real_and_imaginary_parts_and_the_clip_norm_bounds_both_together(engine: Any) -> None:
    class Field(Regressor):
        def __init__(self) -> None:
            super().__init__(lr=1.0)
            self.field = nn.Parameter(torch.zeros(4000, dtype=torch.complex64))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 100 * ((3 + 4j) * self.field.conj()).real.sum() / 4000 + 0 * batch[0].sum()

    noisy, quiet = Field(), Field()
    trainer(private(engine, noise_multiplier=2.0, expected_batch_size=16), max_steps=1).fit(noisy, loader())
    for parts in (noisy.field.detach().real, noisy.field.detach().imag):
        assert float(parts.std()) * 16 / (2.0 * 0.5) == pytest.approx(1.0, rel=0.06)
    real, imaginary = noisy.field.detach().real, noisy.field.detach().imag
    assert abs(float((real * imaginary).mean() / (real.std() * imaginary.std()))) < 0.06
    data = torch.utils.data.TensorDataset(torch.ones(1, 4), torch.ones(1))
    trainer(private(engine, noise_multiplier=0.0, expected_batch_size=1), max_steps=1).fit(quiet, loader(data))
    assert float(quiet.field.detach().norm()) == pytest.approx(0.5, rel=1e-4)  # one example, clipped to 0.5
    first = complex(quiet.field.detach()[0])
    assert first.imag / first.real == pytest.approx(4 / 3)


def test_complex_parameters_by_hand_and_in_exact_sums() -> None:
    class ByHand(Complex):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()

    found = []
    for make, options in ((Complex, {}), (ByHand, {}), (Complex, {"secure": True, "seed": None})):
        torch.manual_seed(0)
        module = make()
        module.automatic_optimization = make is Complex
        before = weights(module)
        trainer(private(**options), max_steps=2).fit(module, loader())
        found.append(weights(module))
        assert not torch.equal(torch.view_as_real(before), torch.view_as_real(found[-1]))
    torch.testing.assert_close(found[1], found[0])


def test_rates_of_parameter_groups_are_kept() -> None:
    torch.manual_seed(0)
    module = TiedAndReused()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    gradients: dict[str, Tensor] = {}
    module.on_before_optimizer_step = lambda _: gradients.update(
        {name: p.grad.clone() for name, p in module.named_parameters()}
    )
    trainer(private(), max_steps=1).fit(module, loader())
    for name, parameter in module.named_parameters():
        rate = 0.1 if name.startswith("first") else 0.3
        torch.testing.assert_close(parameter.detach(), before[name] - rate * gradients[name])


@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
def test_unused_parameters_get_their_noise(engine: Any) -> None:
    class Unused(Regressor):
        def __init__(self) -> None:
            super().__init__(lr=1.0)
            self.spare = nn.Parameter(torch.zeros(4000))

    module = Unused()
    trainer(private(engine, noise_multiplier=2.0, expected_batch_size=16), max_steps=1).fit(module, loader())
    assert float(module.spare.detach().std()) * 16 / (2.0 * 0.5) == pytest.approx(1.0, rel=0.06)


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_a_thawed_backbone_is_private_from_that_step_on(engine: Any, caplog: pytest.LogCaptureFixture) -> None:
    class Transfer(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = nn.Sequential(nn.Linear(4, 8), nn.Tanh()), nn.Linear(8, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.mse_loss(self.head(self.backbone(batch[0])).squeeze(-1), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    torch.manual_seed(0)
    module, seen = Transfer(), []
    module.on_before_optimizer_step = lambda _: seen.append(
        (module.backbone[0].weight.grad is not None, sum(p.grad is not None for p in module.parameters()))
    )
    callback = private(engine, noise_multiplier=2.0)
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    trainer(callback, thaw, max_epochs=2, max_steps=-1).fit(module, loader())
    assert seen == [(False, 2)] * 4 + [(True, 4)] * 4
    assert callback.ledger.steps == 8
    assert sum("tried again: 4 parameters" in record.message for record in caplog.records) == 1


def test_spectral_norm_goes_on_once_a_step_as_without_privacy() -> None:
    """No noise, no clip, all examples: the same weights and the same power iteration as plain Lightning."""
    modules = []
    for callbacks in ([DifferentialPrivacy(noise_multiplier=0.0, clip_norm=float("inf"))], []):
        torch.manual_seed(0)
        module = SpectrallyNormalised()
        trainer(*callbacks, max_steps=5).fit(module, loader(batch_size=64))
        modules.append(module)
    for (name, ours), theirs in zip(modules[0].state_dict().items(), modules[1].state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=name)
    assert all(layer.training for layer in modules[0].modules())


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated")
def test_the_older_spectral_norm_is_refused_with_the_newer_one_named() -> None:
    module = regressor()
    nn.utils.spectral_norm(module.net[0])
    with pytest.raises(PreflightError, match=r"net\.0\.weight_u.*expected.*torch\.nn\.utils\.parametrizations"):
        trainer(private()).fit(module, loader())
