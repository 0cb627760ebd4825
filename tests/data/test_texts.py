"""Texts from CSV files and made up: what an item is, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lightning_dp.data import DataError, E2EDataModule, LabelledTexts
from lightning_dp.data.e2e import IGNORED, read_pairs
from lightning_dp.data.made_up_restaurants import made_up_restaurants
from lightning_dp.data.tokenizers import load_tokenizer


def test_made_up_records_are_those_of_their_seed_and_say_what_they_mean() -> None:
    pairs = made_up_restaurants(50, seed=4)
    assert pairs == made_up_restaurants(50, seed=4)
    assert pairs != made_up_restaurants(50, seed=5)
    for style in ("guide", "local"):
        for meaning, text in made_up_restaurants(50, seed=4, style=style):
            facts = dict(fact.rstrip("]").split("[") for fact in meaning.split(", "))
            facts.pop("familyFriendly", None)
            assert all(value in text for value in facts.values())
            assert "{" not in text


def test_only_the_text_and_its_end_are_to_be_predicted() -> None:
    data = E2EDataModule(made_up=20, max_length=70)
    data.setup()
    for (meaning, text), (words, labels) in zip(data.records("train"), data.train_set, strict=True):
        told = labels != IGNORED
        assert torch.equal(words[told], labels[told])
        whole = [*data.tokenizer.encode(f"{meaning}\n").ids, *data.tokenizer.encode(text).ids, data.end]
        assert words.tolist() == (whole + [data.end] * 70)[:70]
        if len(whole) <= 70:
            assert data.decode(labels[told]) == text
            assert int(labels[told][-1]) == data.end


def test_a_tokenizer_that_cuts_texts_off_does_so_for_its_owner_alone() -> None:
    text = "Try the Oak, by the quay."
    whole = load_tokenizer("made-up").encode(text).ids
    load_tokenizer("made-up").enable_truncation(3)
    assert load_tokenizer("made-up").encode(text).ids == whole
    assert len(whole) > 3


def test_a_meaning_is_tested_once_with_all_its_texts(tmp_path: Path) -> None:
    for name in ("trainset", "devset", "testset_w_refs"):
        (tmp_path / f"{name}.csv").write_text(
            'mr,ref\n"name[Zoë\'s], area[quay]","Zoë\'s is at the quay,\nby the water."\n'
            '"name[Zoë\'s], area[quay]",At the quay.\n'
            "name[Oak],Oak.\n",
            encoding="utf-8-sig",
        )
    data = E2EDataModule(tmp_path, max_length=40)
    data.setup()
    assert len(data.train_set) == 3
    ((words, mask, texts),) = list(data.test_dataloader())
    assert texts == [["Zoë's is at the quay,\nby the water.", "At the quay."], ["Oak."]]
    assert data.tokenizer.decode(words[1][mask[1] == 1].tolist()) == "name[Oak]\n"
    assert mask[1].diff().min() >= 0, "filled up in front"


def test_a_vocabulary_that_is_made_up_can_write_anything() -> None:
    tokenizer = load_tokenizer("made-up")
    for text in ("naïve Ω 漢字 🙂\n\ttab", "", "name[Old Otter]"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_labels_are_places_in_the_list_of_classes(tmp_path: Path) -> None:
    for name in ("train", "val"):
        (tmp_path / f"{name}.csv").write_text("label,text\nb,two words\na,one\n")
    data = LabelledTexts(tmp_path, ["a", "b"], tokenizer="made-up", max_length=4)
    data.setup()
    assert [int(label) for _, label in data.train_set] == [1, 0]
    assert all(words.shape == (4,) for words, _ in data.val_set)
    with pytest.raises(DataError, match="has the label 'b': expected one of a, c"):
        LabelledTexts(tmp_path, ["a", "c"], tokenizer="made-up").setup()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_length=0: expected at least 1"):
        E2EDataModule(max_length=0)
    with pytest.raises(ValueError, match="batch_size=0: expected at least 1"):
        LabelledTexts(tmp_path, ["a", "b"], batch_size=0)
    with pytest.raises(ValueError, match="expected at least two names, each once"):
        LabelledTexts(tmp_path, ["a", "a"])
    with pytest.raises(DataError, match="expected the file there"):
        read_pairs(tmp_path / "none.csv")
    path = tmp_path / "other.csv"
    path.write_text("meaning,ref\na,b\n")
    with pytest.raises(
        DataError, match=r"lacks the columns mr: expected a header with mr and ref. It has meaning, ref"
    ):
        read_pairs(path)
    path.write_text("mr,ref\n")
    with pytest.raises(DataError, match="has a header and no rows"):
        read_pairs(path)
    with pytest.raises(DataError, match=r"expected a file tokenizer.json"):
        load_tokenizer(tmp_path / "none.json")
