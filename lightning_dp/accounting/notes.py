"""What changed between the stretches of a training that a reader of its guarantee should know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from lightning_dp.accounting.assumptions import SIZE_GIVEN, SIZE_READ, STEPS_READ
from lightning_dp.accounting.entry import Entry
from lightning_dp.accounting.phase import phase_of, same_mechanism
from lightning_dp.plan.mechanism import ADD_REMOVE
from lightning_dp.plan.sampling import IN_BLOCKS


def notes_on(entries: Sequence[Entry]) -> tuple[str, ...]:
    """Sentences for the statement, of all entries of a ledger in order."""
    notes: list[str] = []
    if any(not same_mechanism(phase_of(a.mechanism, 0), phase_of(b.mechanism, 0)) for a, b in pairwise(entries)):
        notes.append(
            "the noise multiplier or the sampling probability changed during training: the phases are "
            "composed as if chosen in advance, and a change must not depend on what earlier ones released"
        )
    for name, meaning in (
        (
            "clip_norm",
            "the clip norm changed during training from {a:g} to {b:g}; ε does not depend on it",
        ),
        (
            "clipping",
            "the clipping style changed during training from {a} to {b}; ε does not depend on it",
        ),
        (
            "dataset_size",
            "the dataset size changed during training from {a} to {b}: ε bounds the loss of an example "
            "present throughout, and assumes that the other examples' coming and going is public",
        ),
        (
            "delta",
            "δ changed during training from {a:g} to {b:g}: ε is stated for all steps at the last δ",
        ),
        (
            "max_batch_size",
            "the bound on a step's draw changed during training from {a} to {b}: each stretch is accounted for with "
            "its own",
        ),
        (
            "resolution",
            "the clip norm's resolution on the grid of discrete noise changed during training from {a} to {b} (None: "
            "noise in floating point)",
        ),
    ):
        for a, b in pairwise(entry.numbers[name] for entry in entries):
            if a != b:
                notes.append(meaning.format(a=a, b=b))
    begun = len({entry.stretch for entry in entries} - {""})
    if begun > 1:
        notes.append(
            f"the randomness of steps that are accounted for together began anew {begun - 1} "
            f"time{'s' if begun > 2 else ''}, since a secret key is never saved: what was under way then counts as whole"
        )
    return (*notes, *_gamma_notes(entries), *_adaptation_notes(entries), *_filter_notes(entries))


def notes_on_sizes(entries: Sequence[Entry]) -> tuple[str, ...]:
    """Whether N and T follow from the data, of all entries of a ledger, the current one last.

    Under add/remove N is held at one number for both of two neighbours. Where it is read from the data the neighbour would in
    truth be trained with another q, so that the guarantee leaves open how many examples there are.
    """
    notes = [note for entry in entries for note in _notes_on_size(entry)]
    return tuple(dict.fromkeys(notes))


def _notes_on_size(entry: Entry) -> Iterator[str]:
    step, sizes = entry.mechanism, entry.assumed.sizes
    size, held = f"N = {step.sampling.dataset_size}", step.adjacency == ADD_REMOVE
    if SIZE_GIVEN in sizes:
        yield f"{size} was given, and is taken to follow from nobody's data"
    elif SIZE_READ in sizes and held:
        also = "q" if step.sampling.scheme not in IN_BLOCKS else "q and the divisor"
        yield (
            f"{size} was read from the training data and counts as public, and so does {also}, which follows from it: how many "
            f"there are is not protected. Give dataset_size= for an N that does not follow from the data, or "
            "adjacency='zero_out', under which all neighbours have it"
        )
    elif SIZE_READ in sizes:
        yield f"{size} was read from the training data, and all neighbours have it: how many there are is not protected"
    if STEPS_READ in sizes and held:
        yield (
            "the number of steps follows from the length of the training loader, and so from how many examples there are, "
            "which counts as public. Give Trainer(max_steps=...) for one that does not"
        )


def _gamma_notes(entries: Sequence[Entry]) -> list[str]:
    """What a reader should know of γ in those stretches that were clipped automatically."""
    automatic = [entry for entry in entries if entry.mechanism.clipping.style == "automatic"]
    unknown = sum(entry.steps for entry in automatic if not entry.gamma_known)
    notes = [
        f"γ of automatic clipping changed during training from {a:g} to {b:g}; ε does not depend on it"
        for a, b in pairwise(entry.gamma for entry in automatic if entry.gamma is not None)
        if a != b
    ]
    if unknown:
        notes.append(
            f"γ of automatic clipping was not written down for {unknown} steps, so that it may have changed; ε does not depend "
            "on it"
        )
    return notes


def _adaptation_notes(entries: Sequence[Entry]) -> list[str]:
    """What changed in how C is adapted, between stretches of one clipping style."""
    rules = [entry.mechanism.clipping for entry in entries]
    return [
        f"how the clip norm is adapted changed during training from {a.adaptation} to {b.adaptation}; ε does not depend on it"
        for a, b in pairwise(rules)
        if a.style == b.style and a.adaptation != b.adaptation
    ]


def _filter_notes(entries: Sequence[Entry]) -> list[str]:
    """What changed in what the optimizer gets of a release."""
    return [
        f"what is between release and optimizer changed during training from {a or 'nothing'} to {b or 'nothing'}, and began "
        "anew then; ε does not depend on it"
        for a, b in pairwise(entry.mechanism.filter for entry in entries)
        if a != b
    ]
