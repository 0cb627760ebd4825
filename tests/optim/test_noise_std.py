"""What an optimizer is told of the noise is what was added: measured, for every way to a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_dp.mechanism.release as release_module
import lightning_dp.record.course as course_module
import lightning_dp.step.manual.objective as manual_module
import lightning_dp.step.objective as objective_module
from lightning_dp import DifferentialPrivacy, ExponentialMovingAverage
from lightning_dp.mechanism.gaussian import GaussianNoise
from lightning_dp.optim import DPAdamW
from lightning_dp.optim.noise_std import take_noise_std, tell_noise_std
from lightning_dp.record.course import facts_of
from tests.conftest import Regressor, loader, regressor, trainer, weights
from tests.guarantees.mutations import caught, patched
from tests.training.manual_modules import Gan

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")

SIGMA, CLIP, BATCH = 1.7, 0.6, 16


class Listening(torch.optim.SGD):
    """SGD that asks for the noise, and keeps what it was told and the gradient."""

    def __init__(self, parameters: Any, lr: float = 0.0) -> None:
        super().__init__(parameters, lr=lr)
        self.told: list[float] = []
        self.gradients: list[Tensor] = []
        for group in self.param_groups:
            group["noise_std"] = 0.0

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        (group,) = self.param_groups
        self.told.append(take_noise_std(group))
        self.gradients.append(torch.cat([p.grad.double().flatten() for p in group["params"] if p.grad is not None]))
        return loss

    def agrees(self) -> bool:
        """Whether the gradients, which are all noise, are as large as was told: within six standard deviations."""
        variances = [float(g.square().mean()) for g in self.gradients]
        within = 6 * math.sqrt(2 / self.gradients[0].numel())
        return all(abs(v / told**2 - 1) < within for v, told in zip(variances, self.told, strict=True))


class Mute(Regressor):
    """Its gradient is zero, so what is released is the noise."""

    def __init__(self) -> None:
        super().__init__(hidden=3000)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0.0 * super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Listening(self.parameters())


class MuteGan(Gan):
    """Two optimizers, of gradients that are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.generator[0] = nn.Linear(3, 1500)
        self.generator[2] = nn.Linear(1500, 4)
        self.discriminator[0] = nn.Linear(4, 1500)
        self.discriminator[2] = nn.Linear(1500, 1)

    def adversarial_loss(self, images: Tensor, real: float) -> Tensor:
        return 0.0 * super().adversarial_loss(images, real)

    def configure_optimizers(self) -> Any:
        return [Listening(self.generator.parameters()), Listening(self.discriminator.parameters())]


def run(module: Any, steps: int = 3, **options: Any) -> list[Any]:
    given = {"noise_multiplier": SIGMA, "clip_norm": CLIP, "seed": 5, **options}
    fit = trainer(DifferentialPrivacy(**given), max_steps=steps)
    fit.fit(module, loader())
    return list(fit.optimizers)


def each_of(module: Callable[[], Any], times: float, **options: Any) -> None:
    for optimizer in run(module(), **options):
        assert optimizer.told
        assert optimizer.told == pytest.approx([SIGMA * CLIP / BATCH * times] * len(optimizer.told))
        assert optimizer.agrees()


class Growing(GaussianNoise):
    """Noise that is larger at every step, as that of a mechanism whose clip norm moves."""

    def std(self, step: int, state: Any) -> float:
        return self.noise_std * (1 + step)

    def add(self, parts: Any, coordinates: int, *, key: Any, step: int, state: Any) -> Any:
        return GaussianNoise(self.std(step, state)).add(parts, coordinates, key=key, step=step, state=state)


@pytest.mark.parametrize(
    ("module", "times", "options"),
    [
        (Mute, 1, {}),
        (Mute, 1, {"engine": "loop", "secure": True, "seed": None}),
        (Mute, 1, {"clipping": "automatic", "engine": "vmap"}),
        (Mute, 0.5, {"expected_batch_size": 2 * BATCH}),
        (MuteGan, math.sqrt(2), {"steps": 6}),  # two private optimizers: √2 as much each
    ],
)
def test_what_is_told_is_what_was_added(module: Any, times: float, options: dict[str, Any]) -> None:
    each_of(module, times, **options)


def test_it_is_that_of_the_step_where_it_changes_from_step_to_step() -> None:
    with patched((release_module, "noise_of", lambda mechanism, *_: Growing(mechanism.noise_std))):
        (optimizer,) = run(Mute())
    assert optimizer.told == pytest.approx([SIGMA * CLIP / BATCH * (1 + step) for step in range(3)])
    assert optimizer.agrees()


@pytest.mark.parametrize(
    "options", [{"clipping": "quantile"}, {"clipping": "slaclip"}, {"noise": "banded", "sampling": "cyclic_poisson"}]
)
def test_it_is_what_an_adapted_clip_norm_or_correlated_noise_makes_of_it(options: dict[str, Any]) -> None:
    (optimizer,) = run(Mute(), steps=5, **options)
    assert len({round(told, 9) for told in optimizer.told}) > 1
    assert optimizer.agrees()


def test_a_public_optimizer_and_one_without_privacy_are_told_nothing() -> None:
    public, private = run(MuteGan(), steps=6, public_optimizers=[0])
    assert set(public.told) == {0.0}
    assert private.told == pytest.approx([SIGMA * CLIP / BATCH] * 3)
    assert set(run(Mute(), noise_multiplier=0.0)[0].told) == {0.0}
    plain = trainer(max_steps=2)
    plain.fit(Mute(), loader())
    assert plain.optimizers[0].told == [0.0, 0.0]


def planted(times: float) -> Any:
    """Bug: another number than what was added."""

    def wrong(optimizer: Any, noise_std: float) -> None:
        tell_noise_std(optimizer, noise_std * times)

    return patched((objective_module, "tell_noise_std", wrong), (manual_module, "tell_noise_std", wrong))


@pytest.mark.parametrize("times", [BATCH, 1 / math.sqrt(2), 0.0], ids=["not divided", "without √parts", "not told"])
def test_a_number_that_is_wrong_is_noticed(times: float) -> None:
    with caught(planted(times)):
        each_of(MuteGan, math.sqrt(2), steps=4)


class Adaptive(Regressor):
    """The regressor with an optimizer that takes the noise off."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return DPAdamW(self.parameters(), lr=0.02)


def adaptive() -> Adaptive:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Adaptive()


class SavedAt(L.Callback):
    """A checkpoint after a step, as in the middle of a run."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_resumed_run_is_the_uninterrupted_one_with_an_average_too(tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"

    def private(*callbacks: L.Callback, resumed: Path | None = None) -> Tensor:
        module = adaptive()
        own = DifferentialPrivacy(noise_multiplier=1.0, seed=3)
        trainer(own, ExponentialMovingAverage(0.5), *callbacks, max_steps=6).fit(module, loader(), ckpt_path=resumed)
        return weights(module)

    whole = private(SavedAt(3, path))
    (saved,) = torch.load(path, weights_only=True)["optimizer_states"]
    assert [group["noise_std"] for group in saved["param_groups"]] == [0.0]  # used up: no later step is told it
    assert torch.equal(private(resumed=path), whole)


def test_the_optimizer_moves_nothing_that_the_mechanism_does() -> None:
    """ε, and the noise, are those of SGD: an optimizer is post-processing."""

    def spent(module: Any) -> Any:
        private = DifferentialPrivacy(noise_multiplier=1.0, seed=3)
        trainer(private, max_steps=3).fit(module, loader())
        assert private.ledger is not None
        return private.ledger.epsilon(), private.ledger.state_dict()

    assert spent(adaptive()) == spent(regressor())


def test_a_stock_adam_gets_one_line_of_advice(caplog: pytest.LogCaptureFixture) -> None:
    class Stock(Regressor):
        kind: Any = torch.optim.Adam

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer: torch.optim.Optimizer = self.kind(self.parameters())
            return optimizer

    def advice(kind: Any, **options: Any) -> list[str]:
        caplog.clear()
        module = Stock()
        module.kind = kind
        run(module, steps=1, **options)
        return [message for message in caplog.messages if "lightning_dp.optim.DPAdamW" in message]

    assert [text.split()[1] for text in advice(torch.optim.Adam)] == ["Adam"]
    assert [text.split()[1] for text in advice(torch.optim.AdamW)] == ["AdamW"]
    assert advice(torch.optim.Adam, noise_multiplier=0.0) == advice(DPAdamW) == advice(torch.optim.SGD) == []


def test_an_optimizer_of_ones_own_goes_on_with_the_same_noise_after_its_state_was_loaded() -> None:
    """``load_state_dict`` adds a default to it; were that taken for another optimizer, a known seed would give other noise."""

    def facts() -> list[str]:
        module = adaptive()
        fit = trainer(max_steps=1)
        fit.fit(module, loader())
        (optimizer,) = fit.optimizers
        before = facts_of(fit)
        optimizer.load_state_dict(optimizer.state_dict())
        assert "differentiable" in optimizer.defaults
        return [before, facts_of(fit)]

    assert len(set(facts())) == 1
    with patched((course_module, "_defaults", lambda optimizer: sorted(optimizer.defaults.items()))):
        assert len(set(facts())) == 2
