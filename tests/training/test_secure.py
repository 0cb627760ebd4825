"""``secure=True`` in a run: integers with discrete noise reach the optimizer, from keys that nobody keeps."""

from __future__ import annotations

import json
import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

import lightning_dp.loading.draws as draws_module
import lightning_dp.mechanism.discrete as discrete_module
from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy, ExponentialMovingAverage
from lightning_dp.accounting.slack import discretisation_divergence
from lightning_dp.mechanism import keystream
from lightning_dp.mechanism.grid import RESOLUTION
from lightning_dp.mechanism.keystream import Keystream, MissingSecureExtraError
from lightning_dp.mechanism.randomness import Stream
from lightning_dp.mechanism.sampling import exact_poisson_sample
from tests.conftest import Regressor, loader, regression_data, regressor, trainer, weights
from tests.loading import test_loader as loaders
from tests.mechanism.laws import FALSE_ALARM, poisson_sampling_p_values
from tests.mechanism.test_discrete_gaussian import large_noise_p_values
from tests.nearly import assert_nearly
from tests.ranks.ranks import Shift
from tests.training.manual_modules import manual_regressor

SIGMA, CLIP, BATCH = 1.5, 0.5, 16


class Released(L.Callback):
    """The integers behind every released gradient: float64 parameters keep them to the last unit."""

    def __init__(self) -> None:
        self.steps: list[npt.NDArray[np.int64]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        flat = torch.cat([p.grad.double().flatten() for p in pl_module.parameters() if p.grad is not None])
        units = flat.numpy() * BATCH / CLIP * RESOLUTION
        self.steps.append(np.rint(units).astype(np.int64))
        assert np.abs(units - self.steps[-1]).max() < 1e-3


class Mute(Regressor):
    """Its gradient is zero, so what is released is the noise."""

    def __init__(self) -> None:
        super().__init__(hidden=6000, lr=1.0)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return 0.0 * super().training_step(batch, batch_idx)


def secure_run(
    module: L.LightningModule, *callbacks: L.Callback, ckpt: Any = None, data: Any = None, **options: Any
) -> tuple[DifferentialPrivacy, list[npt.NDArray[np.int64]], L.Trainer]:
    given = {"noise_multiplier": SIGMA, "clip_norm": CLIP, "delta": 1e-3, **options.pop("private", {})}
    private, released = DifferentialPrivacy(secure=True, **given), Released()
    fit = trainer(private, released, *callbacks, precision="64-true", **options)
    fit.fit(module, loader(data), ckpt_path=ckpt)
    return private, released.steps, fit


def noise_of_a_run_has_the_law() -> None:
    _, steps, _ = secure_run(Mute(), max_steps=2)
    for noise in steps:
        p_values = large_noise_p_values(noise, Fraction(SIGMA) ** 2 * RESOLUTION**2)
        assert min(p_values.values()) > FALSE_ALARM, p_values
    assert not np.array_equal(*steps)


def test_the_noise_of_a_run_is_discrete_and_has_the_law() -> None:
    noise_of_a_run_has_the_law()


def test_what_the_noise_is_added_to_is_the_clipped_sum() -> None:
    """With the noise taken away, the released integers are the sum of the loop engine's clipped gradients."""
    with pytest.MonkeyPatch.context() as patch:
        zeros = lambda variance, count, stream: np.zeros(count, dtype=np.int64)  # noqa: E731 (a stand-in for the sampler)
        patch.setattr("lightning_dp.mechanism.discrete.discrete_gaussian", zeros)
        drawn: list[Any] = []
        original = draws_module.exact_poisson_sample
        patch.setattr(draws_module, "exact_poisson_sample", lambda *args: drawn.append(original(*args)) or drawn[-1])
        module = regressor().double()
        expected = torch.zeros(len(weights(module)), dtype=torch.float64)
        _, (first, *_), _ = secure_run(regressor(), max_steps=1)
    inputs, targets = (tensor.double() for tensor in regression_data().tensors)
    for index in drawn[0]:
        module.zero_grad()
        torch.nn.functional.mse_loss(
            module.net(inputs[index : index + 1]).squeeze(-1), targets[index : index + 1]
        ).backward()
        gradient = torch.cat([p.grad.flatten() for p in module.parameters()])
        expected += gradient * min(1.0, CLIP / float(gradient.norm()))
    torch.testing.assert_close(torch.from_numpy(first).double() * CLIP / RESOLUTION, expected, rtol=1e-4, atol=1e-4)


def test_two_runs_and_a_resumed_one_share_no_noise_and_no_draw(tmp_path: Path) -> None:
    L.seed_everything(3, verbose=False)
    _, one, fit = secure_run(Mute(), max_steps=2)
    fit.save_checkpoint(tmp_path / "at2.ckpt")
    L.seed_everything(3, verbose=False)
    _, other, _ = secure_run(Mute(), max_steps=2)
    resumed_by, resumed, _ = secure_run(Mute(), max_steps=4, ckpt=tmp_path / "at2.ckpt")
    again_by, again, _ = secure_run(Mute(), max_steps=4, ckpt=tmp_path / "at2.ckpt")
    noises = [*one, *other, *resumed, *again]
    correlations = np.corrcoef(np.array(noises, dtype=np.float64))[np.triu_indices(8, 1)]
    assert np.abs(correlations).max() < 6 / np.sqrt(len(noises[0]))
    assert resumed_by.ledger is not None
    assert resumed_by.ledger.steps == 4
    assert_nearly(resumed_by.statement().epsilon, again_by.statement().epsilon)


def test_no_key_is_in_a_checkpoint_or_a_callback(tmp_path: Path) -> None:
    keys: list[bytes] = []
    original = keystream.Keystream.__init__

    def remember(self: Any, key: bytes) -> None:
        keys.append(key)
        original(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keystream.Keystream, "__init__", remember)
        private, _, fit = secure_run(regressor(), max_steps=2)
    fit.save_checkpoint(tmp_path / "last.ckpt")
    written = (
        (tmp_path / "last.ckpt").read_bytes() + Path("privacy.json").read_bytes() + pickle.dumps(private.state_dict())
    )
    assert len(set(keys)) >= 4
    for key in keys:
        assert key not in written
        assert key.hex().encode() not in written


def test_the_statement_says_what_the_noise_is() -> None:
    private, _, _ = secure_run(regressor(), max_steps=3)
    written = json.loads(Path("privacy.json").read_text(encoding="utf-8"))
    assert written["noise"] == "discrete Gaussian noise (grid 4.66e-10, sensitivity 0.5 = 1073741824 units)"
    assert written["noise"] in str(private.statement())
    assert not any("not a discrete Gaussian" in caveat for caveat in written["caveats"])
    assert any("floating-point kernels" in caveat for caveat in written["caveats"])
    assert any("not accounted for" in caveat for caveat in written["caveats"])
    assert private.ledger is not None
    per_step = discretisation_divergence(SIGMA * RESOLUTION, len(weights(regressor())))
    assert private.ledger.slack(3).divergence == pytest.approx(3 * per_step, rel=1e-9, abs=0)
    plain = DifferentialPrivacy(noise_multiplier=SIGMA, clip_norm=CLIP, delta=1e-3)
    trainer(plain, max_steps=3).fit(regressor(), loader())
    assert plain.statement().epsilon < private.statement().epsilon < plain.statement().epsilon + 1e-3
    assert plain.statement().noise == "Gaussian noise in floating point"


def test_a_change_to_discrete_noise_on_resume_is_said(tmp_path: Path) -> None:
    plain = DifferentialPrivacy(noise_multiplier=SIGMA, clip_norm=CLIP, delta=1e-3)
    fit = trainer(plain, max_steps=2, precision="64-true")
    fit.fit(regressor(), loader())
    fit.save_checkpoint(tmp_path / "at2.ckpt")
    private, _, _ = secure_run(regressor(), max_steps=4, ckpt=tmp_path / "at2.ckpt")
    said = "changed during training from None to 1073741824 (None: noise in floating point)"
    assert any(said in caveat for caveat in private.statement().caveats)


def test_the_draws_are_exact_coins_that_the_ranks_share() -> None:
    plan, members = loaders.plan, np.zeros((4000, 60), dtype=bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders, "plan", lambda **fields: plan(**fields, resolution=RESOLUTION, coordinates=1))
        ranks = [loaders.poisson_loader(60, 9, rank=rank, world_size=2) for rank in range(2)]
    for step in range(len(members)):
        parts = [rank._draws.at(step)[0] for rank in ranks]
        assert not set(parts[0]) & set(parts[1])
        members[step, np.concatenate(parts)] = True
        assert members[step].sum() == ranks[0]._draws.at(step)[1]
    by_words = exact_poisson_sample(Keystream.of(loaders.KEY, Stream.SAMPLING, 7), 60, 9 / 60)
    assert np.array_equal(np.flatnonzero(members[7]), by_words)
    assert min(poisson_sampling_p_values(members, 9 / 60).values()) > FALSE_ALARM


def test_views_a_moving_average_a_target_and_a_bound_on_draws_go_with_it() -> None:
    average = ExponentialMovingAverage(decay=0.9)
    views = AugmentationMultiplicity(k=2, transform=Shift(), images=0)
    module = regressor(lr=0.01)
    before = weights(module).clone()
    wanted = {"noise_multiplier": None, "epsilon": 2.0, "max_batch_size": 50}
    private, steps, _ = secure_run(module, average, views, max_steps=3, private=wanted)
    assert len(steps) == 3
    assert 1.8 < private.statement().epsilon <= 2.0
    assert not torch.equal(before.double(), weights(module))


@pytest.mark.parametrize("clipping", ["per_layer", "automatic"])
def test_every_clipping_style_and_padding_go_with_it(clipping: str) -> None:
    """Padding counts in nothing: the noise alone is released when no example has a gradient."""
    wanted = {"clipping": clipping, "static_shapes": True, "physical_batch_size": 4}
    _, steps, _ = secure_run(Mute(), max_steps=1, private=wanted)
    assert min(large_noise_p_values(steps[0], Fraction(SIGMA) ** 2 * RESOLUTION**2).values()) > FALSE_ALARM


def test_manual_optimization_gets_discrete_noise_once_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    original = discrete_module.discrete_gaussian

    def counted(variance: Fraction, count: int, stream: Keystream) -> Any:
        drawn.append(count)
        return original(variance, count, stream)

    monkeypatch.setattr(discrete_module, "discrete_gaussian", counted)
    module = manual_regressor()
    private = DifferentialPrivacy(noise_multiplier=SIGMA, clip_norm=CLIP, delta=1e-3, secure=True)
    trainer(private, max_steps=3).fit(module, loader())
    assert private.ledger is not None
    assert drawn == [len(weights(module))] * private.ledger.steps
    assert private.ledger.steps == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"seed": 1}, r"seed=1 with secure=True: expected seed=None.*Leave out one"),
        ({"noise_multiplier": 0.0}, r"noise_multiplier=0 with secure=True: expected noise"),
        ({"engine": "ghost"}, r"engine='ghost' with secure=True: expected 'auto' or 'loop'"),
        ({"engine": "vmap"}, r"engine='vmap' with secure=True"),
    ],
)
def test_what_goes_against_secure_noise_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DifferentialPrivacy(**{"noise_multiplier": 1.0, "secure": True, **arguments})


def test_without_cryptography_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keystream, "find_spec", lambda name: None)
    with pytest.raises(MissingSecureExtraError, match=r"pip install 'lightning-dp\[secure\]'"):
        DifferentialPrivacy(noise_multiplier=1.0, secure=True)
    DifferentialPrivacy(noise_multiplier=1.0)
