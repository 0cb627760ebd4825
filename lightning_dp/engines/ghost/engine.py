"""One forward and one backward pass over the plain batch, each layer's share of the norms, and one weighted sum."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils import _pytree as pytree

from lightning_dp.batches.microbatch import batch_of_one
from lightning_dp.engines.decisions import PartingError, answered_for_all
from lightning_dp.engines.drawing import Drawing, Draws
from lightning_dp.engines.examples import mappable
from lightning_dp.engines.forms import Forms
from lightning_dp.engines.ghost.attention import folded_attention
from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.call import Deliver, Pass
from lightning_dp.engines.ghost.contribution import Contribution, Norms, Written, merged
from lightning_dp.engines.ghost.coverage import used_by_rules_alone
from lightning_dp.engines.ghost.layers import book_keeping_forward, operands_of, replaced, trainable_of
from lightning_dp.engines.ghost.lost import uncertain
from lightning_dp.engines.ghost.registry import Forward, composite_rule_of, rule_of
from lightning_dp.engines.ghost.reparametrised import Leaves, computes_its_weight, intercepting_forward
from lightning_dp.engines.ghost.standardisation import Recognised
from lightning_dp.engines.ghost.together import Together
from lightning_dp.engines.groups import Groups, joined
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import ClippedSum, Engine, LossFunction, first_rows, scalar_loss
from lightning_dp.engines.uncompiled import uncompiled
from lightning_dp.mechanism.adaptive import summed_beside
from lightning_dp.mechanism.clip import Factors, accumulation_dtype, clip_scaled
from lightning_dp.mechanism.full_precision import full_precision
from lightning_dp.mechanism.put_off import put_off
from lightning_dp.plan.clipping import Clipping, as_clipping


class GhostEngine(Engine):
    """Book-keeping: no gradient of the batch's weights is computed, and no gradient of any example twice.

    The loss function runs once, under ``torch.func.vmap``, on batches of one as with every engine: each example has a
    loss of its own and cannot see another's data, whatever the loss. But layers with a rule step below vmap and compute
    the batch's output with the plain kernel and without a graph for their parameters. Autograd then brings the gradient
    of each layer's output, for all examples in one backward pass over the activations; from that and the layer's input
    come each example's norm and, after clipping, the weighted sum.

    The module's own parameters are, during the pass, copies per example (views, without memory). Whatever uses them
    outside a rule, a layer of another kind, a tied or a single parameter, gets its gradient through those copies, as
    under the engine ``vmap``. So nothing is left out, and a rule's share and another's add up.

    Memory: a layer's gradients of all examples, or its inputs and output gradients where those are smaller.

    Args:
        module: the module whose layers the loss function calls.

    Source: Bu, Wang, Zha, Karypis 2022 (arXiv 2210.00038); Li, Tramèr, Liang, Hashimoto 2021 (arXiv 2110.05679);
    Bu, Mao, Xu 2022 (arXiv 2205.10683).
    """

    name = "ghost"
    brings_layers = True

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.groups, self._drawing, self._loop = Groups(), Drawing(), LoopEngine(in_place_of_others=True)
        self._per_example: set[nn.Module] = set()
        self._handled: dict[str, str] = {}
        self.forms = Forms()
        self._buffers = Buffers(self.forms)
        self._recognised = Recognised()

    @property
    def handled(self) -> dict[str, str]:
        """Trainable parameter → how its gradient was found in the last pass."""
        return dict(self._handled)

    @property
    def partings(self) -> list[PartingError]:
        """See :class:`lightning_dp.engines.protocol.Engine`."""
        return self.groups.partings

    def bringable(self) -> set[str]:
        """See :func:`lightning_dp.engines.ghost.coverage.used_by_rules_alone`."""
        return used_by_rules_alone(self.module, self._handled)

    def clipped_sum(
        self,
        loss_function: LossFunction,
        parameters: Mapping[str, Tensor],
        batch: Any,
        examples: int,
        clipping: Clipping | float,
        *,
        counted: int | None = None,
    ) -> ClippedSum:
        """See :class:`lightning_dp.engines.protocol.Engine`."""

        def one_by_one(rows: Any, count: int) -> ClippedSum:
            if self.keeper is not None:  # the loop needs all parameters
                return joined([at_once(batch_of_one(rows, index), 1, None) for index in range(count)])
            return self._loop.clipped_sum(loss_function, parameters, rows, count, clipping)

        if self.keeper is not None:
            self._drawing.always()  # a pass that is made again is one that other ranks do not make

        def at_once(rows: Any, count: int, counted: int | None) -> ClippedSum:
            with ExitStack() as stack:
                if self.keeper is not None:  # no pass is made again
                    stack.enter_context(put_off(later=False))
                    stack.enter_context(self.keeper.one_pass())
                return self._drawing.one_pass(
                    rows,
                    lambda content, draws: self._at_once(
                        loss_function, parameters, content, count, clipping, counted, draws
                    ),
                )

        return self.groups.clipped_sum(at_once, one_by_one, batch, examples, counted)

    def _at_once(
        self,
        loss_function: LossFunction,
        parameters: Mapping[str, Tensor],
        batch: Any,
        examples: int,
        clipping: Clipping | float,
        counted: int | None,
        draws: Draws,
    ) -> ClippedSum:
        """The clipped sum of examples that decide alike."""
        tensors, example = mappable(batch, examples)
        self._buffers.take_back()  # also what an earlier call that failed half-way left behind
        while True:
            books = self._run(loss_function, parameters, tensors, example, examples, draws)
            if not books.escaped:
                break
            self._buffers.take_back()
            self._per_example |= books.escaped
        self._handled = {name: " + ".join(sorted(books.handled.get(name, {"not used"}))) for name in parameters}
        gradient, norms = self._clipped(books, parameters, as_clipping(clipping), counted)
        self._buffers.take_back()
        return ClippedSum(gradient, norms[:counted], books.losses[:counted], first_rows(books.outputs, counted))

    @full_precision()
    def _clipped(
        self, books: _Books, parameters: Mapping[str, Tensor], clipping: Clipping, counted: int | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The sums of what is in the books, clipped, and the norms before."""
        layers = clipping.layers(parameters)
        merged_by_name = {name: merged(books.by_name[name]) for name in parameters if name in books.by_name}
        contributions = Together(merged_by_name, layers, self._buffers)
        books.by_name.clear()
        del merged_by_name
        found = contributions.norms() or _no_norms(parameters, books.losses)
        factors = Factors.of({name: one.values for name, one in found.items()}, parameters, clipping, counted)
        missing = [one.lost for one in found.values() if one.lost is not None]
        norms, alone = factors.norms, uncertain(missing, factors.broken, clipping, parameters)
        apart: dict[str, Tensor] = {}
        if alone is not None:
            if self.keeper is None:
                apart, norms = self._written_out(contributions.by_name, parameters, clipping, alone[:counted], norms)
            else:  # whole gradients are what a keeper is there to avoid
                norms = norms.masked_fill(alone, torch.inf)
            contributions = contributions.without(alone)
        gradient, sums, there = {}, contributions.weighted_sums(factors.by_name), list(contributions.by_name)
        for name, parameter in parameters.items():
            dtype = accumulation_dtype(parameter.dtype)
            total = next(sums)[1].to(dtype) if name in there else None
            if total is not None and name in apart:
                total = total + apart[name]
            if self.keeper is not None and name in self.keeper.names:
                self.keeper.add(name, total)
            else:
                gradient[name] = torch.zeros_like(parameter, dtype=dtype).detach() if total is None else total
            del total
        return {**gradient, **summed_beside(norms, clipping, counted)}, norms

    def _written_out(
        self,
        contributions: Mapping[str, Contribution],
        parameters: Mapping[str, Tensor],
        clipping: Clipping,
        alone: Tensor,
        norms: Tensor,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The clipped sums of single examples, whose gradients are written out one after the other, and all norms."""
        sums: dict[str, Tensor] = {}
        norms = norms.clone()
        for index in alone.nonzero().flatten().tolist():
            with self._buffers.lent_meanwhile():
                rows = {
                    name: contributions[name].only(index).rows() if name in contributions else torch.zeros_like(p)[None]
                    for name, p in parameters.items()
                }
                clipped, norms[index : index + 1] = clip_scaled(rows, clipping)
            sums = {name: sums[name] + one if sums else one for name, one in clipped.items()}
        return sums, norms

    def _run(
        self,
        loss_function: LossFunction,
        parameters: Mapping[str, Tensor],
        tensors: list[Tensor],
        example: Any,
        examples: int,
        draws: Draws,
    ) -> _Books:
        """The forward and the backward pass."""
        books = _Books()
        device = tensors[0].device
        witness = torch.zeros(examples, device=device)
        anchor = torch.zeros((), device=device, requires_grad=True)
        of = Pass(anchor, self._buffers)

        def loss_of_one(copies: dict[str, Tensor], rows: list[Tensor], one: Tensor) -> tuple[Tensor, Any]:
            of.witness = one
            with answered_for_all(one), draws():
                loss, outputs = loss_function(copies, example(rows))
            return scalar_loss(loss), outputs

        with uncompiled(), torch.enable_grad():
            copies = {
                name: parameter.detach().requires_grad_().expand(examples, *parameter.shape)
                for name, parameter in parameters.items()
                if self.keeper is None or name not in self.keeper.names
            }
            with self._keeping(books, parameters, of), folded_attention(of):
                losses, outputs = vmap(loss_of_one, in_dims=(0, 0, 0), randomness="different")(copies, tensors, witness)
            if losses.requires_grad:
                self._backward(books, losses, of, copies)
        books.losses = losses.detach()
        books.outputs = pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, outputs)
        return books

    @contextmanager
    def _keeping(self, books: _Books, parameters: Mapping[str, Tensor], of: Pass) -> Iterator[None]:
        """Every layer that can be kept books of, keeping them."""
        named = self.module.named_parameters()
        trainable = {name: p for name, p in named if name in parameters and not p.is_complex()}  # rules are real
        kept = {} if self.keeper is None else dict(self.module.named_parameters())
        kept = {name: p for name, p in kept.items() if self.keeper is not None and name in self.keeper.names}
        names = {id(p): name for name, p in {**kept, **trainable}.items()}
        forwards: dict[nn.Module, Forward] = {}
        covered: set[nn.Module] = set()
        for layer in self.module.modules():
            if layer in covered or layer in self._per_example:
                continue
            own, kind = trainable_of(layer, names), type(layer).__name__
            rule = rule_of(layer) if own else None
            if rule is not None:
                operands = operands_of(own, parameters, partial(books.deliver, how=kind), self.keeper, kept)
                forwards[layer] = book_keeping_forward(layer, rule.operation_of, operands, of)
                continue
            composite = composite_rule_of(layer)
            if composite is None and not computes_its_weight(layer):
                continue
            inside = {part: found for part in layer.modules() if (found := trainable_of(part, names))}
            if inside:
                covered.update(layer.modules())
                all_names = {name for found in inside.values() for name in found.values()}
                how = f"{kind}, from within" if composite is None else kind
                leaves = Leaves(
                    {name: parameters[name] for name in all_names},
                    partial(books.deliver, how=how),
                    self._buffers,
                    self._recognised,
                )
                books.leaves[layer] = leaves
                if composite is None:
                    forwards[layer] = intercepting_forward(layer, inside, leaves, of)
                else:
                    every = layer.named_parameters(remove_duplicate=False)
                    by_place = {place: names[id(p)] for place, p in every if id(p) in names}
                    forwards[layer] = composite.forward(layer, by_place, leaves, of)
        with replaced(forwards):
            yield

    def _backward(self, books: _Books, losses: Tensor, of: Pass, copies: Mapping[str, Tensor]) -> None:
        """Bring each call its output's gradient and each parameter's copies theirs."""
        plain = [(layer, leaf) for layer, leaves in books.leaves.items() for leaf in leaves.by_name.values()]
        given = [(rows, books.deliver(name, how="per example")) for name, rows in copies.items()] + of.copies
        inputs = [of.anchor, *(leaf for _, leaf in plain), *(rows for rows, _ in given)]
        gradients = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
        for (_, deliver), found in zip(given, gradients[1 + len(plain) :], strict=True):
            if found is not None:
                deliver(Written(found))
        for (layer, _), reached in zip(plain, gradients[1:], strict=False):
            if reached is not None:  # a plain parameter was used where nobody kept books: its rows are lost
                books.escaped.add(layer)


@dataclass
class _Books:
    """What one pass leaves behind."""

    by_name: dict[str, list[Contribution]] = field(default_factory=lambda: defaultdict(list))
    leaves: dict[nn.Module, Leaves] = field(default_factory=dict)
    escaped: set[nn.Module] = field(default_factory=set)
    handled: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    losses: Tensor = field(default_factory=lambda: torch.empty(0))
    outputs: Any = None

    def deliver(self, name: str, how: str) -> Deliver:
        """Where the contributions to the parameter ``name`` go that are found in the way ``how``."""

        def receive(contribution: Contribution) -> None:
            self.by_name[name].append(contribution)
            self.handled[name].add(how)

        return receive


def _no_norms(parameters: Mapping[str, Tensor], losses: Tensor) -> dict[str, Norms]:
    """Norms of zero for a loss that depends on no parameter."""
    zeros = torch.zeros_like(losses, dtype=accumulation_dtype(losses.dtype))
    return {name: Norms(zeros) for name in list(parameters)[:1]}
