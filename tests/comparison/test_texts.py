"""Comparisons on texts: tokenizers of originals and references."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import fit
from helpers.texts import NAMES, texts
from helpers.training import quiet_config
from rich.console import Console

from unsc_hf.comparison.arguments import TextArguments
from unsc_hf.comparison.compare_methods import ComparisonArguments, compare_methods
from unsc_hf.comparison.controls import compare
from unsc_hf.comparison.references.texts import TextPlan, train_tokenizer
from unsc_hf.data.inputs import default_collator, prepare_dataset
from unsc_hf.data.selection import Request
from unsc_hf.models.loading import own_processor


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "data").mkdir()
    texts(60).to_parquet(folder / "data" / "train.parquet")
    texts(20, seed=1).to_parquet(folder / "data" / "test.parquet")
    texts(20, seed=2).to_parquet(folder / "data" / "validation.parquet")
    return folder


def test_equal_texts_give_the_same_tokenizer_in_every_process() -> None:
    """Models are compared on the same tokens; pieces inside words are no special tokens."""
    code = (
        "from helpers.texts import texts; from unsc_hf.comparison.references.texts import train_tokenizer; import json;"
        "print(json.dumps(train_tokenizer(texts(60), ['text'], 90, 16).get_vocab()))"
    )
    here = train_tokenizer(texts(60), ["text"], 90, 16)
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
    )
    assert json.loads(found.stdout.splitlines()[-1]) == here.get_vocab()
    assert len(here) == 90
    assert set(here.all_special_tokens) == {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    assert here.convert_ids_to_tokens(here("##b Hi")["input_ids"])[1:4] != ["##b", "hi", "[SEP]"]


def renumbered(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save the same model with its tokens numbered otherwise."""
    vocabulary = tokenizer.get_vocab()
    moved = list(range(5, len(vocabulary)))
    numbers = dict(zip(moved, moved[::-1], strict=True))
    other = copy.deepcopy(model)
    with torch.no_grad():
        for old, new in numbers.items():
            other.bert.embeddings.word_embeddings.weight[new] = model.bert.embeddings.word_embeddings.weight[old]
    other.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored = json.loads((folder / "tokenizer.json").read_text())
    stored["model"]["vocab"] = {token: numbers.get(i, i) for token, i in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(stored))


def test_a_reference_is_read_with_its_own_tokenizer(world: Path, tmp_path: Path) -> None:
    """The same model with its tokens numbered otherwise is the same model."""
    data = texts(60)
    model, tokenizer = TextPlan("nano", vocabulary_size=100, max_length=16).start(data, NAMES)
    rows = prepare_dataset(data, tokenizer, model)
    batch = default_collator(tokenizer)([rows[i] for i in range(len(rows))])
    fit(model, batch, steps=40)
    renumbered(model, tokenizer, tmp_path / "other")
    assert own_processor(str(tmp_path / "other"), tokenizer).get_vocab() != tokenizer.get_vocab()
    assert own_processor(str(tmp_path), tokenizer) is tokenizer
    config = quiet_config(tmp_path / "out", max_steps=2, energy=0.9, max_leak=None)
    found = compare(
        model, data, texts(20, 1), Request(forget_classes=(2,)), config, tokenizer, [tmp_path / "other"], controls=False
    )
    original, reference = found.methods["original"], found.methods["retrained"]
    assert original.AccDrt is not None
    assert original.AccDrt > 0.9
    for name in ("AccDut", "AccDrt", "AccDf", "AccDr", "mia_auc", "probe_forget"):
        assert getattr(reference, name) == pytest.approx(getattr(original, name), abs=1e-3), name


def test_a_comparison_of_methods_reads_a_reference_with_its_own_tokenizer(world: Path, tmp_path: Path) -> None:
    """As above: a reference that is the original with its tokens numbered otherwise is at no distance from it."""
    model, tokenizer = TextPlan("nano", vocabulary_size=100, max_length=16).start(texts(60), NAMES)
    with torch.no_grad():
        model.classifier.weight.mul_(100)  # a model that tells rows apart
        model.classifier.bias[2] = -9.0  # it has never seen this class
    model.save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    renumbered(model, tokenizer, tmp_path / "other")
    found = compare_methods(
        ComparisonArguments(methods=["masked"], audits=["similarity"], seeds=[0], no_intervals=True,
                            originals=[str(tmp_path / "original")]),
        TextArguments(
            dataset_name=str(world / "data"), forget_classes=["money"],
            retrained_model_name_or_path=[str(tmp_path / "other")],
        ),
        quiet_config(tmp_path / "out"),
        Console(quiet=True),
    )  # fmt: skip
    distance = found["forget_sets"]["money"]["runs"]["original"][0]["audits"]["similarity"]
    assert distance["cka_kept"] == pytest.approx(1, abs=1e-5)
    assert distance["js_kept"] == pytest.approx(0, abs=1e-6)


def test_whole_numbers_name_the_same_training_as_fractions() -> None:
    config = quiet_config(Path("unused"))
    plans = [
        TextArguments(model_size="nano", train_epochs=n, train_learning_rate=r).plan(config)
        for n, r in ((3, 1), (3.0, 1.0))
    ]
    assert repr(plans[0]) == repr(plans[1])
