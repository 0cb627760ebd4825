"""Norms and weighted sums of all parameters' contributions by few calls, each of which has a cost of its own.

Small gradients that are written out, of biases and normalisations, lie side by side in one matrix, whose norms and weighted sum
are those of them all. Of large ones, the norms of blocks are taken one by one, and the rest together. Gram matrices of
equally many positions lie one behind the other, and their norms are found at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.contribution import Contribution, Factored, Norms, Written, gram_norms
from lightning_dp.mechanism.clip import accumulation_dtype, row_norms_together

SMALL = 4096
"""Gradients of so many numbers an example are copied next to each other."""

AT_ONCE = {"cpu": 2**20}
"""So many numbers of Gram matrices lie in memory at once, on a CPU no more than its cache holds."""

AT_ONCE_ELSEWHERE = 2**25


class Together:
    """The contributions to all parameters.

    Args:
        contributions: by name of the parameter, in the parameters' order.
        layers: name → the layer whose norm it counts in, for the names of all trainable parameters.
        buffers: memory for Gram matrices.
    """

    def __init__(self, contributions: Mapping[str, Contribution], layers: Mapping[str, str], buffers: Buffers) -> None:
        self.by_name, self._layers, self._buffers = dict(contributions), layers, buffers
        self._bundles: list[tuple[list[str], Tensor]] = []
        small: dict[tuple[str, torch.dtype], list[str]] = defaultdict(list)
        for name, one in contributions.items():
            if isinstance(one, Written) and 0 < one.flat.shape[1] <= SMALL:
                small[layers[name], one.flat.dtype].append(name)
        for names in small.values():
            if len(names) > 1:
                self._put_together(names)

    def _put_together(self, names: list[str]) -> None:
        rows = [self.by_name[name].rows() for name in names]
        flat = [one.flatten(1) if one.ndim > 1 else one.unsqueeze(1) for one in rows]
        matrix = torch.cat(flat, dim=1)
        self._bundles.append((names, matrix))
        parts = torch.split(matrix, [one.shape[1] for one in flat], dim=1)
        for name, part, one in zip(names, parts, rows, strict=True):
            self.by_name[name] = Written(part.view(one.shape))

    def norms(self) -> dict[str, Norms]:
        """Norms of the contributions to each layer, under the name of one of the parameters that they are of."""
        found: dict[str, Norms] = {}
        written: dict[str, list[str]] = defaultdict(list)
        grams: dict[tuple[object, ...], list[str]] = defaultdict(list)
        bundled = {name: place for place, (names, _) in enumerate(self._bundles) for name in names}
        for name, one in self.by_name.items():
            if isinstance(one, Written):
                written[self._layers[name]].append(name)
            elif isinstance(one, Factored) and one.grams is not None:
                grams[self._layers[name], *one.gram_space()].append(name)
            else:
                found[name] = one.norms()
        for names in written.values():
            places = sorted({bundled[name] for name in names if name in bundled})
            rows = [self._bundles[place][1] for place in places]
            rows += [
                one.flat for name in names if name not in bundled and isinstance(one := self.by_name[name], Written)
            ]
            found[names[0]] = Norms(row_norms_together(rows))
        for names in grams.values():
            factored = [one for name in names if isinstance(one := self.by_name[name], Factored)]
            for name, part in zip(names, self._in_parts(factored), strict=False):  # any of the layer's names will do
                found[name] = self._norms_of(part)
        return found

    def _in_parts(self, given: list[Factored]) -> Iterator[list[Factored]]:
        """So many at a time that their Gram matrices do not take too much memory."""
        examples, positions, _, device = given[0].gram_space()
        most = AT_ONCE.get(device.type, AT_ONCE_ELSEWHERE)
        at_a_time = max(1, most // max(1, 2 * examples * positions**2))
        return (given[place : place + at_a_time] for place in range(0, len(given), at_a_time))

    def _norms_of(self, given: list[Factored]) -> Norms:
        examples, positions, dtype, device = given[0].gram_space()
        like = torch.empty(0, dtype=dtype, device=device)
        with self._buffers.lent_meanwhile():
            space = self._buffers.take((2, len(given), examples, positions, positions), like)
            for place, one in enumerate(given):
                one.write_grams(space[0, place], space[1, place])
            return gram_norms(space, [(one.grams.of_inputs, one.grams.of_gradients) for one in given if one.grams])

    def weighted_sums(self, factors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Σ factors[i] · gradient i of each parameter, in their order, in the accumulation type. Once: they are dropped."""
        small: dict[str, Tensor] = {}
        for names, matrix in self._bundles:
            weights = factors[names[0]]
            wide = matrix.to(accumulation_dtype(matrix.dtype))
            total = weights.to(wide.dtype) @ wide
            shapes = [self.by_name[name].rows().shape[1:] for name in names]
            parts = torch.split(total, [shape.numel() for shape in shapes])
            small |= {name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}
        self._bundles = []
        for name in list(self.by_name):
            one = self.by_name.pop(name)
            yield name, small.pop(name) if name in small else one.weighted_sum(factors[name])

    def without(self, broken: Tensor) -> Together:
        """The same with zeros for the examples where ``broken``, ``(B,)``, is true."""
        return Together({name: one.without(broken) for name, one in self.by_name.items()}, self._layers, self._buffers)
