"""GPT-2: small and from scratch, or with its public weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_dp.models.extra import import_extra
from lightning_dp.models.fused_cross_entropy import fused_cross_entropy
from lightning_dp.models.public_weights import FILES, WeightsError, load_public_weights

SIZES = {"vocabulary": 768, "width": 128, "depth": 4, "heads": 4, "positions": 128}
"""Of the small network, where nothing else is said."""

_NAMES = {
    "vocabulary": "vocab_size",
    "width": "n_embd",
    "depth": "n_layer",
    "heads": "n_head",
    "positions": "n_positions",
}


class GPT2(nn.Module):
    """The GPT-2 of transformers, with its output layer tied to its embedding, and without dropout.

    Args:
        init_from: ``None`` for random weights; a file of weights of such a network, as
            :func:`~lightning_dp.models.public_weights.load_public_weights` takes it (a checkpoint of a run, say); or the name
            or the folder of a GPT-2 in transformers' form, such as ``"gpt2"``, downloaded on first use. The weights must be
            public.
        vocabulary: words of the vocabulary. This and the next four: ``None`` for those of a pre-trained GPT-2, or for
            :data:`SIZES`.
        width: of the hidden states.
        depth: the number of blocks.
        heads: of each attention.
        positions: the longest text.
        checkpointing: keep no activations inside the blocks, and compute them again in the backward pass. The engines
            ``ghost`` and ``vmap`` cannot run that, so training takes ``loop``: for single texts that do not fit. Where a batch
            does not fit, a smaller ``physical_batch_size`` is faster.
        chunk: positions whose logits are in memory at once, see
            :func:`~lightning_dp.models.fused_cross_entropy.fused_cross_entropy`; 0 for all. Needs a frozen embedding.

    Raises:
        ValueError: a size is below 1, or differs from that of the pre-trained network.
        WeightsError: the weights do not fit or cannot be downloaded.
        MissingExtraError: transformers is not installed.

    Example:
        >>> import torch
        >>> network = GPT2(vocabulary=50, width=8, depth=1, heads=2, positions=16)
        >>> network.losses(torch.zeros(2, 5).long(), torch.zeros(2, 5).long()).shape
        torch.Size([2, 4])

    Source: A. Radford et al., *Language Models are Unsupervised Multitask Learners*, 2019.
    """

    def __init__(
        self,
        init_from: str | None = None,
        vocabulary: int | None = None,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        positions: int | None = None,
        checkpointing: bool = False,
        chunk: int = 0,
    ) -> None:
        super().__init__()
        self.gpt: Any
        given = {"vocabulary": vocabulary, "width": width, "depth": depth, "heads": heads, "positions": positions}
        sizes = {name: value for name, value in given.items() if value is not None}
        for name, value in {**sizes, "chunk": chunk + 1}.items():
            if value < 1:
                raise ValueError(f"{name}={given.get(name, chunk)}: expected a positive number. Give one such as 64.")
        is_file = init_from is None or Path(init_from).suffix in FILES
        gpt: Any = _built(sizes) if is_file else _pretrained(str(init_from), sizes)
        self.gpt, self.chunk = gpt, chunk
        if init_from is not None and is_file:
            load_public_weights(self, init_from)
        if checkpointing:
            enable = getattr(
                gpt, "activation_checkpointing_enable", gpt.gradient_checkpointing_enable
            )  # its newer name
            enable({"use_reentrant": False})

    @override
    def forward(self, words: Tensor) -> Tensor:
        """Map texts ``(batch, length)``, filled up behind, to logits of each next word ``(batch, length, vocabulary)``."""
        logits: Tensor = self.gpt(input_ids=words, use_cache=False).logits
        return logits

    def losses(self, words: Tensor, labels: Tensor) -> Tensor:
        """The cross-entropy of each word but the first, ``(batch, length - 1)``; 0 where the label is -100."""
        wanted = labels[:, 1:]
        if self.chunk:
            hidden = self.gpt.transformer(input_ids=words, use_cache=False).last_hidden_state[:, :-1]
            return fused_cross_entropy(hidden, self.gpt.lm_head.weight, wanted, self.chunk)
        logits = self(words)[:, :-1]
        return F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")

    def write(self, words: Tensor, mask: Tensor, longest: int, end: int) -> Tensor:
        """Go on writing, each time with the likeliest word.

        Args:
            words: the beginnings, ``(batch, length)``, filled up in front.
            mask: 0 where filled up.
            longest: how many words to write at most.
            end: the mark of an end.

        Returns:
            What was written, ``(batch, at most longest)``.
        """
        room = min(longest, self.gpt.config.n_positions - words.shape[1])
        whole: Tensor = self.gpt.generate(
            words, attention_mask=mask, max_new_tokens=room, do_sample=False, pad_token_id=end, eos_token_id=end
        )
        return whole[:, words.shape[1] :]


def _transformers(because: str) -> Any:
    return import_extra("transformers", "text", because)


def _built(sizes: dict[str, int]) -> nn.Module:
    transformers = _transformers("GPT2 is that of transformers")
    wanted = {_NAMES[name]: value for name, value in {**SIZES, **sizes}.items()}
    if wanted["n_embd"] % wanted["n_head"]:
        raise ValueError(
            f"width={wanted['n_embd']} with heads={wanted['n_head']}: expected heads to divide width, such as 128 and 4."
        )
    config = transformers.GPT2Config(**wanted, **_DRY, bos_token_id=0, eos_token_id=0)
    network: nn.Module = transformers.GPT2LMHeadModel(config)
    return network


def _pretrained(name: str, sizes: dict[str, int]) -> nn.Module:
    transformers = _transformers(f"init_from={name!r}: its weights are read by transformers")
    try:
        network: nn.Module = transformers.GPT2LMHeadModel.from_pretrained(name, **_DRY, use_safetensors=True)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"init_from={name!r} could not be read or downloaded ({type(error).__name__}): expected the name of a GPT-2 and a "
            "connection, its folder in transformers' form with model.safetensors, or a file of weights "
            f"({', '.join(FILES)}). Download it elsewhere and give its folder."
        ) from error
    found: Any = network.config
    wrong = [f"{key}={value}" for key, value in sizes.items() if getattr(found, _NAMES[key]) != value]
    if wrong:
        own = ", ".join(f"{key}={getattr(found, _NAMES[key])}" for key in sizes)
        raise ValueError(f"{', '.join(wrong)}: expected the sizes of {name!r}, which are {own}. Leave them out.")
    return network


_DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
