"""Training loaders whose sampling cannot be replaced by Poisson sampling."""

from __future__ import annotations

from typing import Any

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_dp.errors import PreflightError
from lightning_dp.lightning_internals import index_batch_samplers, sampler_within


def check_loader(loader: object) -> DataLoader[Any]:
    """Refuse training loaders whose sampling cannot be replaced by Poisson sampling without changing their meaning.

    Raises:
        PreflightError: see the message.
    """
    if not isinstance(loader, DataLoader):
        raise PreflightError(
            f"train_dataloader of type {type(loader).__name__}: expected a torch.utils.data.DataLoader. Poisson sampling "
            "needs to reach every example by its index; wrap the dataset in a DataLoader."
        )
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise PreflightError(
            f"train_dataloader of type {type(loader).__name__}, which iterates in its own way: expected torch's "
            "DataLoader. Its own iteration would not take place; put that logic into the dataset or collate_fn."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise PreflightError(
            f"dataset={type(loader.dataset).__name__} is an IterableDataset: expected a map-style dataset with "
            "__getitem__ and __len__. A stream cannot be sampled by Poisson: what a shuffle buffer gives is neither "
            "independent nor drawn with a known probability. Index the data, or hold the records of its shards in memory with "
            "lightning_dp.HeldRecords."
        )
    if not hasattr(loader.dataset, "__len__"):
        raise PreflightError(
            f"dataset={type(loader.dataset).__name__} has no length: expected __len__. Poisson sampling needs to know "
            "how many examples there are to draw from."
        )
    if loader.batch_sampler is None:
        raise PreflightError(
            f"train_dataloader with batch_size=None over {type(loader.dataset).__name__}: expected single examples and "
            "DataLoader(dataset, batch_size=...), or, of a dataset that takes a list of indices, "
            "DataLoader(dataset, batch_size=None, sampler=BatchSampler(RandomSampler(dataset), batch_size=..., "
            "drop_last=False)). Here an index is a whole batch, which would be drawn, clipped and protected as one example. "
            "Batches that are tuples of tensors become examples with TensorDataset(*map(torch.cat, zip(*dataset)))."
        )
    if loader.batch_size is None or type(loader.batch_sampler) not in (BatchSampler, *index_batch_samplers()):
        given: Any = loader.batch_sampler
        within = sampler_within(getattr(given, "sampler", None))
        kind = f"{type(given).__name__}({'' if within is None else type(within).__name__})"
        if within is not None:
            _check_sampler(within, loader.dataset)
        size = getattr(given, "batch_size", "...")
        raise PreflightError(
            f"batch_sampler={kind}: expected none. Poisson sampling, which the accountant assumes, would replace it. Give "
            f"DataLoader(dataset, batch_size={size}, drop_last={getattr(given, 'drop_last', False)}) instead."
        )
    _check_sampler(sampler_within(loader.sampler), loader.dataset)
    if len(loader) == 0 and len(loader.dataset) > 0:
        raise PreflightError(
            f"drop_last=True with batch_size={loader.batch_size} leaves no batch of {len(loader.dataset)} examples: expected "
            "at least one. An epoch has len(train_dataloader) steps, so nothing would be trained. Give drop_last=False, or a "
            "smaller batch_size."
        )
    return loader


def check_not_nested(given: object, loader: object) -> None:
    """Refuse a training loader in a list, dict or ``CombinedLoader``.

    Args:
        given: the Trainer's ``train_dataloader``.
        loader: the private one, made of the loader that was found.

    Raises:
        PreflightError: they are not the same.
    """
    if given is not loader:
        raise PreflightError(
            f"train_dataloader nested in a {type(given).__name__}: expected the DataLoader itself. Pass the loader "
            "without a list, dict or CombinedLoader around it."
        )


def _check_sampler(sampler: Any, dataset: Any) -> None:
    """Refuse a sampler under which examples are not all drawn, or not all as often."""
    name, size = type(sampler).__name__, len(dataset)
    if isinstance(sampler, RandomSampler) and type(sampler) is RandomSampler:
        if not sampler.replacement and sampler.num_samples == size:
            return
        remedy = "Remove the sampler"
        if sampler.num_samples < size:
            remedy = (
                "To train on a part, the same in every epoch, give torch.utils.data.Subset(dataset, indices) without the "
                f"sampler; for epochs of {sampler.num_samples} of all {size} examples, shuffle=True and Trainer("
                "limit_train_batches=...)"
            )
        raise PreflightError(
            f"sampler={name}(replacement={sampler.replacement}, num_samples={sampler.num_samples}): expected none "
            f"(shuffle=True or False). Poisson sampling draws from all {size} examples, each with the same probability. "
            f"{remedy}."
        )
    if type(sampler) in (SequentialSampler, DistributedSampler):
        return
    if _chooses_a_part(sampler, size):
        raise PreflightError(
            f"sampler={name} over a part of the {size} examples: expected none, with a dataset of that part. Poisson sampling "
            "draws from the whole dataset, and without the sampler it would train on what was left out too, such as a "
            "validation part. Give DataLoader(torch.utils.data.Subset(dataset, indices), shuffle=True) with the sampler's "
            "indices."
        )
    raise PreflightError(
        f"sampler={name}: expected none (shuffle=True or False). Every example must be drawn with "
        "the same probability, or the ε reported is wrong for the examples drawn more often. Remove the sampler; to "
        "weight examples, weight their losses. If it leaves examples out, give torch.utils.data.Subset(dataset, indices)."
    )


def _chooses_a_part(sampler: Any, size: int) -> bool:
    """Whether a sampler of indices without repetition leaves some out, by what it says of itself."""
    if getattr(sampler, "replacement", False) or hasattr(sampler, "weights"):
        return False
    indices = getattr(sampler, "indices", None)
    try:
        return len(indices if indices is not None else sampler) < size
    except TypeError:
        return False
