"""Processes that torchrun or SLURM start: what they must agree on, what may differ, and what happens when one is lost."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dp.accounting.epsilon import epsilon_bound
from lightning_dp.accounting.phase import Phase
from lightning_dp.loading.repeated_reads import FEW
from lightning_dp.look.same_data import PROBES, READS
from lightning_dp.record.course import CAVEAT
from tests.conftest import PATIENCE, regression_data, regressor
from tests.nearly import assert_nearly
from tests.ranks.by_hand import sgd
from tests.ranks.cluster import CHARGED
from tests.ranks.disagreements import CASES
from tests.ranks.training_runs import KILLED_AT, SAVED_AT, SETTINGS, STEPS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("cluster")
    done = subprocess.run(
        [sys.executable, "-m", "tests.ranks.cluster", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]

    def load(case: str, ranks: int, rank: int = 0) -> dict[str, Any]:
        return torch.load(folder / f"{case}-{ranks}-{rank}.pt", weights_only=True)

    load.folder = folder
    load.told = done.stdout + done.stderr
    return load


LOOKED_AT = 16
"""At most so many examples are read before training, to try engines and to look for coupled examples."""

SAME = {
    "seed": r"seed differs between ranks: 0 on rank 0, 1 on rank 1: expected the same on all 2\. .*same number, or None",
    "one seed": "seed differs between ranks: None on rank 0, 7 on rank 1",
    "clip norm": "clip_norm differs between ranks: 1.0 on rank 0, 2.0 on rank 1",
    "noise multiplier": "noise_multiplier differs between ranks: 1.0 on rank 0, 2.0 on rank 1",
    "budget": "epsilon differs between ranks: 4.0 on rank 0, 5.0 on rank 1",
    "delta": "delta differs between ranks: 0.001 on rank 0, 0.0001 on rank 1",
    "logging": "log_train_metrics differs between ranks: True on rank 0, False on rank 1",
    "steps": "max_steps differs between ranks: 3 on rank 0, 4 on rank 1",
    "precision": "precision differs between ranks: '32-true' on rank 0, 'bf16-mixed' on rank 1",
    "length": r"len\(dataset\) differs between ranks: 64 on rank 0, 65 on rank 1: .* Load the whole dataset on each rank",
    "length, with N given": r"len\(dataset\) differs between ranks: 64 on rank 0, 65 on rank 1",
    "batch size": "expected_batch_size differs between ranks: 16 on rank 0, 18 on rank 1",
    "users": r"whose each example is \(digest\) differs between ranks",
    "order": r"dataset\[\d+\] differs between rank 0 and rank 1: expected .* random_split",
    "version": "version of lightning_dp differs between ranks: '9.0' on rank 0, '9.1' on rank 1: .*same environment",
    "checkpoint on one": "steps already charged differs between ranks: 3 on rank 0, 0 on rank 1: .*same checkpoint",
    "ledgers": "steps already charged differs between ranks: 3 on rank 0, 4 on rank 1",
}
OF_ONE = {"stream on one": "is an IterableDataset", "BatchNorm on one": r"BatchNorm in net\.1: expected"}


def test_ranks_may_differ_in_what_changes_speed_alone(results: Any) -> None:
    assert results("disagree", 2, 0)["nothing"] is None
    assert results("disagree", 2, 1)["nothing"] is None


@pytest.mark.parametrize("case", SAME)
def test_ranks_that_do_not_run_the_same_thing_all_stop_with_the_same_sentence(results: Any, case: str) -> None:
    told = [results("disagree", 2, rank)[case] for rank in range(2)]
    assert told[0] == told[1]
    assert re.match(f"PreflightError: {SAME[case]}", told[0]), told


@pytest.mark.parametrize("case", OF_ONE)
def test_what_one_rank_refuses_stops_the_others_too(results: Any, case: str) -> None:
    """Rank 0, which has nothing to refuse, would wait for rank 1 until the collective's time is over."""
    told = [results("disagree", 2, rank)[case] for rank in range(2)]
    assert re.match("PreflightError: rank 1 stopped: .*" + OF_ONE[case], told[0]), told
    assert re.match("PreflightError: .*" + OF_ONE[case], told[1]), told
    assert "stopped" not in told[1]


def test_every_disagreement_is_looked_at() -> None:
    assert {"nothing", *SAME, *OF_ONE} == set(CASES)


def test_ranks_of_different_speed_micro_batches_and_engines_reach_the_weights_of_one(results: Any) -> None:
    """With B = 2 of 64, ranks are often without an example, and now and then all of them are."""
    alone = results("uneven", 1)
    sizes = [len(step) for step in alone["sampled"]]
    assert 0 in sizes
    assert max(sizes) > 3
    for ranks in (2, 3):
        for rank in range(ranks):
            here = results("uneven", ranks, rank)
            torch.testing.assert_close(here["weights"], alone["weights"], rtol=1e-5, atol=1e-6)
            assert here["statement"] == alone["statement"]
            assert here["steps"] == 12


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("noise", ["banded", "lambda", "bisr"])
def test_correlated_noise_is_that_of_one_rank_and_goes_on_at_another_number_of_them(
    results: Any, noise: str, ranks: int
) -> None:
    alone = results("correlated", 1)[noise]
    for rank in range(ranks):
        here = results("correlated", ranks, rank)
        for found in (here[noise], here[f"{noise}, resumed"]):
            torch.testing.assert_close(found["weights"], alone["weights"], rtol=1e-5, atol=1e-6)
            assert found["privacy"]["epsilon"] == alone["privacy"]["epsilon"]
            assert found["steps"] == STEPS


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_rank_reads_its_part_of_each_sample_once_and_nothing_else(results: Any, ranks: int) -> None:
    together: list[list[int]] = [[] for _ in range(12)]
    for rank in range(ranks):
        here = results("uneven", ranks, rank)
        drawn = [index for step in here["sampled"] for index in step]
        backwards = iter(reversed(here["read"]))
        assert all(index in backwards for index in reversed(drawn))  # in this order, at the end
        repeated = 2 * FEW + len(here["sampled"])  # reads that are compared with another of the same example
        assert len(here["read"]) - len(drawn) <= LOOKED_AT + PROBES * READS + repeated
        for step, indices in zip(together, here["sampled"], strict=True):
            step += indices
    assert [sorted(step) for step in together] == results("uneven", 1)["sampled"]


OF_THE_TRIAL = ("all_gather_object", "broadcast_object_list")
"""Calls by which the ranks agree on an engine, once, at the beginning of the first step: facts about the run and refusals."""


@pytest.mark.parametrize("case", ["small", "large", "views"])
def test_a_step_sends_one_sum_of_four_bytes_a_parameter(results: Any, case: str) -> None:
    """Whatever the batch, the views and the number of micro-batches. (The 8 bytes are Lightning's, about signals.)"""
    for rank in range(2):
        counted = results("counted", 2, rank)[case]
        assert len(counted["steps"]) == 3
        first = [call for call in counted["steps"][0] if call[0] not in OF_THE_TRIAL]
        for calls in (first, *counted["steps"][1:]):
            large = [call for call in calls if tuple(call[:2]) != ("broadcast", 8)]
            assert large == [("all_reduce", 4 * counted["parameters"], "torch.float32 RedOpType.SUM")]
            assert len(calls) <= 2


def test_a_run_that_goes_from_four_ranks_to_two_to_one_is_the_run_on_one(results: Any) -> None:
    parts = [results("stretch", ranks)["7"] for ranks in (4, 2, 1)]
    torch.testing.assert_close(parts[-1]["weights"], results("plain", 1)["weights"], rtol=1e-5, atol=1e-6)
    assert parts[-1]["statement"] == results("plain", 1)["statement"]
    assert [part["steps"] for part in parts] == [2, 4, 6]


@pytest.mark.parametrize("seed", ["7", "None"])
def test_no_noise_and_no_sample_is_used_twice_when_the_number_of_ranks_changes(results: Any, seed: str) -> None:
    noised, drawn = [], []
    for ranks in (4, 2, 1):
        of_rank = [results("stretch", ranks, rank)[seed] for rank in range(ranks)]
        noised += of_rank[0]["noised"]
        assert all(part["noised"] == of_rank[0]["noised"] for part in of_rank)  # each rank's share of the coordinates
        for step in range(2):
            drawn.append(tuple(sorted(index for part in of_rank for index in part["sampled"][step])))
            assert len(set(drawn[-1])) == len(drawn[-1])
    assert noised == list(range(6))
    assert len(set(drawn)) == 6


def test_another_number_of_ranks_does_not_change_the_batch_behind_ones_back(results: Any) -> None:
    told = [results("other_batch", 2, rank)["error"] for rank in range(2)]
    assert told[0] == told[1]
    expected = (
        r"expected_batch_size=None with 2 ranks after 1: expected the batch of the steps before, 16, "
        r".*size=16\) to go on"
    )
    assert re.match(expected, told[0])
    assert results("other_batch", 1)["steps"] == 1


def by_hand(steps: Iterable[int], after: Iterable[int] = (), changed: str = "") -> torch.Tensor:
    """The weights after ``steps``, and then ``after`` with a key into which ``changed`` has entered."""
    module, data = regressor(), regression_data()
    sgd(module, data, steps, **SETTINGS)
    return sgd(module, data, after, **SETTINGS, changed=changed)


def same_as_alone(results: Any, case: str, ranks: int) -> None:
    alone = results("plain", 1)
    for rank in range(ranks):
        here = results(case, ranks, rank)
        torch.testing.assert_close(here["weights"], alone["weights"], rtol=1e-5, atol=1e-6)
        assert here["statement"] == alone["statement"]
        assert_nearly(here["privacy"], alone["privacy"])


def test_two_hosts_with_two_ranks_each_train_as_one_process_does(results: Any) -> None:
    reason = results.folder / "no_two_hosts.txt"
    if reason.exists():
        pytest.skip(f"no two hosts on this machine: {reason.read_text()}")
    same_as_alone(results, "two_hosts", 4)


def test_two_nodes_under_slurm_train_as_one_process_does(results: Any) -> None:
    same_as_alone(results, "slurm", 2)


@pytest.mark.parametrize("case", ["killed_0", "killed_2", "silent"])
def test_a_lost_rank_ends_the_others_with_its_name(results: Any, case: str) -> None:
    lost = 1 if case == "silent" else int(case[-1])
    for rank in {0, 1, 2} - {lost}:
        here = results(case, 3, rank)
        assert here["type"] == "RankLostError"
        assert re.match(
            rf"rank {lost} of 3 did not answer within 8 s after a collective call of step 2 failed", here["error"]
        )
        assert "expected every rank to be there" in here["error"]
        assert "ckpt_path='last'" in here["error"]
        assert here["steps"] == 3  # charged before the noise was drawn, though nothing came of it


def test_a_run_by_hand_is_what_one_process_trains(results: Any) -> None:
    torch.testing.assert_close(results("plain", 1)["weights"], by_hand(range(STEPS)), rtol=1e-5, atol=1e-6)


def test_torchrun_restarts_from_the_last_checkpoint_with_other_noise(results: Any) -> None:
    """Steps 0 and 1 are in the checkpoint, 2 and 3 are lost: neither their samples nor their noise come again."""
    changed = results("restarts", 2)["changed"]
    assert changed  # that steps were lost
    expected = by_hand(range(SAVED_AT), range(KILLED_AT + 1, CHARGED), changed)
    for rank in range(2):
        here = results("restarts", 2, rank)
        assert here["changed"] == changed
        assert here["steps_here"] == STEPS - SAVED_AT
        torch.testing.assert_close(here["weights"], expected, rtol=1e-5, atol=1e-6)
    # noise used again, or one lost step forgotten
    for wrong in (range(SAVED_AT, STEPS), range(KILLED_AT, CHARGED - 1)):
        for key in ("", changed):
            assert float((expected - by_hand(range(SAVED_AT), wrong, key)).abs().max()) > 1e-2
    assert float((expected - by_hand([*range(SAVED_AT), *range(KILLED_AT + 1, CHARGED)])).abs().max()) > 1e-2


def test_torchrun_restarts_with_the_budget_of_every_step_that_was_charged(results: Any) -> None:
    lost = KILLED_AT + 1 - SAVED_AT
    uninterrupted = results("as_many_charged", 1)
    for rank in range(2):
        here = results("restarts", 2, rank)
        assert here["steps"] == CHARGED == STEPS + lost
        assert here["statement"] == uninterrupted["statement"]
        said = [caveat for caveat in here["privacy"]["caveats"] if caveat not in uninterrupted["privacy"]["caveats"]]
        assert len(said) == 3
        assert said[0].startswith(f"training was interrupted: {lost} of the steps")
        assert said[1].startswith("training went on from a checkpoint")
        assert said[2] == CAVEAT
        others = [{**one["privacy"], "caveats": None} for one in (here, uninterrupted)]
        assert others[0] == others[1]


@pytest.mark.parametrize("case", ["absent_worker", "absent_main"])
def test_a_node_that_never_comes_is_asked_for(results: Any, case: str) -> None:
    told = results(case, 2, int(case == "absent_main"))
    assert told["type"] == "RankLostError"
    expected = (
        r"num_nodes=2 with 1 processes each: not all of the 2 came to 127\.0\.0\.1:\d+ in time: expected each node"
    )
    assert re.match(expected, told["error"])


def test_with_the_stock_strategy_it_is_torch_that_says_so(results: Any) -> None:
    """Lightning meets the other processes before it asks any callback."""
    assert re.search("1/2 clients joined", results("absent_stock", 2)["error"])


@pytest.mark.parametrize("ranks", [2, 3])
def test_records_of_shards_are_drawn_as_if_every_rank_had_them_all(results: Any, ranks: int) -> None:
    same_as_alone(results, "held", ranks)
    of_rank = [results("held", ranks, rank) for rank in range(ranks)]
    assert sorted(index for part in of_rank for index in part["here"]) == list(range(64))
    for part in of_rank:
        assert {index for step in part["sampled"] for index in step} <= set(part["here"])


WRONG_SHARDS = {
    "everything on every rank": "64 of 64 records compared are on more than one rank: expected each record on one rank only",
    "one record twice": r"1 of 64 records compared are on more than one rank: .* give copies='count'",
    "unreadable on one": r"shard range\(9, 30\) on rank 1: OSError: the disk is gone: expected every shard to be readable",
    "other shards": "shards differ between rank 0 and rank 1: expected the same list in the same order on every rank",
    "too few": "1 shards for 2 ranks: expected at least one for each",
    "empty": r"shard range\(0, 0\) holds no record",
    "too early": "HeldRecords of 1 ranks in a run of 2: expected the same, .* setup or train_dataloader",
}


@pytest.mark.parametrize("case", WRONG_SHARDS)
def test_shards_that_are_not_one_dataset_are_refused_on_every_rank(results: Any, case: str) -> None:
    told = [results("wrong_shards", 2, rank)[case] for rank in range(2)]
    assert told[0] == told[1]
    assert re.match(f"HeldRecordsError: {WRONG_SHARDS[case]}", told[0]), told


def test_repetitions_count_as_records_of_their_own_if_asked(results: Any) -> None:
    assert [results("wrong_shards", 2, rank)["counted"] for rank in range(2)] == [64 + 5, 64 + 5]


def test_an_audit_on_two_ranks_is_that_on_one(results: Any) -> None:
    """The same coins, releases and scores; a bug of the noise is found there as well."""
    alone = results("audited", 1)
    for rank in range(2):
        found = results("audited", 2, rank)
        for name in ("right", "broken"):
            assert found[name]["verdict"] == alone[name]["verdict"] == ("consistent" if name == "right" else "violated")
            assert found[name]["epsilon_lower"] == pytest.approx(alone[name]["epsilon_lower"], rel=1e-3)
            for ours, theirs in zip(found[name]["bounds"], alone[name]["bounds"], strict=True):
                assert ours["epsilon"] == pytest.approx(theirs["epsilon"], rel=1e-3, abs=1e-3)
        assert "seed=None with world_size=2: expected a number, the same on every rank" in found["without a seed"]
    assert alone["without a seed"] == ""
    for ranks, found in ((1, alone), (2, results("audited", 2))):  # what is audited is the plan without canaries
        claimed = epsilon_bound([Phase(3.0, 16 * ranks / 64, 1)], delta=1e-5).epsilon
        assert found["claimed"] == pytest.approx(claimed, rel=1e-6)
