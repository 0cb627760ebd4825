"""Arguments that other libraries have, answered with what they are called here."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

OTHERS = {
    "accountant": "nothing: ε is the tightest upper bound there is; `lightning-dp epsilon --all` shows others beside it",
    "alphas": "nothing: ε is the tightest upper bound there is; `lightning-dp epsilon --all` shows others beside it",
    "batch_size": "the DataLoader's batch_size, or expected_batch_size=",
    "data_loader": "nothing: trainer.fit(module, data) has it",
    "epochs": "Trainer(max_epochs=...)",
    "grad_sample_mode": 'engine="auto", "ghost", "vmap" or "loop"',
    "l2_norm_clip": "clip_norm=",
    "loss_reduction": "nothing: clipped gradients are added up and divided by the expected batch size",
    "max_grad_norm": "clip_norm=",
    "max_physical_batch_size": "physical_batch_size=",
    "module": "nothing: trainer.fit(module, data) has it",
    "num_microbatches": "nothing: every example is clipped by itself",
    "optimizer": "nothing: the module's configure_optimizers has it",
    "poisson_sampling": 'sampling=; "poisson" is the default',
    "sample_rate": "expected_batch_size=, of which q is the share in dataset_size",
    "secure_mode": "secure=True",
    "secure_rng": "secure=True",
    "steps": "Trainer(max_steps=...)",
    "target_delta": "delta=",
    "target_epsilon": "epsilon=",
}
"""Names of arguments in Opacus, jax_privacy and TensorFlow Privacy, and what takes their place."""


def answered(init: Callable[P, R]) -> Callable[P, R]:
    """An ``__init__`` that says what the argument of another library is called here.

    Raises:
        TypeError: of the result, for an argument in :data:`OTHERS`.
    """

    @wraps(init)
    def answering(*args: P.args, **kwargs: P.kwargs) -> R:
        given: dict[str, Any] = dict(kwargs)
        said = [f"{name}=: expected {OTHERS[name]}" for name in given if name in OTHERS]
        if said:
            raise TypeError(
                f"DifferentialPrivacy has other names. {'. '.join(said)}. docs/tutorials/from_opacus.md has a table."
            )
        return init(*args, **kwargs)

    return answering
