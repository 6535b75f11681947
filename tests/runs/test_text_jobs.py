"""Jobs on text classifiers, from end to end: classes, rows, adapters, and requests one after another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.recipes import RECIPES, results_of, run_recipe
from helpers.texts import texts
from huggingface_hub import ModelCard
from transformers import AutoModelForSequenceClassification

from unsc_hf import ActivationStatistics
from unsc_hf.data.sources import load_data

RECIPE = RECIPES / "unlearn_text.py"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "data").mkdir()
    for split, rows in (("train", texts(60)), ("test", texts(20, seed=1)), ("validation", texts(20, seed=2))):
        rows.to_parquet(folder / "data" / f"{split}.parquet")
    return folder


def _run(world: Path, out: Path, *arguments: Any) -> int:
    return run_recipe(
        RECIPE, "--dataset_name", world / "data", "--train_original", "--train_retrained", "--model_size", "nano",
        "--train_epochs", 12, "--train_learning_rate", 3e-3, "--train_batch_size", 16, "--max_length", 16,
        "--references_dir", world / "references", "--use_cpu", "--disable_tqdm", "true",
        "--output_dir", out, *arguments,
    )  # fmt: skip


@pytest.mark.slow
def test_a_class_is_forgotten(world: Path, tmp_path: Path) -> None:
    assert _run(world, tmp_path / "out", "--forget_classes", "money", "--max_steps", 200) == 0
    methods = results_of(tmp_path / "out")["methods"]
    assert methods["original"]["AccDut"] > 0.9
    assert methods["unsc"]["AccDut"] <= 0.1
    assert methods["unsc"]["AccDrt"] >= 0.9
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoTokenizer" in card.text
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert loaded.config.id2label[2] == "money"


def test_rows_are_forgotten_in_adapters(world: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("\n".join(map(str, range(0, 180, 9))))
    arguments = ("--forget_indices", rows, "--use_peft", "--lora_r", 4, "--no_controls", "--max_steps", 10)
    assert _run(world, tmp_path / "out", *arguments) == 0
    results = results_of(tmp_path / "out")
    assert results["request"] == {**results["request"], "forget_classes": [], "rows": 20}
    assert "masked" not in results["methods"]  # no class is forgotten whole
    assert results["methods"]["unsc"]["AccDut"] is None
    assert 0 <= results["methods"]["unsc"]["mia_auc"] <= 1
    card = (tmp_path / "out" / "README.md").read_text()
    assert "20 training rows (not listed; their hash begins with" in card
    assert "base model still remembers" in card


@pytest.mark.slow
def test_requests_in_sequence_share_one_budget(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second request may spend what the first has left; the results tell what was given from what was spent."""
    common = ("--statistics_dir", tmp_path / "statistics", "--no_controls", "--max_steps", 40)
    assert _run(world, tmp_path / "first", "--forget_classes", "money", "--max_leak", 0.2, *common) == 0
    smaller = tmp_path / "smaller"
    smaller.mkdir()
    for split in ("train", "test"):
        left = load_data(str(world / "data"))[split].filter(lambda row: row["label"] != 2)
        left.to_parquet(smaller / f"{split}.parquet")
    second = (
        "--dataset_name", smaller, "--model_name_or_path", tmp_path / "first", "--use_cpu",
        "--forget_classes", "weather", "--output_dir", tmp_path / "second", "--disable_tqdm", "true", *common,
    )  # fmt: skip
    spent = results_of(tmp_path / "first")["certificate"]["leak"]
    assert run_recipe(RECIPE, *second, "--max_leak", spent) == 2  # nothing is left of it
    assert "1 requests have spent" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()
    assert run_recipe(RECIPE, *second, "--max_leak", 0.2) == 0

    first, results = results_of(tmp_path / "first"), results_of(tmp_path / "second")
    assert first["leak_budget"] == {"max_leak": 0.2, "spent_by_earlier_requests": 0, "spent": spent}
    leak = results["certificate"]["leak"]
    assert results["leak_budget"] == {"max_leak": 0.2, "spent_by_earlier_requests": spent, "spent": leak}
    assert results["hyperparameters"]["max_leak"] == 0.2
    assert results["certificate"]["max_leak"] == pytest.approx(0.2 - spent)
    assert [entry["rows"] for entry in results["requests"]] == [60, 60]
    assert [entry["leak"] for entry in results["requests"]] == [spent, leak]
    assert "Requests served on this model" in (tmp_path / "second" / "README.md").read_text()
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")
    stored = ActivationStatistics.from_pretrained(tmp_path / "statistics", after)
    assert list(stored.moments) == ["0"]
    assert len(list((tmp_path / "statistics").glob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--forget_classes", "monye"), "closest: 'money'"),
        (("--forget_indices", "5", "400"), "error: forget_indices: 400 is out of range"),
        (("--forget_indices", "5", "5"), "row 5 is given more than once"),
        (("--forget_indices", "5", "--forget_classes", "money"), "choose one way"),
        (("--forget_column", "user"), "goes with forget_values"),
        (("--forget_column", "user", "--forget_values", "7"), "error: forget_column: no row has user '7'"),
        ((), "forget_classes: not given"),
        (("--forget_classes", "money", "--text_columns", "body"), "no column 'body'"),
        (("--forget_classes", "money", "--use_peft", "--lora_target_modules", "querry"), "did you mean"),
        (("--forget_classes", "money", "--use_peft", "--statistics_dir", "s"), "statistics_dir: goes with full"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], message: str, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(world, tmp_path / "out", *arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out").exists()
