"""Correlated noise has the covariance of its strategy matrix, whoever draws it, and is drawn again rather than kept."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.linalg import toeplitz

from lightning_dp.mechanism import correlated
from lightning_dp.mechanism.correlated import STATE, CorrelatedNoise
from lightning_dp.mechanism.noise import BLOCK, own_share
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.mechanism.state import NOTHING, MechanismState
from lightning_dp.plan.correlation import Correlation
from tests.guarantees.mutations import caught, patched
from tests.mechanism.laws import FALSE_ALARM, noise_p_values

KEY, STEPS, STD = RandomKey.from_seed(0), 6, 1.7
MATRICES = {
    "banded": Correlation.found("banded", steps=STEPS, momentum=0.9, groups=3, bands=3),
    "one band": Correlation("banded", STEPS, 0.0, (2.0,)),
    "lambda": Correlation("lambda", STEPS, 0.9, (1.0, -0.8)),
    "bisr": Correlation.found("bisr", steps=STEPS, momentum=0.5, groups=1, bands=4),
}
HALF = Correlation("lambda", 2, 0.0, (1.0, -0.5))
NOISE = {name: CorrelatedNoise(STD, matrix) for name, matrix in MATRICES.items()}


def strategy(noise: CorrelatedNoise) -> npt.NDArray[np.float64]:
    """C by matrices, with its largest column of length one."""
    column = np.zeros(STEPS)
    column[: noise.correlation.bands] = noise.correlation.matrix
    given = np.asarray(toeplitz(column, np.zeros(STEPS)))
    found = np.linalg.inv(given) if noise.correlation.style != "banded" else given
    return np.asarray(found / np.linalg.norm(found, axis=0).max())


def rows(
    noise: CorrelatedNoise, coordinates: int, ranks: int = 1, forget: Any = lambda state: state, first: int = 0
) -> npt.NDArray[np.float64]:
    """The noise of all steps, ``(T, P)``, drawn by ranks that each have a state of their own."""
    states, found = [NOTHING] * ranks, []
    for step in range(first, first + STEPS):
        total = torch.zeros(coordinates)
        for rank in range(ranks):
            own = own_share([(0, total)], coordinates, rank, ranks, noise.block(total.device))
            states[rank] = forget(noise.add(own, coordinates, key=KEY, step=step, state=states[rank]))
        found.append(total.double().numpy())
    return np.array(found)


@pytest.mark.parametrize("name", NOISE)
def test_the_covariance_over_the_steps_is_that_of_the_strategy_to_one_percent(name: str) -> None:
    noise, coordinates = NOISE[name], 400_000
    x = rows(noise, coordinates)
    inverse = np.linalg.inv(strategy(noise))
    right = STD**2 * inverse @ inverse.T
    scale = np.sqrt(np.outer(np.diag(right), np.diag(right)))
    assert [noise.std(step, NOTHING) for step in range(STEPS)] == pytest.approx(np.sqrt(np.diag(right)))
    assert np.abs(x @ x.T / coordinates - right).max() < 0.01 * scale.max()
    assert (np.abs(x @ x.T / coordinates - right) < 0.01 * scale).all()


@pytest.mark.parametrize("name", NOISE)
def test_what_it_is_made_of_is_independent_noise_of_the_right_size(name: str) -> None:
    """C times the rows is Z: standard normal as a whole, block by block, within a step and between steps."""
    z = strategy(NOISE[name]) @ rows(NOISE[name], 2 * BLOCK) / STD
    p_values = noise_p_values(z.reshape(-1))
    assert min(p_values.values()) > FALSE_ALARM, p_values


def test_planted_noise_that_is_drawn_anew_or_added_up_is_caught() -> None:
    original = correlated.standard_normal
    for wrong in (
        lambda like, key, step, block: original(like, key, 0, block),  # one draw for all steps
        lambda like, key, step, block: original(like, key, step, 0),  # one for all blocks
    ):
        with caught(patched((correlated, "standard_normal", wrong))):
            test_what_it_is_made_of_is_independent_noise_of_the_right_size("banded")
    stuck = ((correlated.Past, "row_is_over", lambda self: None), (correlated.Past, "fits", lambda *_: True))
    with caught(patched(*stuck)):  # every row is the first
        test_the_covariance_over_the_steps_is_that_of_the_strategy_to_one_percent("lambda")


@pytest.mark.parametrize("name", NOISE)
def test_any_number_of_ranks_draw_the_same_and_so_does_one_that_has_forgotten_all(name: str) -> None:
    whole = rows(NOISE[name], 2 * BLOCK + 5)
    for ranks in (2, 3):
        assert np.array_equal(rows(NOISE[name], 2 * BLOCK + 5, ranks), whole)
    forgetful = rows(NOISE[name], 2 * BLOCK + 5, forget=lambda state: MechanismState.read(state.state_dict()))
    assert np.array_equal(forgetful, whole)


def test_rows_are_counted_from_the_step_with_which_it_began() -> None:
    noise = CorrelatedNoise(0.8**0.5, HALF, begun=4)
    later = rows(noise, 3, first=4)
    z = [correlated.standard_normal(torch.empty(3), KEY, step, 0).double().numpy() for step in (4, 5)]
    assert later[:2] == pytest.approx(np.array([z[0], z[1] - 0.5 * z[0]]))


def test_parts_get_their_own_coordinates() -> None:
    """As the shards of a rank that gathers layer by layer: parts of the flat sum, with holes."""
    noise, whole = NOISE["banded"], torch.zeros(50)
    noise.add([(0, whole)], 50, key=KEY, step=0, state=NOTHING)
    parts = [(3, torch.zeros(4)), (20, torch.zeros(30))]
    noise.add(parts, 50, key=KEY, step=0, state=NOTHING)
    assert all(torch.equal(part, whole[at : at + len(part)]) for at, part in parts)


def test_rows_of_two_keys_never_meet() -> None:
    noise = NOISE["lambda"]
    state = noise.add([(0, torch.zeros(3))], 3, key=KEY, step=0, state=NOTHING)
    with pytest.raises(RuntimeError, match="step 1 of noise correlated since step 0, with another key than before"):
        noise.add([(0, torch.zeros(3))], 3, key=RandomKey.from_seed(1), step=1, state=state)
    with pytest.raises(RuntimeError, match="ahead of it"):
        CorrelatedNoise(1.0, HALF, begun=2).add([(0, torch.zeros(3))], 3, key=KEY, step=1, state=NOTHING)
    anew = CorrelatedNoise(1.0, HALF, begun=1)
    anew.add([(0, torch.zeros(3))], 3, key=RandomKey.from_seed(1), step=1, state=state)  # a mechanism of its own


def test_nothing_of_the_noise_is_saved_copied_or_shown() -> None:
    state = NOISE["banded"].add([(0, torch.zeros(3))], 3, key=KEY, step=0, state=NOTHING)
    assert isinstance(state.past, correlated.Past)
    assert state.state_dict() == {STATE: {"begun": 0, "key": KEY.digest()}}
    assert pickle.loads(pickle.dumps(state)).past is None
    assert copy.deepcopy(state).past is None
    assert "past" not in repr(state)


def test_the_name_of_a_key_tells_keys_apart_and_is_no_part_of_it() -> None:
    key = RandomKey.fresh()
    assert key.digest() == RandomKey(key.reveal(), "secret").digest() != RandomKey.fresh().digest()
    assert key.digest() not in key.reveal().hex()


def test_types_without_noise_are_refused() -> None:
    with pytest.raises(TypeError, match=r"dtype=torch.int64: expected torch.float32"):
        NOISE["banded"].add([(0, torch.zeros(3, dtype=torch.int64))], 3, key=KEY, step=0, state=NOTHING)
