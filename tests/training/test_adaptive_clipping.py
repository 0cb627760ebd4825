"""A run whose clip norm follows the gradients: over a resume, in children, by hand, to loggers, verified and audited."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import lightning_dp.mechanism.adaptive as adaptive_module
import lightning_dp.mechanism.release as release_module
import lightning_dp.step.open_step as open_step_module
from lightning_dp import DifferentialPrivacy, PreflightError, verify
from lightning_dp.audit import audit
from lightning_dp.engines.rounded import RoundedEngine
from lightning_dp.mechanism.adaptive import INDICATOR, beside
from lightning_dp.mechanism.grid import RESOLUTION
from lightning_dp.mechanism.state import MechanismState
from lightning_dp.plan.clipping import ClippingStyle
from lightning_dp.record.checkpoint import read_with_digest, with_digest
from tests.audit.planted import Plain, Row
from tests.conftest import loader, regressor, trainer, weights
from tests.guarantees.mutations import patched
from tests.harness import Setting, by_hand
from tests.new_process import in_a_new_process
from tests.training.manual_modules import Gan, ManualRegressor

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
]
STYLES: list[ClippingStyle] = ["quantile", "slaclip"]


def private(style: ClippingStyle, **options: Any) -> DifferentialPrivacy:
    given = {"noise_multiplier": 0.7, "clip_norm": 0.3, "seed": 3, "engine": "vmap", "clipping": style}
    return DifferentialPrivacy(**{**given, **options})


def carried(callback: DifferentialPrivacy) -> Any:
    return callback.state_dict()["mechanism"]["clipping"]


class Told(L.Callback):
    """What is said after each step of the noise in its gradient."""

    def __init__(self, callback: DifferentialPrivacy) -> None:
        self.of, self.seen = callback, list[tuple[float, float, float]]()

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        released, tally = self.of.released, trainer.strategy.private_fit.tally
        assert released is not None
        self.seen.append((released.clipping.clip_norm, released.noise_std / released.divisor, tally.noise_std))


@pytest.mark.parametrize("style", STYLES)
def test_a_resumed_run_is_the_uninterrupted_one(style: ClippingStyle, tmp_path: Path) -> None:
    whole = regressor(lr=0.5)
    uninterrupted = private(style)
    trainer(uninterrupted, max_steps=6).fit(whole, loader(batch_size=16))
    torch.testing.assert_close(
        weights(whole), by_hand(Setting(style, batch=16, steps=6, examples=64)), rtol=1e-5, atol=1e-6
    )
    half = trainer(private(style), max_steps=3)
    half.fit(regressor(lr=0.5), loader(batch_size=16))
    half.save_checkpoint(tmp_path / "half.ckpt")
    module, resumed = regressor(lr=0.5), private(style)
    trainer(resumed, max_steps=6).fit(module, loader(batch_size=16), ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(weights(module), weights(whole))
    assert carried(resumed) == carried(uninterrupted)
    forgetful = regressor(lr=0.5)
    with patched((open_step_module, "in_force", lambda mechanism, state: mechanism),
                 (release_module, "in_force", lambda mechanism, state: mechanism)):  # fmt: skip
        trainer(private(style), max_steps=6).fit(forgetful, loader(batch_size=16), ckpt_path=tmp_path / "half.ckpt")
    assert float((weights(forgetful) - weights(whole)).abs().max()) > 1e-4


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1.0])
def test_what_is_no_clip_norm_ends_a_resume_before_its_first_step(wrong: float, tmp_path: Path) -> None:
    half = trainer(private("quantile"), max_steps=2)
    half.fit(regressor(), loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    checkpoint = torch.load(tmp_path / "half.ckpt", weights_only=True)
    spent = read_with_digest(checkpoint["callbacks"]["DifferentialPrivacy"])
    edited = MechanismState({"clipping": {"style": "quantile", "clip_norm": wrong, "released": [0.0]}})
    checkpoint["callbacks"]["DifferentialPrivacy"] = with_digest(replace(spent, carried=edited))
    torch.save(checkpoint, tmp_path / "edited.ckpt")
    with pytest.raises(ValueError, match=r"clip.norm.*expected a (finite )?number"):
        trainer(private("quantile"), max_steps=4).fit(regressor(), loader(), ckpt_path=tmp_path / "edited.ckpt")


def test_another_style_on_resume_begins_with_the_clip_norm_given_and_is_said(tmp_path: Path) -> None:
    half = trainer(private("quantile"), max_steps=2)
    half.fit(regressor(), loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    callback = private("slaclip", clip_norm=2.0)
    told = Told(callback)
    trainer(callback, told, max_steps=3).fit(regressor(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert told.seen[0][0] == 2.0
    assert any("the clipping style changed" in caveat for caveat in callback.statement().caveats)


@pytest.mark.parametrize("style", STYLES)
def test_every_step_says_the_clip_norm_and_the_noise_that_its_gradient_had(style: ClippingStyle) -> None:
    callback = private(style)
    told, logged = Told(callback), list[float]()

    class Logged(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            logged.append(float(trainer.callback_metrics["dp/clip_norm"]))

    trainer(callback, told, Logged(), max_steps=4, log_every_n_steps=1).fit(regressor(), loader(batch_size=16))
    stretch = math.sqrt(1.01) if style == "quantile" else 1.0
    assert len({clip_norm for clip_norm, _, _ in told.seen}) == 4
    assert told.seen[0][0] == 0.3
    for clip_norm, one, other in told.seen:
        assert one == other == pytest.approx(0.7 * clip_norm * stretch / 16, rel=1e-12)
    assert logged == pytest.approx([clip_norm for clip_norm, _, _ in told.seen], rel=1e-6)
    assert carried(callback)["clip_norm"] not in [clip_norm for clip_norm, _, _ in told.seen]  # that of the next step


def test_a_fixed_clip_norm_is_not_logged() -> None:
    fit = trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=1)
    fit.fit(regressor(), loader())
    assert "dp/clip_norm" not in fit.callback_metrics


@pytest.mark.parametrize("style", STYLES)
@in_a_new_process
def test_a_forked_child_brings_the_clip_norm_home(style: ClippingStyle) -> None:
    here, forked = private(style), private(style)
    trainer(here, max_steps=3).fit(regressor(), loader())
    trainer(forked, max_steps=3, strategy="ddp_fork", devices=1).fit(regressor(), loader())
    assert carried(forked) == carried(here)


def test_one_private_optimizer_by_hand_adapts_it_too_and_two_are_refused() -> None:
    by_itself, by_hand_ = regressor(lr=0.5), ManualRegressor(lr=0.5)
    by_hand_.net = regressor().net
    for module in (by_itself, by_hand_):
        callback = private("quantile")
        trainer(callback, max_steps=3).fit(module, loader(batch_size=16))
    torch.testing.assert_close(weights(by_hand_), weights(by_itself), rtol=1e-5, atol=1e-6)
    data = torch.utils.data.TensorDataset(torch.randn(16, 4), torch.zeros(16))
    with pytest.raises(PreflightError, match=r"clipping='slaclip' with 2 private optimizers: expected one"):
        trainer(private("slaclip"), max_steps=2).fit(Gan(), loader(data, 4))


@pytest.mark.parametrize("style", STYLES)
def test_on_the_grid_an_example_and_its_coordinates_stay_within_the_resolution(
    style: ClippingStyle, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Tensor]] = []
    original = RoundedEngine.clipped_sum

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        one = original(self, *args, **options)
        found.append(one.gradient)
        return one

    monkeypatch.setattr(RoundedEngine, "clipped_sum", watched)
    callback = private(style, seed=None, secure=True, engine="auto", delta=1e-3, physical_batch_size=1)
    module = regressor()
    trainer(callback, max_steps=2).fit(module, loader())
    plan = callback.plan
    assert plan is not None
    assert plan.coordinates == len(weights(module)) + (1 if style == "quantile" else 10)
    assert found
    assert all(sums[INDICATOR].dtype == torch.int64 for sums in found)
    assert all(sum(int(part.square().sum()) for part in sums.values()) <= RESOLUTION**2 for sums in found)
    assert carried(callback)["clip_norm"] != 0.3


def verified(style: ClippingStyle, **options: Any) -> Any:
    callback = private(style, seed=None, clip_norm=0.5, noise_multiplier=1.0, **options)
    return verify(trainer(callback), Plain(), Row(Plain).loader(), steps=2, examples=6)


@pytest.mark.parametrize(
    ("style", "options"), [("quantile", {}), ("slaclip", {"secure": True, "engine": "auto", "delta": 1e-3})]
)
def test_verify_finds_nothing_wrong(style: ClippingStyle, options: dict[str, Any]) -> None:
    result = verified(style, **options)
    assert result.ok, str(result)


PLANTED: dict[str, tuple[Any, str]] = {
    "coordinates twice as long": ((adaptive_module, "beside", lambda norms, rule: 8 * beside(norms, rule)), "clipping"),
    "noise of the clip norm at first": ((release_module, "in_force", lambda mechanism, state: mechanism), "noise"),
    "clipped to the clip norm at first": ((open_step_module.OpenStep, "mechanism", property(
        lambda step: step.run.planned.ledger.plan.mechanism)), "clipping noise total"),
    "a mean over the examples drawn": ((adaptive_module, "beside", lambda norms, rule: beside(norms, rule) / len(norms)),
                                      "contribution engine"),
}  # fmt: skip


@pytest.mark.parametrize("bug", PLANTED)
def test_verify_finds_what_is_wrong_with_what_adapts(bug: str) -> None:
    """Of a norm bound, of the noise, and of a coordinate that would tell how many were drawn."""
    patch, kinds = PLANTED[bug]
    with patched(patch):
        try:
            result = verified("quantile", clip_learning_rate=3.0)
        except PreflightError:  # the engine's own comparison is first
            assert bug == "coordinates twice as long"
            return
    assert result.difference is not None
    assert result.difference.kind in kinds, str(result)


@pytest.mark.parametrize("style", STYLES)
def test_an_audit_stays_below_the_claim(style: ClippingStyle) -> None:
    callback = DifferentialPrivacy(epsilon=4.0, delta=1e-5, seed=0, engine="vmap", clipping=style)
    result = audit(
        trainer(callback, max_steps=4), regressor(lr=0.1), loader(batch_size=32), gradient_canaries=1000, input_canaries=20,
        seed=0,
    )  # fmt: skip
    assert result.verdict == "consistent"
    assert 0.5 < result.epsilon_lower < result.epsilon_claimed <= 4.0
