"""The fact that says what was looked at before the first step, and what was not."""

from __future__ import annotations

from lightning_dp.engines.select import Selection
from lightning_dp.look.engine_check import CHECKED_EXAMPLES, tolerance
from lightning_dp.look.leaks.examples_apart import Company
from lightning_dp.step.planned import Planned

MANY = 3
"""With more shapes than these among the few that are looked at, most examples of a step would run by themselves."""


def looked_at(planned: Planned, selection: Selection, most: int, company: Company) -> str:
    """One row of the panel before the first step.

    Args:
        planned: the run.
        selection: its engine.
        most: how many examples a micro-batch may have.
        company: what was seen of several examples.
    """
    engine = f"{len(planned.loader.first_indices(min(CHECKED_EXAMPLES, most)))} examples for the engine"
    if not selection.engine.is_reference:
        engine += f", which gives the gradients of plain backward passes (within {tolerance(planned.module):.0%})"
    seen = f"{company.examples} in one batch, which does not couple them"
    if company.unseen:
        seen = f"not whether a batch couples them, since {company.unseen}; each is a batch of its own in training"
    if company.shapes > MANY:
        seen += (
            f"; {company.shapes} shapes among them, of which equal ones run together (padding each to a multiple of 16 in "
            "collate_fn makes them fewer)"
        )
    alone = _alone(planned)
    rest = f". One example at a time: {', '.join(alone)}" if alone else ""
    return f"{engine}; {seen}{rest}."


def _alone(planned: Planned) -> list[str]:
    """The user's functions between data set and training_step that see one example at a time."""
    examples, form = planned.loader.examples, planned.form
    hooks = form.written_hooks()
    together = set(hooks) <= set(form.row_wise) and not examples.each
    return [*([] if examples.collate_at_once and not examples.each else ["collate_fn"]), *([] if together else hooks)]
