"""Modules that optimize by hand: their private steps equal a batch-of-one loop, their public ones cannot see the data."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_dp import DifferentialPrivacy, PreflightError
from lightning_dp.look import dry_run
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.sampling import poisson_sample
from lightning_dp.mechanism.seeded_globals import seed_globals
from tests.conftest import loader, regression_data, regressor, sample_of, trainer, weights
from tests.guarantees.mutations import caught, patched
from tests.harness import Setting, by_hand
from tests.nearly import assert_nearly
from tests.training.manual_modules import Gan, ManualRegressor, gan, manual_regressor

SIGMA, CLIP, BATCH, SEED, STEPS = 0.7, 0.05, 16, 3, 5


def clipped(gradients: Any) -> Tensor:
    flat = torch.cat([g.flatten() for g in gradients])
    return flat * min(1.0, CLIP / float(flat.norm()))


def gan_by_hand(sigma: float = SIGMA, zeros: bool = True) -> Tensor:
    """The GAN of manual_modules: generator by plain SGD on noise alone, discriminator by DP-SGD one example at a time."""
    module, data, key = gan(), regression_data(), RandomKey.from_seed(SEED)
    generator, discriminator = list(module.generator.parameters()), list(module.discriminator.parameters())
    for step in range(STEPS):
        seed_globals(key.torch_seed(Stream.DROPOUT, step, 0, 1))
        z = torch.randn(BATCH, 3)
        loss = module.adversarial_loss(module.generator(z), 1.0)
        for p, g in zip(generator, torch.autograd.grad(loss, generator), strict=True):
            p.data -= module.lr * g
        drawn = poisson_sample(key.generator(Stream.SAMPLING, step), len(data), BATCH / len(data))
        total = torch.zeros_like(weights(module.discriminator))
        seeds = key.seeds(Stream.DROPOUT, step, drawn)
        for index, seed in zip(drawn, seeds.tolist(), strict=True):
            seed_globals(seed)
            image, fake = data[index][0][None], module.generator(torch.randn(1, 3)).detach()
            loss = (module.adversarial_loss(image, 1.0) + module.adversarial_loss(fake, 0.0)) / 2
            total += clipped(torch.autograd.grad(loss, discriminator))
        noise = key.generator(Stream.NOISE, step).standard_normal(len(total), dtype="float32")
        noisy = (total + sigma * CLIP * torch.from_numpy(noise)) / BATCH
        nn.utils.vector_to_parameters(weights(module.discriminator) - module.lr * noisy, discriminator)
    return weights(module)


def fit_gan(engine: str = "loop", module: Gan | None = None, max_steps: int = 2 * STEPS, **options: Any) -> Any:
    module = module or gan()
    given = {"noise_multiplier": SIGMA, "clip_norm": CLIP, "seed": SEED, "public_optimizers": [0], **options}
    private = DifferentialPrivacy(engine=engine, **given)
    fit = trainer(private, max_steps=max_steps)
    fit.fit(module, loader(batch_size=BATCH))
    return module, private, fit


@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
def test_one_optimizer_equals_the_batch_of_one_loop(engine: str) -> None:
    module = manual_regressor()
    private = DifferentialPrivacy(noise_multiplier=0.7, clip_norm=0.3, seed=3, engine=engine, physical_batch_size=5)
    fit = trainer(private, max_steps=6)
    fit.fit(module, loader(batch_size=16))
    expected = by_hand(Setting(batch=16, steps=6, examples=64))
    torch.testing.assert_close(weights(module), expected, rtol=1e-5, atol=1e-6)
    assert private.ledger.steps == fit.global_step == 6
    assert 0 < fit.callback_metrics["train/loss"] < 10  # logged after the step, and still the sample's mean


def test_a_gan_equals_the_loop_written_by_hand() -> None:
    module, private, fit = fit_gan()
    torch.testing.assert_close(weights(module), gan_by_hand(), rtol=1e-5, atol=1e-6)
    assert private.ledger.steps == STEPS  # charged for the discriminator alone
    assert fit.global_step == 2 * STEPS
    assert all(math.isfinite(fit.callback_metrics[name]) for name in ("d_loss", "g_loss"))
    assert private.plan.steps == STEPS


def test_without_noise_a_manual_module_is_plain_lightning() -> None:
    """No noise, no clip, every example in every step: the user's own loop, which zeroes, toggles and steps as it likes."""
    plain, private = manual_regressor(), manual_regressor()
    everything = regression_data(32)
    callback = DifferentialPrivacy(noise_multiplier=0.0, clip_norm=math.inf)
    trainer(callback, max_steps=8).fit(private, loader(everything, 32))
    trainer(max_steps=8).fit(plain, loader(everything, 32))
    torch.testing.assert_close(weights(private), weights(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
def test_precision_changes_the_forward_pass_and_nothing_of_the_mechanism(precision: Any) -> None:
    """By hand or by itself, the same gradients: norms and sums are not computed inside the step's autocast."""
    found = []
    for module in (manual_regressor(), regressor()):
        private = DifferentialPrivacy(noise_multiplier=0.0, clip_norm=0.1, seed=0, engine="vmap")
        trainer(private, precision=precision, max_steps=3).fit(module, loader())
        found.append(weights(module).double())
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-7)


def public_steps_see_no_data() -> None:
    """Two data sets without a record in common give the same generator, until the discriminator tells it something."""
    generators = []
    for seed in (1, 2):
        module = gan()
        private = DifferentialPrivacy(
            noise_multiplier=SIGMA, clip_norm=CLIP, seed=SEED, engine="loop", public_optimizers=[0]
        )
        # the discriminator's rate is 0, so the only way from the data to the generator is the one that must not be
        module.configure_optimizers = lambda module=module: [
            torch.optim.SGD(module.generator.parameters(), lr=0.1),
            torch.optim.SGD(module.discriminator.parameters(), lr=0.0),
        ]
        trainer(private, max_steps=6).fit(module, loader(regression_data(seed=seed), BATCH))
        generators.append(weights(module.generator))
    before = weights(gan().generator)
    assert not torch.equal(generators[0], before)
    assert_nearly(generators[0], generators[1], rtol=1e-5, atol=1e-6)  # float32, in another order of sums at most


def test_a_public_step_is_the_same_whatever_the_data() -> None:
    public_steps_see_no_data()


def public_steps_see_no_data_by_content() -> None:
    """As above, with a generator loss that would use the batch's content if it could (only on the second batch)."""
    generators = []
    for seed in (1, 2):
        module = gan()
        module.usual_loss = module.adversarial_loss
        step = module.training_step

        def peeking(batch: Any, batch_idx: int, step: Any = step, module: Any = module) -> None:
            if batch_idx > 8:  # later than any rehearsal looks
                extra = batch[0].mean()
                scale = 1 + extra.detach()
                module.adversarial_loss = lambda images, real: module.usual_loss(images, real) * scale
            step(batch, batch_idx)

        module.training_step = peeking
        module.configure_optimizers = lambda module=module: [
            torch.optim.SGD(module.generator.parameters(), lr=0.1),
            torch.optim.SGD(module.discriminator.parameters(), lr=0.0),
        ]
        private = DifferentialPrivacy(
            noise_multiplier=SIGMA,
            clip_norm=CLIP,
            seed=SEED,
            engine="loop",
            public_optimizers=[0],
        )
        # 16 batches in an epoch, of which 12 are taken: batch_idx has to pass 8 within one
        trainer(private, max_steps=24).fit(module, loader(regression_data(seed=seed), batch_size=4))
        generators.append(weights(module.generator))
    assert_nearly(generators[0], generators[1], rtol=1e-5, atol=1e-6)  # float32, in another order of sums at most


def test_a_public_step_that_would_peek_after_rehearsal_sees_zeros() -> None:
    public_steps_see_no_data_by_content()
    with caught(
        patched((dry_run, "without_content", lambda batch: batch))
    ):  # the placeholder keeps what it should lose
        public_steps_see_no_data_by_content()


def test_a_public_optimizer_whose_loss_reads_the_batch_is_refused() -> None:
    class Matching(Gan):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer_g, optimizer_d = self.optimizers()
            optimizer_g.zero_grad()
            self.manual_backward((self.generator(torch.randn(len(batch[0]), 3)) - batch[0]).square().mean())
            optimizer_g.step()
            optimizer_d.zero_grad()
            self.manual_backward(self.adversarial_loss(batch[0], 1.0))
            optimizer_d.step()

    module = Matching()
    before = weights(module)
    with pytest.raises(PreflightError, match=r"optimizer 0 changes with the batch: expected.*public_optimizers"):
        fit_gan(module=module)
    assert torch.equal(weights(module), before)


class TwoPrivate(L.LightningModule):
    """Two parts with a loss and an optimizer each; every gradient is 0, so what moves them is the noise alone."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.parts = nn.ParameterList([torch.zeros(4000), torch.zeros(4000)])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, part in zip(self.optimizers(), self.parts, strict=True):
            optimizer.zero_grad()
            self.manual_backward((part * 0.0).sum() + 0.0 * batch[0].sum())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([part], lr=1.0) for part in self.parts]


def two_releases_of_one_sample_cost_one() -> None:
    """m releases of one sample have noise √m·σ each, of their own, and are charged as one step with σ."""
    module = TwoPrivate()
    private = DifferentialPrivacy(noise_multiplier=2.0, clip_norm=0.5, expected_batch_size=16)
    fit = trainer(private, max_steps=2)
    fit.fit(module, loader())
    assert private.ledger.steps == 1
    assert fit.global_step == 2
    first, second = (part.detach() * 16 / (2.0 * 0.5) for part in module.parts)
    for part in (first, second):
        assert float(part.std()) == pytest.approx(math.sqrt(2), rel=0.06)  # 4000 draws: ± 1.1 % in one deviation
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.08  # 5 deviations


def test_two_private_optimizers_share_one_charge_by_more_noise_each() -> None:
    two_releases_of_one_sample_cost_one()
    from lightning_dp.step.open_step import OpenStep

    original = OpenStep.release

    def one_noise_for_all(self: Any, gradient: Any, *, part: int = 0, parts: int = 1) -> Any:
        noisy, ledger = original(self, gradient, part=0, parts=parts), self.run.planned.ledger
        ledger._charged -= part > 0
        return noisy

    def no_more_noise(self: Any, gradient: Any, *, part: int = 0, parts: int = 1) -> Any:
        return original(self, gradient, part=part, parts=1)

    for bug in (one_noise_for_all, no_more_noise):
        with caught(patched((OpenStep, "release", bug))):
            two_releases_of_one_sample_cost_one()


def test_every_nth_batch_and_a_batch_without_a_private_step() -> None:
    """Only batches with a private step are charged, samples are never used twice, and a resume goes on behind them."""

    class Alternating(Gan):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()[batch_idx % 2]
            real, fake = batch[0], self.generator(torch.randn(len(batch[0]), 3))
            loss = self.adversarial_loss(fake, 1.0) if batch_idx % 2 == 0 else self.adversarial_loss(real, 1.0)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    seen: list[int] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(sample_of(trainer).step)

    private = DifferentialPrivacy(noise_multiplier=1.0, public_optimizers=[0], engine="vmap")
    first = trainer(private, Watch(), max_steps=7)
    first.fit(Alternating(), loader())
    assert private.ledger.steps == 3
    assert private.state_dict()["unused_samples"] == 4
    first.save_checkpoint("half.ckpt")
    again = DifferentialPrivacy(noise_multiplier=1.0, public_optimizers=[0], engine="vmap")
    trainer(again, Watch(), max_steps=10).fit(Alternating(), loader(), ckpt_path="half.ckpt")
    assert again.ledger.steps in (4, 5)  # Lightning counts batches of a resumed, unfinished epoch on
    assert seen == list(range(10))

    every_fourth = gan()
    every_fourth.every = 4
    private = DifferentialPrivacy(noise_multiplier=1.0, public_optimizers=[0], engine="vmap")
    fit = trainer(private, max_epochs=2, max_steps=-1)
    fit.fit(every_fourth, loader())
    assert private.ledger.steps == private.plan.steps == 8
    assert fit.global_step == 10


class _Closure(ManualRegressor):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            loss = nn.functional.mse_loss(self.net(batch[0]).squeeze(-1), batch[1])
            self.seen = loss
            optimizer.zero_grad()
            self.manual_backward(loss)
            return loss

        with optimizer.toggle_model():
            optimizer.step(closure=closure)
        self.lr_schedulers().step()
        for parameter in self.net.parameters():
            parameter.data.clamp_(-0.2, 0.2)
        return self.seen

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def test_closures_schedulers_clamps_and_hooks_run_once_a_step() -> None:
    hooks: list[str] = []
    module = _Closure()
    module.on_before_optimizer_step = lambda optimizer: hooks.append(
        f"{sum(float(p.grad.abs().sum()) for p in module.parameters()):.6f}"
    )
    outputs: list[Any] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs_: Any, *_: Any) -> None:
            outputs.append(float(outputs_["loss"]))

    private = DifferentialPrivacy(noise_multiplier=1.0, seed=0)
    fit = trainer(private, Watch(), max_steps=3)
    fit.fit(module, loader())
    assert len(hooks) == len(set(hooks)) == 3  # each saw the gradient of its own step, none that of the stand-in
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5**4)
    assert float(weights(module).abs().max()) <= 0.2001
    assert all(math.isfinite(one) and one > 0 for one in outputs)
