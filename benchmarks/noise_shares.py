"""How long a rank spends on drawing a step's noise, when the ranks divide the coordinates among themselves.

uv run python benchmarks/noise_shares.py [--coordinates 9000000 36000000] [--ranks 1 2 4 8] [--rounds 5]

Processor seconds of one thread (of the slowest rank's share, taken one after the other), median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from lightning_dp.mechanism.gaussian import add_gaussian_noise
from lightning_dp.mechanism.noise import BLOCK, own_share
from lightning_dp.mechanism.randomness import RandomKey


def seconds(coordinates: int, ranks: int, rounds: int) -> float:
    """The slowest rank's, median of the rounds."""
    key, total = RandomKey.fresh(), torch.zeros(coordinates)
    slowest = []
    for step in range(rounds):
        of_ranks = []
        for rank in range(ranks):
            start = time.process_time()
            own = own_share([(0, total)], coordinates, rank, ranks, BLOCK)
            add_gaussian_noise(own, coordinates, noise_std=1.0, key=key, step=step)
            of_ranks.append(time.process_time() - start)
        slowest.append(max(of_ranks))
    return statistics.median(slowest)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinates", type=int, nargs="+", default=[9_000_000, 36_000_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| coordinates | " + " | ".join(f"{ranks} ranks" for ranks in arguments.ranks) + " |")
    for coordinates in arguments.coordinates:
        times = [seconds(coordinates, ranks, arguments.rounds) for ranks in arguments.ranks]
        print(f"| {coordinates:,} | " + " | ".join(f"{t * 1e3:.0f} ms" for t in times) + " |")
