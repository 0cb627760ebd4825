"""What ``secure=True`` costs: noise for each coordinate, and a whole run on digits.

Run ``OMP_NUM_THREADS=1 python benchmarks/secure_noise.py``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from fractions import Fraction

import lightning as L
import torch

from lightning_dp import DifferentialPrivacy
from lightning_dp.data.digits import DigitsDataModule
from lightning_dp.mechanism.discrete import add_discrete_noise
from lightning_dp.mechanism.gaussian import add_gaussian_noise
from lightning_dp.mechanism.grid import RESOLUTION
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.models.digits_cnn import DigitsCNN

COORDINATES = 2_000_000


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU time of ``run``."""
    start = time.process_time()
    run()
    return time.process_time() - start


def noise() -> None:
    """Print the time of a coordinate's noise, of both kinds."""
    key, variance = RandomKey.fresh(), Fraction(3, 2) ** 2 * RESOLUTION**2
    floats, integers = torch.zeros(COORDINATES), torch.zeros(COORDINATES, dtype=torch.int64)
    plain = min(
        cpu_seconds(lambda: add_gaussian_noise([(0, floats)], COORDINATES, noise_std=1.5, key=key, step=0))
        for _ in range(3)
    )
    exact = min(
        cpu_seconds(lambda: add_discrete_noise([(0, integers)], COORDINATES, variance=variance, key=key, step=0))
        for _ in range(3)
    )
    for name, seconds in (("floating point", plain), ("discrete, exact", exact)):
        print(f"{name:16s} {seconds / COORDINATES * 1e9:6.1f} ns of one core for each coordinate")


def run(steps: int = 20) -> None:
    """Print the time of a step by the default, by the engine that ``secure=True`` needs, and with it."""
    for name, options in (("default", {}), ("engine='loop'", {"engine": "loop"}), ("secure=True", {"secure": True})):
        with tempfile.TemporaryDirectory() as folder:
            private = DifferentialPrivacy(noise_multiplier=2.0, delta=1e-4, **options)
            trainer = L.Trainer(
                max_steps=steps, callbacks=[private], logger=False, enable_checkpointing=False, accelerator="cpu",
                enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, default_root_dir=folder,
            )  # fmt: skip
            module, data = DigitsCNN(), DigitsDataModule(batch_size=256)
            seconds = cpu_seconds(lambda: trainer.fit(module, data))  # noqa: B023 (called at once)
            print(f"{name:16s} {seconds / steps * 1e3:6.0f} ms of one core for each step of 256 digits on average")


if __name__ == "__main__":
    torch.set_num_threads(1)
    noise()
    run()
