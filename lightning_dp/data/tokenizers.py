"""Text to numbers and back, by vocabularies that are public."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from lightning_dp.data.images import DataError
from lightning_dp.data.made_up_restaurants import made_up_restaurants
from lightning_dp.models.extra import import_extra

MADE_UP = "made-up"
MADE_UP_WORDS = 768
"""The size of the vocabulary that is made on the spot: 256 bytes, the mark of an end, and pieces of words."""

END = "<|endoftext|>"
"""GPT-2's mark of an end, which also fills what is behind it."""


def load_tokenizer(source: str | Path) -> Any:
    """A tokenizer of the package ``tokenizers``.

    **The vocabulary must be public.** One that is made from the private texts says which words are in them, and nothing
    protects it.

    Args:
        source: a file ``tokenizer.json``, a folder with one, the name of a model such as ``"gpt2"`` (downloaded on first use),
            or ``"made-up"``: byte pairs learnt on the spot from 2,000 pairs of
            :func:`~lightning_dp.data.made_up_restaurants.made_up_restaurants`, half of each style, of a seed that no data
            module uses. It can write any text.

    Raises:
        DataError: there is no such file, or it cannot be downloaded.
        MissingExtraError: ``tokenizers`` is not installed.

    Example:
        >>> tokenizer = load_tokenizer("made-up")
        >>> tokenizer.decode(tokenizer.encode("Zoë's café, 5 €").ids)
        "Zoë's café, 5 €"
    """
    tokenizers = import_extra("tokenizers", "text", "Texts are split by tokenizers")
    if str(source) == MADE_UP:
        return tokenizers.Tokenizer.from_str(_made_up())  # one of its own: whoever has it may have it cut texts off
    path = Path(source)
    path = path / "tokenizer.json" if path.is_dir() else path
    if path.is_file():
        return tokenizers.Tokenizer.from_file(str(path))
    if path.suffix or path.is_absolute():
        raise DataError(
            f"tokenizer={str(source)!r}: expected a file tokenizer.json, or a folder with one. Give its path."
        )
    try:
        return tokenizers.Tokenizer.from_pretrained(str(source))
    except Exception as error:  # of the Rust below, all of one kind
        raise DataError(
            f"tokenizer={str(source)!r} could not be downloaded ({type(error).__name__}): expected a connection, a file "
            f"tokenizer.json or a folder with one, or {MADE_UP!r}. Download it elsewhere and give its folder."
        ) from error


def end_of(tokenizer: Any) -> int:
    """The number of the mark of an end.

    Raises:
        DataError: the vocabulary has none.
    """
    for mark in (END, "</s>", "[SEP]"):
        found: int | None = tokenizer.token_to_id(mark)
        if found is not None:
            return found
    raise DataError(
        f"tokenizer: its vocabulary has none of the marks {END}, </s> and [SEP]: expected one, to end a text with. Use that of "
        f"GPT-2, or {MADE_UP!r}."
    )


@lru_cache(maxsize=1)
def _made_up() -> str:
    tokenizers = import_extra("tokenizers", "text", "Texts are split by tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=MADE_UP_WORDS,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    public = made_up_restaurants(1000, seed=0, style="guide") + made_up_restaurants(1000, seed=0, style="local")
    tokenizer.train_from_iterator((f"{meaning}\n{text}" for meaning, text in public), trainer)
    written: str = tokenizer.to_str()
    return written
