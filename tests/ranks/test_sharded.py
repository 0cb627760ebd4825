"""Two gloo processes that share the parameters by FSDP2: the weights of one process, and noise exactly once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dp.look import engine_check_in_shards
from lightning_dp.mechanism.noise import BLOCK
from tests.conftest import PATIENCE
from tests.mechanism.laws import CAUGHT, FALSE_ALARM, noise_p_values
from tests.nearly import assert_nearly
from tests.ranks import layerwise
from tests.ranks.sharded import BUGS, ENGINES

ROOT = Path(__file__).parents[2]
SAME = [*ENGINES, "by_name", "full_resumed", "shards_resumed", "looked_at", "validated"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sharded")
    done = subprocess.run(
        [sys.executable, "-m", "tests.ranks.sharded", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]

    def load(case: str, ranks: int = 2, rank: int = 0) -> dict[str, Any]:
        return torch.load(folder / f"{case}-{ranks}-{rank}.pt", weights_only=True)

    load.folder = folder
    return load


@pytest.mark.parametrize("case", SAME)
def test_sharded_parameters_reach_the_weights_of_one_process(results: Any, case: str) -> None:
    alone, sharded = results("vmap", 1), results(case)
    assert not torch.equal(alone["before"], alone["after"])
    torch.testing.assert_close(sharded["after"], alone["after"], rtol=1e-5, atol=1e-6)
    assert_nearly((sharded["steps"], sharded["epsilon"]), (alone["steps"], alone["epsilon"]))


def test_tied_layers_groups_and_a_sharded_lightning_module_reach_them_too(results: Any) -> None:
    torch.testing.assert_close(results("odd")["after"], results("odd", 1)["after"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["quantile", "slaclip", "layer_quantile", "layer_slaclip"])
def test_a_clip_norm_that_is_adapted_is_the_same_on_all_ranks(results: Any, case: str) -> None:
    """Its coordinates are whole on every rank, whatever becomes of the parameters, and have noise once."""
    alone, parts = results(case, 1), [results(case, 2, rank) for rank in range(2)]
    of_ranks = [part["carried"]["clipping"] for part in parts]
    assert of_ranks[0] == of_ranks[1]
    assert of_ranks[0]["clip_norm"] == pytest.approx(alone["carried"]["clipping"]["clip_norm"], rel=1e-4)
    assert of_ranks[0]["released"] == pytest.approx(alone["carried"]["clipping"]["released"], rel=1e-4, abs=1e-5)
    torch.testing.assert_close(parts[0]["after"], alone["after"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["adamw", "adamw_resumed"])
def test_an_optimizer_that_knows_the_noise_is_told_it_on_every_rank_and_after_a_resume(results: Any, case: str) -> None:
    assert not torch.equal(results("adamw", 1)["before"], results("adamw", 1)["after"])
    for rank in range(2):
        torch.testing.assert_close(results(case, 2, rank)["after"], results("adamw", 1)["after"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["muon", "micro_adam"])
def test_optimizers_of_whole_parameters_step_on_shards_as_on_these(results: Any, name: str) -> None:
    """To the last bit, from the same gradients; in a run the gradients themselves are summed in another order."""
    whole, parts = torch.load(results.folder / "by_hand.pt", weights_only=True)[name]
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


@pytest.mark.parametrize("name", ["muon", "micro_adam", "disk"])
def test_they_and_a_filter_reach_the_weights_of_one_process_also_when_resumed(results: Any, name: str) -> None:
    alone = results(name, 1)
    near = {"rtol": 1e-2, "atol": 2e-3} if name == "muon" else {"rtol": 1e-4, "atol": 1e-5}  # Newton-Schulz in bfloat16
    for case in (name, f"{name}_resumed"):
        parts = [results(case, 2, rank) for rank in range(2)]
        for part in parts:
            torch.testing.assert_close(part["after"], alone["after"], **near)
            assert part["epsilon"] == alone["epsilon"]
        assert max(part["state"] for part in parts) <= 0.7 * alone["state"]
    assert float((alone["after"] - results(f"{name}_half")["after"]).abs().max()) > 1e-2
    if name == "disk":
        torch.testing.assert_close(results("disk_resumed_alone", 1)["after"], alone["after"], **near)
        assert float((alone["after"] - results("plain", 1)["after"]).abs().max()) > 1e-3


def test_users_are_drawn_and_clipped_alike_by_sharded_ranks(results: Any) -> None:
    torch.testing.assert_close(results("users")["after"], results("users", 1)["after"], rtol=1e-5, atol=1e-6)
    assert float((results("users")["after"] - results("vmap")["after"]).abs().max()) > 1e-3


def test_integers_and_discrete_noise_are_sharded_like_floats(results: Any) -> None:
    """Secret keys, so other examples in each run: both move, and by no more than two steps of the clip norm and noise."""
    for ranks in (1, 2):
        result = results("secure", ranks)
        assert result["steps"] == 2
        assert 0 < float((result["after"] - result["before"]).norm()) < 1


def test_validation_between_steps_sees_the_weights_of_then(results: Any) -> None:
    halves = [results("validated", 2, rank)["val"] for rank in range(2)]
    assert sum(halves) / 2 == pytest.approx(results("validated", 1)["val"], rel=1e-5)


@pytest.mark.parametrize("case", SAME[:-1])
def test_each_rank_keeps_its_part_of_parameters_and_optimizer_state(results: Any, case: str) -> None:
    parts = [results(case, 2, rank) for rank in range(2)]
    alone = results("vmap", 1)
    for what in ("kept", "state"):
        assert sum(part[what] for part in parts) == alone[what]
        assert max(part[what] for part in parts) < 0.7 * alone[what]


@pytest.mark.parametrize("case", ["full_resumed_alone", "shards_resumed_alone"])
def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(results: Any, case: str) -> None:
    """The full one without sharding, the sharded one with it."""
    alone = results("vmap", 1)
    resumed = results(case, 1)
    torch.testing.assert_close(resumed["after"], alone["after"], rtol=1e-5, atol=1e-6)
    assert_nearly((resumed["steps"], resumed["epsilon"]), (alone["steps"], alone["epsilon"]))


@pytest.mark.parametrize("kind", ["full", "shards"])
def test_a_checkpoint_carries_half_of_the_budget(results: Any, kind: str) -> None:
    half = results(f"{kind}_half")
    assert half["steps"] == 3
    assert half["epsilon"] < results("vmap", 1)["epsilon"]


def test_a_run_that_is_planned_before_its_checkpoint_is_read_would_be_caught(results: Any) -> None:
    assert results("shards_resumed")["steps"] == 6
    assert results("forgotten")["steps"] != 6


def test_steps_on_parameters_of_an_earlier_step_would_be_caught(results: Any) -> None:
    assert float((results("stale")["after"] - results("vmap", 1)["after"]).abs().max()) > 1e-3


def test_the_noise_of_a_sharded_step_has_the_law_of_the_plan(results: Any) -> None:
    noise = noise_of(results("noise"))
    assert len(noise) > 2 * BLOCK
    p_values = noise_p_values(noise)
    assert min(p_values.values()) > FALSE_ALARM, p_values


@pytest.mark.parametrize("bug", BUGS)
def test_wrong_noise_in_a_sharded_step_is_caught(results: Any, bug: str) -> None:
    assert min(noise_p_values(noise_of(results(bug))).values()) < CAUGHT


@pytest.mark.parametrize("case", [*(f"layer_{name}" for name in layerwise.SAME), "layer_few"])
def test_parameters_brought_layer_by_layer_reach_the_weights_of_one_process(results: Any, case: str) -> None:
    """Tied, frozen, thawed and odd layers, some left out at times, examples that part, and ranks without examples."""
    alone = results(case, 1)
    assert not torch.equal(alone["before"], alone["after"])
    for rank in range(2):
        here = results(case, 2, rank)
        torch.testing.assert_close(here["after"], alone["after"], rtol=1e-5, atol=1e-6)
        assert_nearly((here["steps"], here["epsilon"]), (alone["steps"], alone["epsilon"]))


@pytest.mark.parametrize(("case", "in_shards"), [("block", True), ("mixed", False)])
def test_the_engine_is_tried_in_shards_where_that_is_possible(results: Any, case: str, in_shards: bool) -> None:
    """Not where the loss uses a weight without its layer. One process alone never has shards."""
    assert torch.load(results.folder / f"tried-{case}-2.pt") == [in_shards]
    assert torch.load(results.folder / f"tried-{case}-1.pt") == [False]


@pytest.mark.parametrize("wrong", ["norms", "a.weight", "b.weight"])
def test_a_check_in_shards_that_gives_other_gradients_fails(wrong: str) -> None:
    right = {"norms": torch.tensor([2.0, 1.0]), "a.weight": torch.ones(2, 2)}
    found = {**right, "b.weight": torch.zeros(3)}  # without a gradient in FSDP2
    engine_check_in_shards._check_same_as_fsdp(right, found, 0.1)
    with pytest.raises(engine_check_in_shards.DisagreementError, match=f"most in {wrong}, by 0.2"):
        engine_check_in_shards._check_same_as_fsdp(right, {**found, wrong: found[wrong] + 0.2}, 0.1)


def test_layers_that_are_thawed_on_the_way_are_trained_with_whole_parameters_too(results: Any) -> None:
    torch.testing.assert_close(results("thaws")["after"], results("layer_thaws", 1)["after"], rtol=1e-5, atol=1e-6)


def test_a_run_by_layers_goes_on_from_its_checkpoint(results: Any) -> None:
    alone, resumed = results("layer_block", 1), results("layer_resumed")
    torch.testing.assert_close(resumed["after"], alone["after"], rtol=1e-5, atol=1e-6)
    assert results("layer_half")["steps"] == 3
    assert_nearly((resumed["steps"], resumed["epsilon"]), (alone["steps"], alone["epsilon"]))


@pytest.mark.parametrize("bug", layerwise.SUM_BUGS)
def test_sums_that_lose_a_part_would_be_caught(results: Any, bug: str) -> None:
    assert float((results(bug)["after"] - results("layer_few", 1)["after"]).abs().max()) > 1e-3


def test_noise_added_to_shards_is_that_of_one_process(results: Any) -> None:
    """Noise of the plan's law, and of the same numbers as in a step in which the parameters are whole."""
    noise = noise_of(results("layer_noise"))
    assert min(noise_p_values(noise).values()) > FALSE_ALARM
    assert abs(noise - noise_of(results("noise"))).max() < 1e-5


@pytest.mark.parametrize("bug", layerwise.NOISE_BUGS)
def test_wrong_noise_in_shards_is_caught(results: Any, bug: str) -> None:
    assert min(noise_p_values(noise_of(results(bug))).values()) < CAUGHT


def noise_of(result: dict[str, Any]) -> Any:
    """In units of σC = 2 · 0.5."""
    return ((result["before"] - result["after"]) * 16).double().numpy()


@pytest.mark.parametrize(
    ("case", "told"),
    [
        ("tensor_parallel", "tensor_parallel_size=2: expected 1.*data_parallel_size=2"),
        ("not_sharded", r"net\.2\.weight is not sharded: expected every trainable parameter to be.*fully_shard"),
        ("placement", r"net\.0\.weight with placements=\(Shard\(dim=1\),\).*expected \(Shard\(dim=0\),\)"),
        ("mp_policy", "mp_policy with param_dtype=torch.bfloat16: expected fully_shard without.*bf16-mixed"),
        ("average", "ExponentialMovingAverage.*with sharded parameters: expected neither together.*strategy='ddp'"),
        ("manual", "automatic_optimization=False with sharded parameters: expected True.*strategy='ddp'"),
        ("filter", "gradient_filter='disk' with gather='layer': expected gather='step'"),
        ("clip", "gradient_clip_val=1.0, an argument of the Trainer: expected None or 0"),
        ("layer_engine", "gather='layer' with engine='vmap'.*expected 'ghost'.*gather='step'"),
        ("layer_on_one", "gather differs between ranks: 'step' on rank 0, 'layer' on rank 1"),
        ("layer_engine_on_one", "rank 1 stopped: gather='layer' with engine='loop'"),
        ("layer_secure", r"gather='layer' with engine='loop' \(secure=True\): expected 'ghost'.*gather='step'"),
        (
            "layer_reads",
            "gather='layer' cannot run this training_step: .*calling these layers alone. Use gather='step'",
        ),
    ],
)
def test_what_a_sharded_step_cannot_do_is_refused(results: Any, case: str, told: str) -> None:
    message = (results.folder / f"refusal-{case}.txt").read_text()
    assert message.startswith("PreflightError: ")
    assert re.search(told, message)


def test_layers_in_another_order_than_agreed_end_the_fit(results: Any) -> None:
    """On the rank where it happens; nothing of the step is released."""
    message = (results.folder / "refusal-layer_reorders.txt").read_text()
    assert re.match("LayerOrderError: net.0.weight is used earlier, or more often, .*Use gather='step'", message)
