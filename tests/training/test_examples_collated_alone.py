"""Batches that no axis describes: graphs joined into one, objects, constants, episodes. Every example is collated by itself."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy
from lightning_dp.batches.axis import to_front
from lightning_dp.batches.microbatch import BatchAxisError
from tests.conftest import Regressor, trainer, weights
from tests.guarantees.mutations import caught, patched

CLIP, STEPS, COUNT = 0.3, 2, 9


class Graph:
    def __init__(self, x: Tensor, edge_index: Tensor, y: Tensor) -> None:
        self.x, self.edge_index, self.y = x, edge_index, y


class Graphs:
    """Graphs joined into one, as torch_geometric's ``Batch`` has them."""

    def __init__(self, x: Tensor, edge_index: Tensor, y: Tensor, batch: Tensor, ptr: Tensor) -> None:
        self.x, self.edge_index, self.y, self.batch, self.ptr = x, edge_index, y, batch, ptr
        self._num_graphs = len(ptr) - 1

    @property
    def num_graphs(self) -> int:
        return self._num_graphs

    @classmethod
    def from_data_list(cls, graphs: list[Graph]) -> Graphs:
        sizes = torch.tensor([len(graph.x) for graph in graphs])
        ptr = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        edges = torch.cat([graph.edge_index + start for graph, start in zip(graphs, ptr[:-1], strict=True)], 1)
        of = torch.repeat_interleave(torch.arange(len(graphs)), sizes)
        return cls(torch.cat([graph.x for graph in graphs]), edges, torch.stack([g.y for g in graphs]), of, ptr)

    def to_data_list(self) -> list[Graph]:
        raise NotImplementedError


class Index:
    """As pandas' own: neither a tensor nor a list."""

    def __init__(self, values: list[Any]) -> None:
        self.values = tuple(values)

    def __len__(self) -> int:
        return len(self.values)


def graph(index: int, generator: torch.Generator) -> Graph:
    nodes = 1 + index % 3
    return Graph(
        torch.randn(nodes, 4, generator=generator),
        torch.randint(nodes, (2, nodes), generator=generator),
        torch.randn((), generator=generator),
    )


def pair(index: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(4, generator=generator), torch.randn((), generator=generator)


def episode(index: int, generator: torch.Generator) -> dict[str, Any]:
    """A support set to adapt on and a query set to be judged by, of two and three rows."""
    support, query = (torch.randn(rows, 4, generator=generator) for rows in (2, 3))
    return {"support": (support, support.sum(1)), "query": (query, query.sum(1)), "task": f"task {index}"}


def records(kind: Any) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [kind(index, generator) for index in range(COUNT)]


def stacked(rows: list[Any]) -> dict[str, Any]:
    return {"x": torch.stack([x for x, _ in rows]), "y": torch.stack([y for _, y in rows])}


class Base(Regressor):
    def mean(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(self.net(x).squeeze(-1), y)

    def loss(self, batch: Any) -> Tensor:
        return self.mean(batch["x"], batch["y"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


class OnGraphs(Base):
    def loss(self, batch: Any) -> Tensor:
        part = (lambda name: batch[name]) if isinstance(batch, dict) else (lambda name: getattr(batch, name))
        x, edges = part("x"), part("edge_index")
        hidden = x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
        graphs = torch.zeros(len(part("y")), 4).index_add(0, part("batch"), hidden)
        return self.mean(graphs, part("y"))


class WithIndex(Base):
    def loss(self, batch: Any) -> Tensor:
        assert len(batch["index"]) == len(batch["x"])
        return super().loss(batch) * (1 + batch["index"].values[0])


class WithArray(Base):
    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) * float(batch["array"][0])


class WithConstants(Base):
    def loss(self, batch: Any) -> Tensor:
        height, width = batch["size"]
        return super().loss(batch) * height / width * batch["table"][2]


class OnTexts(Base):
    def loss(self, batch: Any) -> Tensor:
        x = torch.stack([torch.tensor([float(len(text)), 1.0, 0.5, -0.5]) for text in batch])
        return self.mean(x, x.sum(1))


class Adapting(Base):
    """One gradient step on the support set, then the loss on the query set, differentiated through the step."""

    def loss(self, batch: Any) -> Tensor:
        inner = self.mean(*batch["support"])
        names, parameters = zip(*self.net.named_parameters(), strict=True)
        steps = torch.autograd.grad(inner, parameters, create_graph=True)
        adapted = {name: p - 0.1 * step for name, p, step in zip(names, parameters, steps, strict=True)}
        x, y = batch["query"]
        return nn.functional.mse_loss(torch.func.functional_call(self.net, adapted, (x,)).squeeze(-1), y)


def as_dict(rows: list[Graph]) -> dict[str, Any]:
    return dict(vars(Graphs.from_data_list(rows)))


def own_index(rows: list[Any]) -> dict[str, Any]:
    return {**stacked(rows), "index": Index([float(y) for _, y in rows])}


def own_array(rows: list[Any]) -> dict[str, Any]:
    return {**stacked(rows), "array": np.array([float(y) for _, y in rows])}


def constants(rows: list[Any]) -> dict[str, Any]:
    return {**stacked(rows), "size": (8, 4), "table": torch.arange(5.0), "names": ["a", "b", "c", "d", "e"]}


def texts(rows: list[Any]) -> list[str]:
    return [row["task"] * (1 + index % 3) for index, row in enumerate(rows)]


def first(rows: list[Any]) -> Any:
    return rows[0]


CASES: dict[str, Any] = {
    "graphs with to_data_list": (OnGraphs, graph, Graphs.from_data_list, 0),
    "graphs in a dict with ptr": (OnGraphs, graph, as_dict, 0),
    "an index of a table's rows": (WithIndex, pair, own_index, 0),
    "an array": (WithArray, pair, own_array, 0),
    "constants": (WithConstants, pair, constants, 0),
    "texts alone": (OnTexts, episode, texts, 0),
    "episodes": (Adapting, episode, first, "each"),
}


def made(kind: type[Base]) -> Base:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind()


def by_hand(kind: type[Base], rows: list[Any], collate: Any) -> Tensor:
    module = made(kind)
    parameters = list(module.parameters())
    for _ in range(STEPS):
        total = torch.zeros_like(weights(module))
        for row in rows:
            gradients = torch.autograd.grad(module.loss(collate([row])), parameters)
            flat = torch.cat([g.flatten() for g in gradients])
            total += flat * min(1.0, CLIP / float(flat.norm()))
        nn.utils.vector_to_parameters(weights(module) - module.lr * total / COUNT, parameters)
    return weights(module)


def fitted(module: Base, rows: list[Any], collate: Any, expected: int = COUNT, **options: Any) -> Tensor:
    private = DifferentialPrivacy(noise_multiplier=0.0, clip_norm=CLIP, expected_batch_size=expected, **options)
    trainer(private, max_steps=STEPS).fit(module, DataLoader(rows, batch_size=3, collate_fn=collate))
    return weights(module)


@pytest.mark.parametrize("size", [None, 4, 1])
@pytest.mark.parametrize("name", CASES)
def test_training_is_that_of_examples_collated_alone(name: str, size: int | None) -> None:
    kind, record, collate, axis = CASES[name]
    rows = records(record)
    found = fitted(made(kind), rows, collate, batch_axis=axis, physical_batch_size=size)
    # float32, sums of nine gradients in one order or another
    torch.testing.assert_close(found, by_hand(kind, rows, collate), rtol=1e-5, atol=1e-6)


def test_it_is_said_and_why(caplog: pytest.LogCaptureFixture) -> None:
    fitted(made(WithIndex), records(pair), own_index)
    assert "which part of batch['index'], of type Index, belongs to which example is not known" in caplog.text
    assert re.search(r"engine +loop", caplog.text)


def test_a_remedy_that_a_refusal_names_works() -> None:
    rows = records(episode)
    with pytest.raises(BatchAxisError, match=r"expected 2 rows.*'each' to have collate_fn called for every example"):
        fitted(made(Adapting), [{**row, "support": row["query"]} for row in rows], first)
    fitted(made(Adapting), rows, first, batch_axis="each")


def test_an_episode_with_as_many_rows_as_examples_is_not_taken_for_a_batch() -> None:
    """Two rows of one task in a micro-batch of two: the third record tells."""
    with pytest.raises(BatchAxisError, match="has shape"):
        fitted(
            made(Adapting), [{"support": row["support"], "query": row["support"]} for row in records(episode)], first
        )


def test_users_with_several_examples_are_refused_by_name() -> None:
    owners = [index // 3 for index in range(COUNT)]
    with pytest.raises(BatchAxisError, match=r"a user brings up to \d+ examples: expected.*max_examples_per_unit=1"):
        fitted(made(WithIndex), records(pair), own_index, expected=3, privacy_unit=owners)


def test_no_views_are_made_of_what_has_no_rows() -> None:
    module, private = made(OnGraphs), DifferentialPrivacy(noise_multiplier=1.0)
    with pytest.raises(BatchAxisError, match=r"AugmentationMultiplicity with examples that are collated one by one"):
        trainer(private, AugmentationMultiplicity(2), max_steps=1).fit(
            module,
            DataLoader(records(graph), batch_size=3, collate_fn=Graphs.from_data_list),
        )


class Tokenizer:
    """Something of a user's, that all examples share."""

    def __init__(self) -> None:
        self.scale, self.seen = 2.0, []


class WithShared(Base):
    """Writes into what is shared, and would see what others have written."""

    def loss(self, batch: Any) -> Tensor:
        tokenizer = batch["shared"]["tokenizer"]
        tokenizer.seen.append(1)
        batch["names"].append("another")
        scale = tokenizer.scale * len(batch["names"]) * batch["shared"]["table"].sum() * len(tokenizer.seen)
        batch["shared"]["table"].mul_(3)
        return super().loss(batch) * scale


def shared(rows: list[Any]) -> dict[str, Any]:
    fixed = {"tokenizer": Tokenizer(), "table": torch.arange(4.0), "flag": None}
    return {**stacked(rows), "shared": fixed, "names": ["a", "b"]}


@pytest.mark.parametrize("engine", ["auto", "loop"])
def test_anything_may_be_said_to_be_shared(engine: str) -> None:
    rows = records(pair)
    found = fitted(made(WithShared), rows, shared, batch_axis={"shared": None, "names": None}, engine=engine)
    torch.testing.assert_close(found, by_hand(WithShared, rows, shared), rtol=1e-5, atol=1e-6)


def test_what_is_shared_does_not_cost_the_fast_engine(caplog: pytest.LogCaptureFixture) -> None:
    fitted(made(WithConstants), records(pair), constants, batch_axis={"size": None, "table": None, "names": None})
    assert re.search(r"engine +ghost", caplog.text)


def test_shared_objects_are_marked_and_tensors_repeated() -> None:
    marked = to_front(shared(records(pair)), {"shared": None, "names": None})
    assert marked["names"].content == ["a", "b"]
    assert marked["shared"]["table"].shape == (COUNT, 4)


class WritesIntoItsBatch(Base):
    def loss(self, batch: Any) -> Tensor:
        batch["x"].mul_(2)
        batch["y"] += 1
        batch["extra"] = batch["x"]
        return self.mean(batch["extra"], batch["y"])


@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
def test_a_training_step_may_write_into_its_batch(engine: str) -> None:
    rows = [(x.clone(), y.clone()) for x, y in records(pair)]
    found = fitted(made(WritesIntoItsBatch), rows, stacked, engine=engine)
    torch.testing.assert_close(found, by_hand(WritesIntoItsBatch, records(pair), stacked), rtol=1e-5, atol=1e-6)


class ByHandTwice(WritesIntoItsBatch):
    """Two private optimizers, so that the sample is gone through twice."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(loss, retain_graph=True)
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[layer].parameters(), lr=0.5) for layer in (0, 2)]


def twice_the_same() -> None:
    """Both passes see the batch as it came: the sum of both steps is that of one step with all parameters."""
    rows = records(pair)
    module = made(ByHandTwice)
    before = weights(module)
    private = DifferentialPrivacy(noise_multiplier=0.0, clip_norm=torch.inf, expected_batch_size=COUNT, engine="loop")
    trainer(private, max_steps=2).fit(module, DataLoader(rows, batch_size=3, collate_fn=stacked))
    reference = made(WritesIntoItsBatch)
    loss = reference.loss(stacked(rows))
    moved = torch.cat([0.5 * g.flatten() for g in torch.autograd.grad(loss, list(reference.parameters()))])
    torch.testing.assert_close(before - weights(module), moved, rtol=1e-4, atol=1e-6)


def test_a_second_pass_finds_the_batch_as_it_came() -> None:
    twice_the_same()
    from lightning_dp.engines import loop

    def a_view(batch: Any, index: int) -> Any:
        return torch.utils._pytree.tree_map(lambda leaf: leaf[index : index + 1], batch)

    with caught(patched((loop, "batch_of_one", a_view))):
        twice_the_same()
