"""Bugs of other libraries, planted in the real code one at a time, to show that a check notices each of them.

Every function is a context manager that patches the package while it is open. Nothing here is ever right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_dp.engines.vmap as vmap_module
import lightning_dp.mechanism.gaussian as gaussian_module
import lightning_dp.mechanism.noise as noise_module
import lightning_dp.run as run_module
import lightning_dp.step.open_step as open_step_module
import lightning_dp.step.sample_release as sample_release_module
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.mechanism.release import Released
from lightning_dp.mechanism.trainable import trainable
from lightning_dp.plan.clipping import as_clipping
from lightning_dp.plan.mechanism import Mechanism
from lightning_dp.step.private_step import PrivateStep

Mutation = Callable[[], AbstractContextManager[None]]


@contextmanager
def caught(mutation: AbstractContextManager[None]) -> Iterator[None]:
    """Assert that the check inside fails, by a failed assertion and not by an accident, while ``mutation`` is planted."""
    with mutation, pytest.raises((AssertionError, pytest.fail.Exception)):
        yield


@contextmanager
def patched(*patches: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes, given as (owner, name, value), while open."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, value in patches:
            patch.setattr(owner, name, value)
        yield


# --- the step ---------------------------------------------------------------------------------------------------------


@contextmanager
def private_gradient_made_but_not_used() -> Iterator[None]:
    """O#313: noise is drawn, ε is counted, and the optimizer gets the plain sum."""
    original = PrivateStep.backward

    def backward(self: PrivateStep, closure_loss: Tensor) -> Tensor:
        unreleased: Any = self.objective
        total, planned = unreleased._unreleased[0][1], self.run.planned
        loss = original(self, closure_loss)
        for name, parameter in trainable(planned.module).items():
            parameter.grad = total.gradient[name] / planned.ledger.plan.expected_batch_size
        return loss

    with patched((PrivateStep, "backward", backward)):
        yield


@contextmanager
def divided_by(size: Callable[[int, Mechanism, Any], float]) -> Iterator[None]:
    """The divisor is some other ``size(examples in the step, mechanism, loader)``."""
    accumulate, release = open_step_module.accumulate, sample_release_module.release
    seen: list[int] = []
    datasets: list[Any] = []
    original_loader = run_module.PoissonLoader

    def watched(*args: Any, **options: Any) -> Any:
        total = accumulate(*args, **options)
        seen.append(total.examples)
        return total

    def loader(given: Any, *args: Any, **options: Any) -> Any:
        datasets.append(given.dataset)
        return original_loader(given, *args, **options)

    def released(gradient: Any, mechanism: Mechanism, *args: Any) -> Released:
        right = release(gradient, mechanism, *args)
        wrong = mechanism.divisor / max(1.0, size(seen[-1], mechanism, datasets[-1]))
        return right._replace(gradient={name: tensor * wrong for name, tensor in right.gradient.items()})

    with patched(
        (open_step_module, "accumulate", watched),
        (sample_release_module, "release", released),
        (run_module, "PoissonLoader", loader),
    ):
        yield


def divisor_is_the_realised_batch() -> AbstractContextManager[None]:
    """The mean over the examples drawn: another example in the draw rescales everybody's gradient."""
    return divided_by(lambda examples, mechanism, dataset: examples)


def divisor_from_the_private_dataset_size() -> AbstractContextManager[None]:
    """O#571, O#819: int(N·q) with the actual N."""
    return divided_by(lambda examples, mechanism, dataset: int(len(dataset) * mechanism.sampling.probability))


@contextmanager
def empty_steps_are_skipped(*, charged: bool) -> Iterator[None]:
    """O#161, O#522: a step without examples releases nothing, whether or not it is counted."""
    original = PrivateStep.backward

    def backward(self: PrivateStep, closure_loss: Tensor) -> Tensor:
        unreleased: Any = self.objective
        if unreleased._unreleased[0][1].examples:
            return original(self, closure_loss)
        for parameter in trainable(self.run.planned.module).values():
            parameter.grad = torch.zeros_like(parameter)
        unreleased._unreleased.clear()
        if charged:
            self.run.planned.ledger.charge()
        return closure_loss

    with patched((PrivateStep, "backward", backward)):
        yield


# --- noise ------------------------------------------------------------------------------------------------------------


@contextmanager
def noise_scaled(factor: float) -> Iterator[None]:
    """The noise has ``factor`` times the standard deviation of the plan."""
    original = gaussian_module.add_gaussian_noise

    def add(parts: Any, coordinates: int, *, noise_std: float, **options: Any) -> None:
        original(parts, coordinates, noise_std=factor * noise_std, **options)

    with patched((gaussian_module, "add_gaussian_noise", add)):
        yield


def no_noise() -> AbstractContextManager[None]:
    """The noise is left out."""
    return noise_scaled(0.0)


@contextmanager
def noise_of_sigma_alone() -> Iterator[None]:
    """The noise has standard deviation σ whatever C: right only at C = 1."""
    with patched((Mechanism, "noise_std", property(lambda step: step.noise.noise_multiplier))):
        yield


@contextmanager
def _ranks_told(**wrong: int) -> Iterator[None]:
    """Each rank believes something wrong about which one it is."""
    original = sample_release_module.collective_of
    with patched((sample_release_module, "collective_of", lambda *args: replace(original(*args), **wrong))):
        yield


def every_rank_adds_noise() -> AbstractContextManager[None]:
    """Each rank adds the whole noise: more privacy than stated, and worse models."""
    return _ranks_told(rank=0, size=1)


def two_ranks_add_one_share() -> AbstractContextManager[None]:
    """Every rank takes itself for rank 0: that share gets its noise twice, and the others none."""
    return _ranks_told(rank=0)


@contextmanager
def shares_given(wrong: Callable[[int, int, int], range]) -> Iterator[None]:
    """Other blocks of coordinates than the right ones fall to (rank, of world_size, blocks in all)."""
    with patched((noise_module, "share_of", wrong)):
        yield


def no_rank_adds_noise() -> AbstractContextManager[None]:
    """Each rank leaves the noise to the others."""
    return shares_given(lambda rank, world_size, blocks: range(0))


def one_share_without_noise() -> AbstractContextManager[None]:
    """The last rank's share gets no noise, as when the shares are cut for more ranks than there are."""
    right = noise_module.share_of
    return shares_given(
        lambda rank, world_size, blocks: right(rank, world_size, blocks) if rank < world_size - 1 else range(0)
    )


@contextmanager
def one_stream_for_every_share() -> Iterator[None]:
    """The stream's counter leaves the block out, so the shares hold the same noise: their difference holds none."""
    original = gaussian_module.standard_normal
    with patched((gaussian_module, "standard_normal", lambda like, key, step, block: original(like, key, step, 0))):
        yield


@contextmanager
def ranks_are_averaged() -> Iterator[None]:
    """Lightning's default reduction, a mean, where the sum is meant."""
    original = sample_release_module.collective_of

    def averaging(*args: Any) -> Any:
        right = original(*args)
        return replace(right, total=lambda flat: right.total(flat) / right.size)

    with patched((sample_release_module, "collective_of", averaging)):
        yield


@contextmanager
def noise_stream_restarts() -> Iterator[None]:
    """O#117: a resumed run draws the noise of steps 0, 1, 2 again."""
    original = sample_release_module.release
    first: dict[int, tuple[int, Any]] = {}

    def release(sums: Any, mechanism: Any, key: Any, step: int, *rest: Any) -> Any:
        start, _ = first.setdefault(id(key), (step, key))  # each run has a key object of its own
        return original(sums, mechanism, key, step - start, *rest)

    with patched((sample_release_module, "release", release)):
        yield


@contextmanager
def key_from_the_global_generator() -> Iterator[None]:
    """The secret comes from ``torch.rand``, which ``seed_everything`` fixes."""

    def fresh() -> RandomKey:
        return RandomKey(bytes(torch.randint(256, (32,)).tolist()), "secret")

    with patched((RandomKey, "fresh", staticmethod(fresh))):
        yield


@contextmanager
def same_secret_in_every_run() -> Iterator[None]:
    """A constant where the operating system's entropy should be."""
    with patched((RandomKey, "fresh", staticmethod(lambda: RandomKey(b"\0" * 32, "secret")))):
        yield


# --- clipping and gradients -------------------------------------------------------------------------------------------

Gradients = Mapping[str, Tensor]


@contextmanager
def _clipping(wrong: Callable[[Callable[..., Any], dict[str, Tensor], float], Any]) -> Iterator[None]:
    original = vmap_module.clip_and_sum

    def clip_and_sum(gradients: Gradients, clipping: Any, *_: Any) -> Any:
        return wrong(original, dict(gradients), as_clipping(clipping).clip_norm)

    with patched((vmap_module, "clip_and_sum", clip_and_sum)):
        yield


def no_clipping() -> AbstractContextManager[None]:
    """O#664: the clip norm is ignored."""
    return _clipping(lambda right, gradients, clip: right(gradients, math.inf))


def clipped_per_batch() -> AbstractContextManager[None]:
    """The batch's summed gradient is clipped, as for stability, not each example's."""

    def wrong(right: Callable[..., Any], gradients: dict[str, Tensor], clip: float) -> Any:
        norms = right(gradients, clip)[1]
        return right({name: g.sum(0, keepdim=True) for name, g in gradients.items()}, clip)[0], norms

    return _clipping(wrong)


def parameter_dropped(part: str) -> AbstractContextManager[None]:
    """F: parameters of a kind the library does not know get no gradient, and a line is printed."""
    return _clipping(
        lambda right, gradients, clip: right(
            {name: torch.zeros_like(g) if part in name else g for name, g in gradients.items()}, clip
        )
    )


def norm_without_cross_terms(part: str, calls: int) -> AbstractContextManager[None]:
    """F: a layer that is applied several times counts in the norm as if it were applied once."""

    def wrong(right: Callable[..., Any], gradients: dict[str, Tensor], clip: float) -> Any:
        norms = right({n: g / calls if part in n else g for n, g in gradients.items()}, clip)[1]
        factors = (clip / norms).clamp(max=1.0)
        return {n: torch.einsum("i,i...->...", factors.to(g.dtype), g) for n, g in gradients.items()}, norms

    return _clipping(wrong)


def broken_examples_poison_the_sum() -> AbstractContextManager[None]:
    """min(1, C/‖g‖)·g without a thought for NaN."""

    def wrong(right: Callable[..., Any], gradients: dict[str, Tensor], clip: float) -> Any:
        norms = right(gradients, clip)[1]
        factors = (clip / norms).clamp(max=1.0)
        return {n: torch.einsum("i,i...->...", factors, g) for n, g in gradients.items()}, norms

    return _clipping(wrong)


@contextmanager
def frozen_by_a_hook(part: str) -> Iterator[None]:
    """O#820: the library's hooks miss an adapter's parameters; they get zero gradients and ε grows."""
    original = sample_release_module.release

    def release(*args: Any) -> Any:
        released = original(*args)
        held = {name: torch.zeros_like(g) if part in name else g for name, g in released.gradient.items()}
        return released._replace(gradient=held)

    with patched((sample_release_module, "release", release)):
        yield
