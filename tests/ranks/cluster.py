"""Run as a script: small clusters of forked processes, as torchrun and SLURM would start them. Used by test_cluster.py.

Every process of a launch writes what its case returned, or the error it ended with, to ``{case}-{ranks}-{rank}.pt``.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.launcher.api import elastic_launch
from torch.distributed.run import config_from_args, get_args_parser

from lightning_dp import PrivateDDPStrategy
from tests.conftest import trainer
from tests.ranks import disagreements, training_runs
from tests.ranks.two_hosts import ADDRESSES, move_to, two_hosts, why_not
from tests.ranks.warm import train_once

ENOUGH = 600
"""Seconds after which a process that has not ended is ended, and its test fails."""
CHARGED = training_runs.KILLED_AT + 1 + training_runs.STEPS - training_runs.SAVED_AT
"""Steps of the restarted run: those up to the one in which a rank was lost, and those after the checkpoint."""
TIMEOUT = timedelta(seconds=120)
"""Of a collective: a rank that waits for nobody ends with gloo's error, not with the sentence a test expects."""


def torchrun(rank: int, ranks: int, nodes: int, port: int) -> dict[str, Any]:
    """What torchrun tells a process."""
    per_node = ranks // nodes
    return {
        "TORCHELASTIC_RUN_ID": "none", "RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank % per_node,
        "LOCAL_WORLD_SIZE": per_node, "GROUP_RANK": rank // per_node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip


def slurm(rank: int, ranks: int, nodes: int, port: int) -> dict[str, Any]:
    """What srun tells a task; the port follows from the job's number."""
    per_node = ranks // nodes
    return {
        "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": 770000 + port - 15000, "SLURM_NTASKS": ranks, "SLURM_PROCID": rank,
        "SLURM_NTASKS_PER_NODE": per_node, "SLURM_LOCALID": rank % per_node, "SLURM_NODEID": rank // per_node,
        "SLURM_NNODES": nodes, "SLURM_NODELIST": "127.0.0.1,host[2-9]", "WORLD_SIZE": ranks,
    }  # fmt: skip


def free_port() -> int:
    """In the range from which SLURM's job numbers choose."""
    for port in random.SystemRandom().sample(range(15000, 25000), 100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("no free port")


def launch(
    folder: Path,
    name: str,
    case: Callable[[Path], dict[str, Any]],
    ranks: int,
    nodes: int = 1,
    told: Callable[[int, int, int, int], dict[str, Any]] = torchrun,
    only: int | None = None,
    stays: int | None = None,
) -> None:
    """Run ``case`` in ``ranks`` processes (or as one of them alone), and wait for all but the one that stays for ever."""
    port, processes = free_port(), []
    for rank in range(ranks) if only is None else [only]:
        environment = told(rank, ranks, nodes, port)
        to = folder / f"{name}-{ranks}-{rank}.pt"
        processes.append(multiprocessing.get_context("fork").Process(target=_one, args=(case, environment, to)))
        processes[-1].start()
    for rank, process in enumerate(processes):
        process.join(0 if rank == stays else ENOUGH)
    for process in processes:
        process.kill()  # what hangs, and what was stopped on purpose


def move_into(own: Path) -> None:
    """Each case writes its journal into a folder of its own: a killed run beside it would be named in its statement."""
    own.mkdir(exist_ok=True)
    os.chdir(own)


def _one(case: Callable[[Path], dict[str, Any]], environment: dict[str, Any], to: Path) -> None:
    os.environ.update({key: str(value) for key, value in environment.items()})
    move_into(to.parent / to.name.rsplit("-", 2)[0])
    try:
        torch.save(case(to.parent), to)
    except BaseException as error:
        torch.save({"error": str(error), "type": type(error).__name__, "trace": traceback.format_exc()}, to)
    os._exit(0)  # nothing of the parent's to clean up


def on_cluster(*callbacks: Any, **options: Any) -> Any:
    """A Trainer of all processes of the launch."""
    nodes = options.pop("num_nodes", 1)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    strategy = "auto" if ranks == 1 else DDPStrategy(timeout=TIMEOUT)
    return trainer(*callbacks, **{"devices": ranks // nodes, "num_nodes": nodes, "strategy": strategy, **options})


def run(name: str, **options: Any) -> Callable[[Path], dict[str, Any]]:
    """A case of :mod:`tests.ranks.training_runs`."""
    return lambda _: getattr(training_runs, name)(on_cluster, **options)


def stretches(until: int) -> Callable[[Path], dict[str, Any]]:
    """A part of a run with a seed, and of one without."""

    def both(folder: Path) -> dict[str, Any]:
        arguments = {"folder": folder, "until": until}
        return {str(seed): training_runs.stretch(on_cluster, seed=seed, **arguments) for seed in (7, None)}

    return both


def other_batch(folder: Path) -> dict[str, Any]:
    """Resume with another number of ranks what took its batch from the loader and the number of ranks."""
    return training_runs.stretch(
        on_cluster, folder, until=int(os.environ["WORLD_SIZE"]), seed=8, expected_batch_size=None
    )


def absent(strategy: type[DDPStrategy]) -> Callable[[Path], dict[str, Any]]:
    """One of two nodes, waiting for the other."""

    def alone(_: Path) -> dict[str, Any]:
        with_little_patience = strategy(timeout=timedelta(seconds=2))
        return training_runs.plain(on_cluster, num_nodes=2, strategy=with_little_patience)

    return alone


def elastic(folder: Path, name: str, case: Callable[[Path], dict[str, Any]], *words: str) -> None:
    """What ``torchrun`` does when it is given these words, but for forking from this process instead of starting anew."""
    arguments = get_args_parser().parse_args([*words, "--nproc-per-node", "2", "--start-method", "fork", "none.py"])
    config, _, _ = config_from_args(arguments)
    elastic_launch(config, _saved)(folder, name, case)


def _saved(folder: Path, name: str, case: Callable[[Path], dict[str, Any]]) -> None:
    move_into(folder / name)
    result = case(folder)
    torch.save(result, folder / f"{name}-{os.environ['WORLD_SIZE']}-{os.environ['RANK']}.pt")


def on_two_hosts(folder: Path) -> None:
    """``torchrun --nnodes 2 --nproc-per-node 2`` on each of two hosts, if this machine can have them."""
    if reason := why_not():
        (folder / "no_two_hosts.txt").write_text(reason)
        return
    with two_hosts() as hosts:
        nodes = [
            multiprocessing.get_context("fork").Process(target=_node, args=(folder, host, hosts)) for host in hosts
        ]
        for node in nodes:
            node.start()
        for node in nodes:
            node.join(ENOUGH)
            node.kill()


def _node(folder: Path, host: str, hosts: tuple[str, str]) -> None:
    move_to(host)
    meeting = ("--master-addr", ADDRESSES[0], "--master-port", "29513")
    case = run("plain", num_nodes=2)
    elastic(folder, "two_hosts", case, "--nnodes", "2", "--node-rank", str(hosts.index(host)), *meeting)


def main(folder: Path) -> None:
    for ranks in (1, 2, 3):
        launch(folder, "uneven", run("uneven"), ranks)
        launch(folder, "correlated", lambda to: training_runs.correlated(on_cluster, to), ranks)
    launch(folder, "plain", run("plain"), 1)
    launch(folder, "as_many_charged", run("plain", max_steps=CHARGED), 1)
    launch(folder, "slurm", run("plain", num_nodes=2), 2, nodes=2, told=slurm)
    launch(folder, "absent_worker", absent(PrivateDDPStrategy), 2, nodes=2, only=0)
    launch(folder, "absent_main", absent(PrivateDDPStrategy), 2, nodes=2, only=1)
    launch(folder, "absent_stock", absent(DDPStrategy), 2, nodes=2, only=0)
    for lost in (0, 2):
        launch(folder, f"killed_{lost}", run("lost", which=lost, how=signal.SIGKILL), 3)
    launch(folder, "silent", run("lost", which=1, how=signal.SIGSTOP), 3, stays=1)
    # With the store that it shares, torch 2.15 restarts with the addresses of dead processes.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}")
    elastic(folder, "restarts", lambda to: training_runs.killed_once(on_cluster, to), "--max-restarts", "1", *meeting)
    on_two_hosts(folder)
    for ranks in (2, 3):
        launch(folder, "held", run("held"), ranks)
    launch(folder, "wrong_shards", run("wrong_shards"), 2)
    launch(folder, "counted", run("counted"), 2)
    for ranks, until in ((4, 2), (2, 4), (1, 6)):
        launch(folder, "stretch", stretches(until), ranks)
    for ranks in (1, 2):
        launch(folder, "audited", run("audited"), ranks)
        launch(folder, "other_batch", other_batch, ranks)
    launch(folder, "disagree", lambda to: disagreements.all_of_them(on_cluster, to), 2)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    train_once()
    os.chdir(sys.argv[1])
    main(Path(sys.argv[1]))
