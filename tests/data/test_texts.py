"""Texts as rows: their columns, files and padding."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from helpers.texts import NAMES, texts
from helpers.training import make_trainer
from transformers import GPT2Config, GPT2ForSequenceClassification

from unsc_hf import UNSCError
from unsc_hf.comparison.references.texts import TextPlan
from unsc_hf.data.columns import find_text_columns
from unsc_hf.data.inputs import default_collator, prepare_dataset
from unsc_hf.data.selection import Request, split_dataset
from unsc_hf.data.sources import load_data, load_text_dataset


def test_text_columns_are_found_or_named() -> None:
    data = texts(2)
    assert find_text_columns(data) == ("text",)
    pairs = data.rename_column("text", "premise").add_column("hypothesis", ["x"] * len(data))
    assert find_text_columns(pairs) == ("premise", "hypothesis")
    assert find_text_columns(data.rename_column("text", "utter")) == ("utter",)
    two = data.rename_column("text", "a").add_column("b", ["x"] * len(data))
    with pytest.raises(UNSCError, match="cannot tell which of the columns a, label, user, b"):
        find_text_columns(two)
    with pytest.raises(UNSCError, match="no column 'c'"):
        find_text_columns(two, ["c"])


def test_text_needs_a_tokenizer_that_can_pad(tmp_path: Path) -> None:
    data = texts(4)
    model, tokenizer = TextPlan("nano", vocabulary_size=200, max_length=16).start(data, NAMES)
    with pytest.raises(UNSCError, match="a tokenizer is needed, got NoneType"):
        prepare_dataset(data, None, model)
    gpt2 = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=1, num_labels=3, pad_token_id=None)
    )
    with pytest.raises(UNSCError, match=r"config\.pad_token_id is not set"):
        prepare_dataset(data, tokenizer, gpt2)
    tokenizer.pad_token = None
    with pytest.raises(UNSCError, match="has no padding token"):
        make_trainer(
            model,
            split_dataset(data, forget_classes=["money"]),
            tmp_path,
            trainer_kwargs={"processing_class": tokenizer},
        )
    assert default_collator(tokenizer) is default_collator(None)


def test_rows_by_a_columns_value() -> None:
    data = texts(8)
    forget, retain = split_dataset(data, column_values={"user": [1, "3"]})
    assert set(forget["user"]) == {1, 3}
    assert set(retain["user"]) == {0, 2}
    both = split_dataset(data, column_values={"user": 1, "label": 2}).forget
    assert set(both["user"]) == {1}
    assert set(both["label"]) == {2}
    assert len(Request(indices=(0, 5)).split(data).forget) == 2
    with pytest.raises(UNSCError, match="no row has user '9'; closest: '"):
        split_dataset(data, column_values={"user": [9]})
    with pytest.raises(UNSCError, match="no column 'owner'"):
        split_dataset(data, column_values={"owner": [9]})


def test_files_of_other_kinds(tmp_path: Path) -> None:
    for kind, write in (("csv", Dataset.to_csv), ("json", Dataset.to_json)):
        folder = tmp_path / kind
        folder.mkdir()
        write(texts(3), folder / f"train.{kind}")
        write(texts(2), folder / f"test.{kind}")
        assert len(load_text_dataset(str(folder), cache_dir=str(tmp_path / "cache"))["train"]) == 9
    with pytest.raises(UNSCError, match="cannot load"):
        load_data(str(tmp_path / "nothing"), cache_dir=str(tmp_path / "cache"))


def test_a_validation_split_comes_along(tmp_path: Path) -> None:
    for seed, (name, rows) in enumerate((("train", 60), ("test", 20), ("validation", 20))):
        (tmp_path / "data").mkdir(exist_ok=True)
        texts(rows, seed=seed).to_parquet(tmp_path / "data" / f"{name}.parquet")
    data = load_text_dataset(str(tmp_path / "data"), cache_dir=str(tmp_path / "cache"))
    assert {name: len(part) for name, part in data.items()} == {"train": 180, "test": 60, "validation": 60}
    other = load_text_dataset(str(tmp_path / "data"), test_split="validation", cache_dir=str(tmp_path / "cache"))
    assert set(other) == {"train", "test"}
