"""Run as a script: small clusters of forked processes, as torchrun and SLURM would start them. Used by test_cluster.py.

Every process of a launch writes what its case returned, or the error it ended with, to ``{case}-{ranks}-{rank}.pt``.
"""

from __future__ import annotations

import multiprocessing
import os
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

from tests.conftest import trainer
from tests.distributed import disagreements, training_runs

ENOUGH = 100
"""Seconds after which a process that has not ended is ended, and its test fails."""
TIMEOUT = timedelta(seconds=20)
"""Of a collective: a rank that waits for nobody ends with gloo's error, not with the sentence a test expects."""


def torchrun(rank: int, ranks: int, nodes: int, port: int) -> dict[str, Any]:
    """What torchrun tells a process."""
    per_node = ranks // nodes
    return {
        "TORCHELASTIC_RUN_ID": "none", "RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank % per_node,
        "LOCAL_WORLD_SIZE": per_node, "GROUP_RANK": rank // per_node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip


def launch(folder: Path, name: str, case: Callable[[Path], dict[str, Any]], ranks: int, nodes: int = 1) -> None:
    """Run ``case`` in ``ranks`` processes, and wait for all of them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = torchrun(rank, ranks, nodes, port)
        to = folder / f"{name}-{ranks}-{rank}.pt"
        processes.append(multiprocessing.get_context("fork").Process(target=_one, args=(case, environment, to)))
        processes[-1].start()
    for process in processes:
        process.join(ENOUGH)
        if process.is_alive():
            process.kill()


def _one(case: Callable[[Path], dict[str, Any]], environment: dict[str, Any], to: Path) -> None:
    os.environ.update({key: str(value) for key, value in environment.items()})
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
    """A case of :mod:`tests.distributed.training_runs`."""
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


def main(folder: Path) -> None:
    for ranks in (1, 2, 3):
        launch(folder, "uneven", run("uneven"), ranks)
    launch(folder, "plain", run("plain"), 1)
    launch(folder, "counted", run("counted"), 2)
    for ranks, until in ((4, 2), (2, 4), (1, 6)):
        launch(folder, "stretch", stretches(until), ranks)
    for ranks in (1, 2):
        launch(folder, "other_batch", other_batch, ranks)
    launch(folder, "disagree", lambda to: disagreements.all_of_them(on_cluster, to), 2)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(Path(sys.argv[1]))
