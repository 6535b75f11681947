"""`unlearn`: a whole job in one call, on images, texts and language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from helpers.language import questions
from helpers.models import learned
from helpers.recipes import FAST, RECIPE, parquet_folder, results_of, run_recipe
from helpers.rows import separable
from helpers.texts import NAMES, texts
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel

from unsc_hf import UnlearningResult, UNSCConfig, UNSCError, unlearn
from unsc_hf.comparison.references.texts import LanguagePlan, TextPlan
from unsc_hf.data.copies import input_digests
from unsc_hf.data.dialogues import to_dialogues
from unsc_hf.reporting.screen import LOG
from unsc_hf.trainer.certify import TRAINING_ROWS
from unsc_hf.utils.fingerprint import weight_hash

BERT = TextPlan(size="nano", vocabulary_size=200, max_length=16)
LLAMA = LanguagePlan(size="nano", vocabulary_size=300, max_length=64)


def options(**changes: Any) -> UNSCConfig:
    settings: dict[str, Any] = {"use_cpu": True, "disable_tqdm": True, "max_steps": 8, "report_to": "none"}
    return UNSCConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def images() -> DatasetDict:
    draw = separable()
    return DatasetDict(train=draw(40), test=draw(15))


@pytest.fixture(scope="module")
def model(images: DatasetDict) -> PreTrainedModel:
    return learned(images["train"])


@pytest.fixture(scope="module")
def result(model: PreTrainedModel, images: DatasetDict) -> UnlearningResult:
    return unlearn(
        model, images, forget_classes="frog", config=options(max_steps=60, energy=0.95, displacement_decay=0.0)
    )


def test_a_class_is_forgotten(result: UnlearningResult, model: PreTrainedModel) -> None:
    assert list(result.methods) == ["original", "masked", "random_projector", "unprojected", "unsc"]
    assert result.methods["original"].AccDut > 0.9
    assert result.methods["unsc"].AccDut < result.methods["original"].AccDut
    assert result.certificate["leak"] == pytest.approx(result.methods["unsc"].leak)
    assert result.verdict in ("suppressed", "not forgotten")
    assert result.reason
    shown = str(result.table)
    assert "UNSC" in shown
    assert "decisions" in shown
    assert "Decisions changed: share" in result.table.note
    assert weight_hash(result.model) != weight_hash(model)  # the given model stays as it is


def test_the_certificate_reads_a_validation_split_that_nothing_else_reads(
    model: PreTrainedModel, images: DatasetDict, result: UnlearningResult
) -> None:
    """Of a class to forget all rows of other classes; for single rows one half, and the goal reads the other."""
    validation = separable()(12)
    data, config = DatasetDict(**images, validation=validation), options(max_leak=None, energy=0.9)
    of_class = unlearn(model, data, forget_classes="frog", controls=False, config=config)
    assert of_class.certificate["unseen"]
    labels = validation["label"][:]
    frog = validation.features["label"].str2int("frog")
    kept = validation.select([i for i, label in enumerate(labels) if label != frog])
    assert input_digests(of_class.trainer.rows.certificate) == input_digests(kept)
    assert TRAINING_ROWS not in of_class.trainer.caveats()

    labels_of_train = images["train"]["label"][:]
    cat = images["train"].features["label"].str2int("cat")
    left = images["train"].select([i for i, label in enumerate(labels_of_train) if label != cat])  # forgotten before
    after = unlearn(model, DatasetDict(data, train=left), forget_classes="frog", controls=False, config=config)
    assert after.certificate["rows"] == sum(label not in (cat, frog) for label in labels)

    of_rows = unlearn(model, data, indices=[0, 3], controls=False, config=config)
    assert of_rows.trainer.goal.unseen is not None
    halves = [set(input_digests(part)) for part in (of_rows.trainer.rows.certificate, of_rows.trainer.goal.unseen)]
    assert halves[0] | halves[1] == set(input_digests(validation))
    assert not halves[0] & halves[1]
    assert abs(len(halves[0]) - len(halves[1])) <= len(set(labels))

    assert not result.certificate["unseen"]
    assert TRAINING_ROWS in result.trainer.caveats()


def test_what_is_saved_is_what_a_recipe_leaves(result: UnlearningResult, tmp_path: Path) -> None:
    with pytest.raises(UNSCError, match="push_to_hub: the result was not saved yet"):
        result.push_to_hub("user/without-frog")
    folder = result.save(tmp_path / "without-frog")
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "README.md", "results.json", "report.html", "per_class_accuracy.png",
        "answered.png", "methods.png", "unlearning.png",
    }  # fmt: skip
    loaded = AutoModelForImageClassification.from_pretrained(folder)
    assert weight_hash(loaded) == weight_hash(result.model)
    results = results_of(folder)
    assert results["request"]["forget_classes"] == ["frog"]
    assert results["request"]["model"] == "ViTForImageClassification"  # one that no folder names
    assert results["verdict"] == {"word": result.verdict, "reason": result.reason}
    assert results["table"] == result.table.cells
    assert results["command"].endswith("forget_classes='frog')")
    assert results["leak_budget"] is None
    with pytest.raises(UNSCError, match="holds a finished run"):
        result.save(folder)


def test_it_is_published_by_its_name(result: UnlearningResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[tuple[Any, ...]] = []
    monkeypatch.setattr("unsc_hf.runs.job.publish", lambda *a, **k: pushed.append((*a, k["private"], k["token"])))
    folder = result.save(tmp_path / "local")
    result.push_to_hub("user/without-frog", private=True, token="secret")
    assert pushed == [(folder, "user/without-frog", True, "secret")]
    assert 'from_pretrained("user/without-frog")' in (folder / "README.md").read_text()


def test_rows_by_a_predicate_and_a_second_request(model: PreTrainedModel, images: DatasetDict, tmp_path: Path) -> None:
    """Chosen rows of a class that stays; then the same again on what the first request has left."""
    config = options(rows_per_direction=None, max_leak=0.5, max_steps=3, energy=0.9)
    job: dict[str, Any] = {"controls": False, "unseen": images["test"], "config": config}
    job["statistics_dir"] = str(tmp_path / "s")
    rows = images["train"].add_column("row", list(range(120)))
    parts = DatasetDict(train=rows, test=images["test"])
    first = unlearn(model, parts, where=lambda row: row["row"] in (1, 2, 50), output_dir=tmp_path / "one", **job)
    assert list(first.methods) == ["original", "unsc"]
    first.save(tmp_path / "copy")
    assert len(results_of(tmp_path / "copy")["requests"]) == 1  # a second copy is no second request
    left = DatasetDict(train=rows.select([i for i in range(120) if i not in (1, 2, 50)]), test=images["test"])
    unlearn(str(tmp_path / "one"), left, indices=[0, 3], output_dir=tmp_path / "two", **job)
    results = results_of(tmp_path / "two")
    assert [entry["rows"] for entry in results["requests"]] == [3, 2]
    assert results["leak_budget"]["spent_by_earlier_requests"] == pytest.approx(first.certificate["leak"])
    assert results["hyperparameters"]["max_leak"] == config.max_leak == 0.5
    assert results["request"]["model"] == "one"


def test_texts(tmp_path: Path) -> None:
    data = DatasetDict(train=texts(20), test=texts(8, seed=1))
    bert, tokenizer = BERT.start(data["train"], NAMES)
    result = unlearn(
        bert, data, forget_classes=["money"], processing_class=tokenizer, controls=False, config=options(max_leak=None)
    )
    assert list(result.methods) == ["original", "masked", "unsc"]
    card = (result.save(tmp_path / "texts") / "README.md").read_text()
    assert "pipeline_tag: text-classification" in card
    assert (tmp_path / "texts" / "tokenizer.json").is_file()


def test_language_models(tmp_path: Path) -> None:
    rows = questions(8)
    llama, tokenizer = LLAMA.start(to_dialogues(rows))
    llama.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    config = options(target_forget_accuracy=0.0, max_leak=None, rows_per_direction=None, max_steps=2)
    job: dict[str, Any] = {"controls": False, "config": config, "output_dir": tmp_path / "out"}
    result = unlearn(tmp_path / "llama", DatasetDict(train=rows), where=lambda row: row["person"] < 2, **job)
    assert list(result.methods) == ["original", "unsc"]
    assert set(result.methods["unsc"].sets) == {"forget", "retain"}
    assert result.verdict == "not judged"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size > 0
    with pytest.raises(UNSCError, match="forget_classes: goes with classifiers"):
        unlearn(llama, DatasetDict(train=rows), forget_classes=[1], processing_class=tokenizer, config=config)
    with pytest.raises(UNSCError, match="^unseen: not given"):
        unlearn(llama, DatasetDict(train=rows), indices=[1], processing_class=tokenizer, config=options())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "^forget_classes: not given"),
        ({"forget_classes": "frogg"}, "no class 'frogg'; closest: 'frog'"),
        ({"forget_classes": "frog", "indices": [1]}, "^indices: given beside forget_classes"),
        ({"where": lambda row: False}, "^where: selects no row"),
        ({"indices": [500]}, "^indices: 500 is out of range"),
        ({"forget_classes": "frog", "dataset": "nowhere"}, "^dataset: cannot load 'nowhere'"),
        ({"forget_classes": "frog", "dataset": 3}, "^dataset: got int"),
        ({"forget_classes": "frog", "model": "nowhere"}, "^model: cannot load 'nowhere'"),
        ({"forget_classes": "frog", "retrained": ["nowhere"]}, "cannot load 'nowhere'"),
    ],
)
def test_bad_input_leaves_nothing(
    changes: dict[str, Any], message: str, model: PreTrainedModel, images: DatasetDict, tmp_path: Path
) -> None:
    given = {"model": model, "dataset": images, "output_dir": tmp_path / "out", "config": options(), **changes}
    with pytest.raises(UNSCError, match=message):
        unlearn(**given)
    assert not (tmp_path / "out").exists()


def test_missing_splits_and_processors_are_named(model: PreTrainedModel, images: DatasetDict) -> None:
    with pytest.raises(UNSCError, match="dataset: no split 'test'; splits found: train"):
        unlearn(model, DatasetDict(train=images["train"]), forget_classes="frog", config=options())
    raw = DatasetDict(train=texts(4), test=texts(4))
    bert, _ = BERT.start(raw["train"], NAMES)
    with pytest.raises(UNSCError, match="^processing_class: not given"):
        unlearn(bert, raw, forget_classes="money", config=options())


def test_the_recipe_and_the_call_end_at_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet_folder(tmp_path / "data", 80, 40)
    code = run_recipe(
        RECIPE, "--dataset_name", tmp_path / "data", "--forget_classes", "owl", "--train_original", "--no_controls",
        "--references_dir", tmp_path / "references", "--output_dir", tmp_path / "recipe", *FAST,
    )  # fmt: skip
    assert code == 0
    original = next((tmp_path / "references").glob("original-*"))
    called = unlearn(
        str(original), str(tmp_path / "data"), forget_classes=["owl"], controls=False, output_dir=tmp_path / "called",
        config=options(max_steps=20),
    )  # fmt: skip
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("called", "recipe"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    results = [results_of(tmp_path / name) for name in ("called", "recipe")]
    assert set(results[0]) == set(results[1])
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in ("called", "recipe")]
    assert files[0] == files[1] - {LOG}  # a command's
    assert called.methods["unsc"].AccDut == results[1]["methods"]["unsc"]["AccDut"]
