"""``lightning_dp.verify``: what trains as it should passes, and every planted mistake is found, or refused before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lightning_dp.cli.verify as command
import lightning_dp.look.engine_check as engine_check_module
import lightning_dp.run as run_module
import lightning_dp.step.in_place as in_place_module
import lightning_dp.step.open_step as open_step_module
import lightning_dp.step.sample_release as sample_release_module
from lightning_dp import DifferentialPrivacy, EngineError, PreflightError, verify
from lightning_dp.audit.neighbour import choose
from lightning_dp.audit.noise_law import Noised, noise_fault
from lightning_dp.audit.rank_draws import rank_fault
from lightning_dp.audit.sketch import sketch
from lightning_dp.audit.verdict import Verification, VerificationError
from lightning_dp.batches.microbatch import BatchAxisError
from lightning_dp.cli.main import main
from lightning_dp.look.leaks.examples_apart import Company
from lightning_dp.look.leaks.losses import Reduction
from tests.audit.planted import EXAMPLES_OF_GOOD, ROWS, MaxNorm, Plain, Prototypes, Row
from tests.conftest import trainer
from tests.guarantees import mutations
from tests.guarantees import mutations_outside as outside
from tests.guarantees.mutations import patched


def verified(row: Row, **options: Any) -> Verification:
    private = DifferentialPrivacy(**{"noise_multiplier": 1.0, "delta": 1e-5, **row.options})
    fit = trainer(private, **row.trainer)
    return verify(fit, row.make(), row.loader(), **{"steps": row.steps, "examples": 12, **options})


@pytest.mark.parametrize("name", EXAMPLES_OF_GOOD)
def test_what_is_right_passes(name: str) -> None:
    result = verified(EXAMPLES_OF_GOOD[name], steps=2)
    assert result.ok, str(result)
    result.check()
    assert "verified: 2 steps on 12 examples" in str(result)
    assert "other steps and other examples" in str(result)


KEPT_APART = (
    "MixUp by random", "MixUp after a warm-up", "MixUp within a rare class", "minus the first row", "the batch's scale",
    "the batch's length", "broken records refilled", "padding", "padding and drawing", "global random numbers in the data set",
    "__getitems__ that centres", "Counter", "a global", "a class attribute",
    "an optimizer that reads the loss", "squares that underflow",
)  # fmt: skip
"""Where collate_fn, hooks and the data set are given one example at a time, state is put back after each, an optimizer
gets no loss and squares are scaled, these mix nobody, and there is nothing to find."""


@pytest.mark.filterwarnings("ignore:training_step changes")
@pytest.mark.parametrize("name", ROWS)
def test_a_planted_mistake_is_found_or_refused_before(name: str) -> None:
    """Which of the two may change: what the package refuses at once needs no replay."""
    try:
        result = verified(ROWS[name])
    except (PreflightError, EngineError, BatchAxisError):
        return
    if name in KEPT_APART and result.ok:
        return
    assert result.difference is not None
    with pytest.raises(VerificationError, match=r"violated: "):
        result.check()


# --- with the package's own defences taken away, so that verify alone can find it ---------------------------------------


def nothing(*_: Any, **__: Any) -> None:
    """In the place of a check."""


@contextmanager
def undefended() -> Iterator[None]:
    """Nothing is looked at before the first step, and no write is noticed."""
    with patched(
        (run_module, "check_examples_stay_apart", lambda *_, **__: Company(0, Reduction.UNKNOWN, "nobody looked")),
        (engine_check_module, "check_one_example", nothing),
        (engine_check_module, "check_nothing_written", nothing),
        (open_step_module, "check_nothing_written", nothing),
        (in_place_module, "written", lambda *_, **__: Warning("written")),
    ):
        yield


@pytest.mark.parametrize(
    ("row", "kind", "name"),
    [
        (Row(MaxNorm, options={"engine": "loop"}), "state", "embedding.weight"),
        (Row(Prototypes, options={"engine": "loop"}), "state", "prototypes"),
    ],
    ids=lambda one: one.make.__name__ if isinstance(one, Row) else one,
)
def test_verify_itself_finds_what_nobody_else_looks_at(row: Row, kind: str, name: str) -> None:
    with undefended():
        result = verified(row)
    assert result.difference is not None
    assert (result.difference.kind, name in result.difference.name) == (kind, True), str(result)
    assert "planted.py:" in result.difference.code


# --- the mechanism --------------------------------------------------------------------------------------------------------


@contextmanager
def released(wrong: Callable[..., Any]) -> Iterator[None]:
    """Another release; ``wrong`` gets the right one and its arguments."""
    right = sample_release_module.release
    with patched((sample_release_module, "release", lambda *given: wrong(right, *given))):
        yield


def noise_after_the_division() -> AbstractContextManager[None]:
    """σC is added to the mean, and the other way round."""

    def wrong(right: Any, sums: Any, mechanism: Any, key: Any, step: int, *rest: Any) -> Any:
        zeros = {name: torch.zeros_like(part) for name, part in sums.items()}
        noise = right(zeros, mechanism, key, step, *rest)
        return noise._replace(
            gradient={n: sums[n] / mechanism.divisor + part * mechanism.divisor for n, part in noise.gradient.items()}
        )

    return released(wrong)


def noise_divided_twice() -> AbstractContextManager[None]:
    """The noise is divided by B before it is added, and the sum again."""

    def wrong(right: Any, sums: Any, mechanism: Any, key: Any, step: int, *rest: Any) -> Any:
        zeros = {name: torch.zeros_like(part) for name, part in sums.items()}
        noise = right(zeros, mechanism, key, step, *rest)
        return noise._replace(gradient={n: (sums[n] + part) / mechanism.divisor for n, part in noise.gradient.items()})

    return released(wrong)


def one_steps_noise_again() -> AbstractContextManager[None]:
    """Every step has the noise of step 0."""
    return released(lambda right, sums, mechanism, key, step, *rest: right(sums, mechanism, key, 0, *rest))


MECHANISM: dict[str, tuple[mutations.Mutation, str]] = {
    "noise added to the mean": (noise_after_the_division, "noise"),
    "noise divided before it is added": (noise_divided_twice, "noise"),
    "one step's noise reused": (one_steps_noise_again, "noise"),
    "no noise": (mutations.no_noise, "noise"),
    "half the noise": (lambda: mutations.noise_scaled(0.5), "noise"),
    "noise of sigma alone": (mutations.noise_of_sigma_alone, "noise"),
    "realised batch": (mutations.divisor_is_the_realised_batch, "noise"),
    "divisor from the data": (mutations.divisor_from_the_private_dataset_size, "noise"),
    "gradient not used": (mutations.private_gradient_made_but_not_used, "state"),
    "no clipping": (mutations.no_clipping, "total engine"),
    "clipped per batch": (mutations.clipped_per_batch, "engine total"),
    "a parameter dropped": (lambda: mutations.parameter_dropped("2.weight"), "engine total"),
    "a draw on every rank": (outside.own_draw_on_every_rank, "draw steps"),
    "every rank adds noise": (mutations.every_rank_adds_noise, "noise"),
    "two ranks add one share": (mutations.two_ranks_add_one_share, "noise"),
    "no rank adds noise": (mutations.no_rank_adds_noise, "noise"),
    "one share without noise": (mutations.one_share_without_noise, "noise"),
    "one stream for every share": (mutations.one_stream_for_every_share, "noise"),
    "ranks are averaged": (mutations.ranks_are_averaged, "noise"),
    "an adapter frozen by a hook": (lambda: mutations.frozen_by_a_hook("2.weight"), "noise"),
}


@pytest.mark.parametrize("name", MECHANISM)
def test_a_bug_in_the_mechanism_is_found(name: str) -> None:
    bug, kinds = MECHANISM[name]
    row = Row(Plain, options={"engine": "vmap", "clip_norm": 0.2})
    with bug(), patched((engine_check_module, "check_agreement", nothing)):
        try:
            result = verified(row, steps=2)
        except (PreflightError, EngineError):  # the engine's check before the first step compares them too
            assert kinds.split()[-1] in ("engine", "total")
            return
    assert result.difference is not None, str(result)
    assert result.difference.kind in kinds


def test_the_parts_of_ranks_are_right_as_they_are_and_their_own_draws_are_not() -> None:
    assert rank_fault(0) is None
    with outside.own_draw_on_every_rank():
        assert "expected each drawn example on exactly one rank" in str(rank_fault(0))


def test_noise_of_the_plan_is_no_fault_and_twice_the_same_is() -> None:
    generator = torch.Generator().manual_seed(0)
    made = [
        Noised(step, {"w": 3.0 * torch.randn(50, generator=generator)}, {"w": torch.ones(50)}, 3.0) for step in range(6)
    ]
    assert noise_fault(made) is None
    again = noise_fault([*made, replace(made[2], step=6)])
    assert again is not None
    assert again.step == 6
    wide = noise_fault([replace(made[0], std=1.0)])
    assert wide is not None
    assert noise_fault([replace(made[0], noise={"w": torch.full((50,), float("nan"))})]) is not None


def test_a_sketch_is_linear_and_about_as_long() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 40_000, generator=generator, dtype=torch.float64)
    assert torch.allclose(sketch(one) - sketch(other), sketch(one - other))
    assert 0.8 < float(sketch(one - other).norm() / (one - other).norm()) < 1.2


def test_the_records_chosen_are_the_odd_ones_too() -> None:
    data = [(torch.zeros(30 if index == 41 else 3), int(index in (5, 17))) for index in range(200)]
    found = choose(data, 8, None)
    assert {0, 5, 17, 41, 199} <= set(found.indices)
    assert [found.indices[one.absent] for one in found.neighbours if one.absent is not None] == [0, 41, 17]
    asked = choose(data, 8, 100)
    assert [asked.indices[one.absent] for one in asked.neighbours if one.absent is not None] == [100]


def test_nothing_of_the_user_is_changed() -> None:
    fit, module = trainer(DifferentialPrivacy(noise_multiplier=1.0)), Plain()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch_state, array = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert verify(fit, module, Row(Plain).loader(), steps=2, examples=4).ok
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert fit.global_step == 0
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(array, np.random.get_state()[1])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"steps": 1}, "steps=1"),
        ({"examples": 3}, "examples=3"),
        ({"remove": 12}, "remove=12"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_arguments_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        verified(Row(Plain), **options)
    with pytest.raises(ValueError, match="no DifferentialPrivacy among the Trainer's callbacks"):
        verify(trainer(), Plain(), Row(Plain).loader())


RECIPE = str(Path(__file__).parents[2] / "recipes" / "digits" / "cnn_eps8.yaml")


def test_the_command_ends_with_1_if_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "verify", lambda *_, **__: verified(ROWS["prototypes under no_grad"]))
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--config", RECIPE])
    assert ended.value.code == 1
    assert any(line.startswith(("violated: step", "refused: ")) for line in capsys.readouterr().out.splitlines())


def test_the_command_says_what_it_expected(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--config", RECIPE, "--steps", "1"])
    assert ended.value.code == 2
    assert "steps=1: expected" in capsys.readouterr().err
