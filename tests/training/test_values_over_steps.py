"""Under manual optimization, what training_step made before a step is after it what plain training would use."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_dp import DifferentialPrivacy
from lightning_dp.engines.drawing import Alone, Drawing
from lightning_dp.engines.select import EngineError
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.sampling import poisson_sample
from lightning_dp.mechanism.seeded_globals import seed_globals
from lightning_dp.step.manual.values_over_steps import PutBackInTime
from tests.conftest import loader, trainer, weights
from tests.guarantees.mutations import caught, patched

ROWS = 12


def data(width: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(*(torch.randn(ROWS, width, generator=generator) for _ in range(2)))


class Scripted(L.LightningModule):
    """Three parts with an optimizer each, and a training_step that does what a script says, in order.

    ``make`` keeps something made with a part without a graph, ``detach`` one that is cut off, and ``step`` steps its optimizer.
    ``grown`` is made of every part at the beginning, with its graph. Parts that are public have a loss without the batch.
    """

    def __init__(self, script: list[tuple[str, int]], public: list[int]) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.parts = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
        self.script, self.public = script, public
        self.register_buffer("latent", torch.linspace(-1, 1, 3)[None])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        optimizers = self.optimizers()
        scale = 1 + 0.1 * self.global_step
        kept = torch.zeros_like(inputs)
        grown = [part(inputs) for part in self.parts]
        for verb, which in self.script:
            part = self.parts[which]
            if verb == "detach":
                kept = kept + torch.tanh(part(inputs + kept)).detach()
                continue
            if verb == "make":
                with torch.no_grad():
                    kept = kept + torch.tanh(part(inputs + kept))
                continue
            if which in self.public:
                loss = part(self.latent).square().mean() * scale
            else:
                out = part(kept) + grown[which]
                for other in self.parts:
                    out = torch.tanh(out + (0 if other is part else other(out)))
                loss = (out - targets).square().mean() * scale
            self.toggle_optimizer(optimizers[which])
            optimizers[which].zero_grad()
            self.manual_backward(loss)
            optimizers[which].step()
            self.untoggle_optimizer(optimizers[which])

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.5) for part in self.parts]


def trained(script: list[tuple[str, int]], public: list[int], *callbacks: L.Callback) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Scripted(script, public)
    steps = sum(verb == "step" for verb, _ in script)
    trainer(*callbacks, max_steps=2 * steps).fit(module, loader(data(), ROWS))
    return weights(module)


def check_script(script: list[tuple[str, int]], public: list[int], engine: Any = "loop") -> None:
    private = DifferentialPrivacy(
        noise_multiplier=0.0,
        clip_norm=math.inf,
        expected_batch_size=ROWS,
        engine=engine,
        public_optimizers=public,
        physical_batch_size=5,
    )
    found, expected = trained(script, public, private), trained(script, public)
    # float32, two training_steps of up to five gradients: rounding alone makes some 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@st.composite
def scripts(draw: st.DrawFn) -> tuple[list[tuple[str, int]], list[int]]:
    public = draw(st.sampled_from([[], [0], [2], [0, 1]]))
    steps = [("step", which) for which in draw(st.permutations([0, 1, 2]))]
    steps += [("step", which) for which in public if draw(st.booleans())]  # only public ones may step again
    makes = [
        (draw(st.sampled_from(["make", "detach"])), draw(st.integers(0, 2))) for _ in range(draw(st.integers(1, 4)))
    ]
    return draw(st.permutations(steps + makes)), public


@given(scripts())
@settings(max_examples=8)
def test_a_script_of_steps_moves_weights_as_plain_training_does(case: Any) -> None:
    check_script(*case)


BASIC = [("detach", 0), ("step", 0), ("detach", 1), ("step", 1), ("step", 2)]


@pytest.mark.parametrize("public", [[], [0]], ids=["all private", "first public"])
@pytest.mark.parametrize("engine", ["ghost", "vmap"])
def test_every_engine_finds_the_values_of_then(public: list[int], engine: str) -> None:
    check_script(BASIC, public, engine)


@pytest.mark.parametrize("public", [[], [0]], ids=["all private", "first public"])
def test_the_law_sees_values_made_anew(public: list[int]) -> None:
    """What training did before: the stepped parameters throughout each pass."""
    with caught(
        patched(
            (PutBackInTime, "at_start", lambda self, given: dict(given)),
            (PutBackInTime, "after", lambda self, steps: None),
        )
    ):
        check_script(BASIC, public)


class BasicGan(L.LightningModule):
    """Lightning's basic GAN: images are made once, the generator steps, and the discriminator gets them detached."""

    first = "generator"

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def noise(self, rows: int) -> Tensor:
        return torch.randn(rows, 3)

    def adversarial_loss(self, images: Tensor, real: float) -> Tensor:
        scores = self.discriminator(images)
        return nn.functional.binary_cross_entropy_with_logits(scores, torch.full_like(scores, real))

    def losses(self, images: Tensor, fakes: Tensor) -> dict[str, Any]:
        return {
            "generator": lambda: self.adversarial_loss(fakes, 1.0),
            "discriminator": lambda: (
                (self.adversarial_loss(images, 1.0) + self.adversarial_loss(fakes.detach(), 0.0)) / 2
            ),
        }

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers = dict(zip(("generator", "discriminator"), self.optimizers(), strict=True))
        self.fakes = self.generator(self.noise(len(batch[0])))
        losses = self.losses(batch[0], self.fakes)
        for name in sorted(losses, reverse=self.first == "generator"):
            optimizers[name].zero_grad()
            self.manual_backward(losses[name]())
            optimizers[name].step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.5) for part in (self.generator, self.discriminator)]


def basic_gan(first: str) -> BasicGan:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = BasicGan()
    module.first = first
    return module


CLIP, SIGMA, BATCH, SEED, STEPS = 0.05, 0.7, 6, 3, 3


def by_hand(first: str) -> Tensor:
    """Both private: one example at a time, images made once for each with the generator before any step."""
    module, records, key = basic_gan(first), data(4), RandomKey.from_seed(SEED)
    order = ("generator", "discriminator") if first == "generator" else ("discriminator", "generator")
    for step in range(STEPS):
        drawn = poisson_sample(key.generator(Stream.SAMPLING, step), ROWS, BATCH / ROWS).tolist()
        noises = []
        for seed in key.seeds(Stream.DROPOUT, step, np.array(drawn)):
            seed_globals(int(seed), None)
            noises.append(module.noise(1))
        fakes = [module.generator(noise) for noise in noises]
        for part, name in enumerate(order):
            parameters = list(getattr(module, name).parameters())
            total = torch.zeros(sum(p.numel() for p in parameters))
            for index, fake in zip(drawn, fakes, strict=True):
                loss = module.losses(records[index][0][None], fake)[name]()
                flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])
                total += flat * min(1.0, CLIP / float(flat.norm()))
            of_part = key if part == 0 else RandomKey(key.derive(Stream.NOISE, step, part), key.mode)
            noise = torch.from_numpy(of_part.generator(Stream.NOISE, step).standard_normal(len(total), dtype="float32"))
            total += math.sqrt(2) * SIGMA * CLIP * noise
            # out of place, so that what was made before keeps its graph
            with torch.no_grad():
                moved = nn.utils.parameters_to_vector(parameters) - 0.5 * total / BATCH
            for p, q in zip(parameters, moved.split([p.numel() for p in parameters]), strict=True):
                p.data = q.view_as(p).clone()
    return weights(module)


@pytest.mark.parametrize("first", ["generator", "discriminator"])
def test_a_basic_gan_with_two_private_optimizers_equals_the_loop_by_hand(first: str) -> None:
    module = basic_gan(first)
    private = DifferentialPrivacy(noise_multiplier=SIGMA, clip_norm=CLIP, seed=SEED, engine="loop")
    trainer(private, max_steps=2 * STEPS).fit(module, loader(data(4), BATCH))
    torch.testing.assert_close(weights(module), by_hand(first), rtol=1e-5, atol=1e-6)
    assert private.ledger.steps == STEPS


class DrawsOnce(L.LightningModule):
    """Two parts, each of which moves by the mean of the very numbers that were drawn before the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.parts = nn.ParameterList([torch.zeros(5), torch.zeros(5)])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        drawn = torch.randn(len(batch[0]), 5) + 0 * batch[0].sum()
        for optimizer, part in zip(self.optimizers(), self.parts, strict=True):
            optimizer.zero_grad()
            self.manual_backward((drawn * part).sum(1).mean() + 0 * torch.rand(len(drawn)).mean())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([part], lr=1.0) for part in self.parts]


def same_numbers(engine: Any) -> None:
    module = DrawsOnce()
    private = DifferentialPrivacy(noise_multiplier=0.0, clip_norm=math.inf, engine=engine, physical_batch_size=5)
    trainer(private, max_steps=4).fit(module, loader(data(), 8))
    assert float(module.parts[0].detach().abs().max()) > 0.01
    torch.testing.assert_close(module.parts[0].detach(), module.parts[1].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_an_example_has_the_same_random_numbers_in_every_pass(engine: str) -> None:
    same_numbers(engine)

    def with_other_numbers(plain: Any) -> Any:
        def one_pass(self: Any, batch: Any, run: Any) -> Any:
            other = torch.randint(2**62, batch.seeds.shape, generator=torch.Generator().manual_seed(next(count)))
            return plain(self, replace(batch, seeds=other), run)

        return one_pass

    count = itertools.count()
    planted = patched(*((kind, "one_pass", with_other_numbers(kind.one_pass)) for kind in (Drawing, Alone)))
    with planted, pytest.raises((AssertionError, EngineError)):  # refused before training
        same_numbers(engine)


def test_when_to_step_may_depend_on_the_number_of_steps() -> None:
    class Alternating(Scripted):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.script = [("make", 0), ("step", 0), ("step", 1)] if self.global_step % 3 == 0 else [("step", 2)]
            super().training_step(batch, batch_idx)

    found = []
    for callbacks in ([], [DifferentialPrivacy(noise_multiplier=0.0, clip_norm=math.inf, expected_batch_size=ROWS)]):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = Alternating([], [])
        trainer(*callbacks, max_steps=6).fit(module, loader(data(), ROWS))
        found.append(weights(module))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
