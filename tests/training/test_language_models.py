"""Language models as people train them: masks, tied embeddings, ignored labels, adapters, frozen low-precision bases."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call

from lightning_dp import DifferentialPrivacy
from lightning_dp.batches.containers import close_containers, open_containers
from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.vmap import VmapEngine
from tests.conftest import loader, trainer
from tests.training.sentences import SENTENCES, VOCABULARY, padded, padded_for_the_next_word

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's own
    pytest.mark.filterwarnings("ignore:The loss of a batch is neither the mean:UserWarning"),  # a mean over tokens
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # torch's attention under plain vmap
]


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def gpt2(dropout: float = 0.0) -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            resid_pdrop=dropout,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def adapted(base: Any | None = None) -> Any:
    adapters = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    return peft.get_peft_model(gpt2() if base is None else base, adapters)


MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "bert": (bert, padded),
    "gpt2": (gpt2, padded_for_the_next_word),
    "lora": (adapted, padded_for_the_next_word),
}


class Model(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sentences", [slice(0, 9), slice(0, 9, 4)])
def test_masked_sentences_of_several_lengths_give_the_loops_gradients(name: str, sentences: slice) -> None:
    """With padding, and where all are of the same length."""
    make, collate = MODELS[name]
    net = seeded(make).double()
    with torch.no_grad():
        for p in net.parameters():  # a matrix of zeros, as LoRA begins with, would hide errors
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=p.dtype), alpha=0.05)
    batch = collate(SENTENCES[sentences])
    examples = len(batch["input_ids"])
    parameters = {n: p for n, p in net.named_parameters() if p.requires_grad}

    def loss(given: Any, example: Any) -> tuple[Tensor, Any]:
        output = functional_call(net, dict(given), (), dict(close_containers(example)))
        return output.loss, {}

    tolerance = 1e-9 if name == "bert" else 1e-6  # a causal language model of transformers has its loss in float32
    results = [
        engine.clipped_sum(loss, parameters, open_containers(batch), examples, 0.1)
        for engine in (LoopEngine(), GhostEngine(net), VmapEngine())
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=tolerance, atol=tolerance)
    assert len({round(norm, 9) for norm in results[0].norms.tolist()}) == examples


def fit(net: Any, **options: Any) -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0, seed=0)
    trainer(private, max_steps=2, **options).fit(
        Model(net), loader(SENTENCES, batch_size=8, collate_fn=padded_for_the_next_word)
    )


def test_with_lora_the_adapters_move_and_the_base_does_not_and_plain_peft_loads_them(tmp_path: Path) -> None:
    net = seeded(adapted)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    fit(net)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name)
    net.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(seeded(gpt2), tmp_path).eval()
    ids = SENTENCES[0]["ids"][None]
    torch.testing.assert_close(again(ids).logits, net.eval()(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_frozen_base_of_low_precision_stays_what_it_is(dtype: torch.dtype) -> None:
    """As in QLoRA: weights that nobody trains, in bf16 or quantised to integers with a scale."""
    net = seeded(adapted)
    if dtype == torch.int8:
        for block in net.base_model.model.transformer.h:
            block.mlp.c_fc = Quantised(block.mlp.c_fc)
    else:
        for parameter in net.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fit(net, precision="bf16-mixed" if dtype == torch.bfloat16 else "32-true")
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "lora_" in name}
    assert {value.dtype for value in net.state_dict().values()} == {torch.float32, dtype}


class Quantised(nn.Module):
    """A frozen layer whose weight is kept in integers."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        scale = layer.weight.detach().abs().max() / 127
        self.register_buffer("weight", (layer.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("bias", layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale) + self.bias


def test_what_writes_text_after_fit_is_the_trained_model() -> None:
    net = seeded(lambda: gpt2(dropout=0.1))
    start = SENTENCES[0]["ids"][None]
    before = net.eval()(start).logits.detach()
    net.train()
    fit(net)
    written = net.eval().generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=4, pad_token_id=0, do_sample=False
    )
    assert torch.equal(written[:, : start.shape[1]], start)
    assert not torch.equal(net(start).logits, before)
    assert net.lm_head.weight is net.transformer.wte.weight
