"""Turn a file of weights that the authors of jax_privacy released into arrays that need no unpickling, once.

    python convert_released_weights.py wrn_28_10_imagenet32.dill wrn_28_10_imagenet32.npz

Run it in an environment of its own, apart from private data: **reading a .dill file runs whatever code is in it**, so get it
from where the authors keep it and from nowhere else. A .dill file (the release of the paper) needs dill, numpy and jax; a
folder, which later releases are, needs orbax-checkpoint. What it writes holds numbers alone, under the authors' names joined
by slashes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np


def read(path: Path) -> Any:
    """What the authors saved."""
    if path.is_dir():
        import orbax.checkpoint

        return orbax.checkpoint.PyTreeCheckpointer().restore(path.absolute())
    import dill

    with path.open("rb") as file:
        return dill.load(file)


def parameters(saved: Any) -> Mapping[str, Any]:
    """The tree of parameters in it: under ``params``, or the whole; from a pair with the network's state, the first."""
    if isinstance(saved, (tuple, list)):
        saved = saved[0]
    return saved.get("params", saved)


def flat(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested dictionaries, and their keys joined by slashes."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from flat(value, f"{name}/{key}" if name else str(key))
    else:
        yield name, tree


def convert(saved: Any, to: Path) -> list[str]:
    """Write the parameters as float32 and return their names.

    Raises:
        ValueError: there is nothing, or something that is no array of finite numbers; it is named.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in flat(parameters(saved))}
    odd = [name for name, array in arrays.items() if array.dtype.kind != "f" or not np.isfinite(array).all()]
    if odd or not arrays:
        raise ValueError(f"expected finite numbers alone, got {', '.join(odd) or 'nothing'}")
    np.savez(to, **{name: array.astype(np.float32) for name, array in arrays.items()})
    return sorted(arrays)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    print("\n".join(convert(read(source), target)))
