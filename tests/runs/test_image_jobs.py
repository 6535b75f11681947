"""Jobs on image classifiers, from end to end: what they write, what they refuse, and that refusing leaves nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Value
from helpers.recipes import FAST, NAMES, RECIPE, image_folder, parquet_folder, results_of, run_process, run_recipe
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from unsc_hf import UNSCConfig, split_dataset
from unsc_hf.cli.main import fill_output_dir
from unsc_hf.cli.main import main as unsc
from unsc_hf.comparison.references.images import PLAN, ImagePlan, digits_dataset
from unsc_hf.reporting.hub import public_files
from unsc_hf.reporting.screen import LOG
from unsc_hf.utils.reserve import LOCK


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a parquet data set; models trained by one test are found again by the next."""
    root = tmp_path_factory.mktemp("world")
    parquet_folder(root / "data")
    return root


def _common(world: Path, output: Path) -> list[Any]:
    return ["--dataset_name", world / "data", "--references_dir", world / "references", "--output_dir", output, *FAST]


@pytest.fixture(scope="module")
def finished(world: Path) -> Path:
    """Output folder of a complete run, made once."""
    output = world / "without-frog"
    models = ("--train_original", "--train_retrained")
    assert run_recipe(RECIPE, *_common(world, output), "--forget_classes", "frog", *models) == 0
    return output


@pytest.fixture(scope="module")
def original(finished: Path, world: Path) -> Path:
    """The model that the finished run began from."""
    return next((world / "references").glob("original-*"))


def test_everything_is_written_and_loads(finished: Path, world: Path) -> None:
    assert {p.name for p in finished.iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "README.md", "results.json",
        "answered.png", "methods.png", "per_class_accuracy.png", "unlearning.png", "report.html", LOG, LOCK,
    }  # fmt: skip
    model = AutoModelForImageClassification.from_pretrained(finished)
    processor = AutoImageProcessor.from_pretrained(finished)
    frogs = [row["image"] for row in image_folder(80, 1) if row["label"] == 2]
    with torch.no_grad():
        predicted = model(**processor(frogs, return_tensors="pt")).logits.argmax(1)
    results = results_of(finished)
    assert float((predicted == 2).float().mean()) == pytest.approx(results["methods"]["unsc"]["AccDut"])

    methods = results["methods"]
    assert list(methods) == ["original", "masked", "random_projector", "unprojected", "unsc", "retrained"]
    wanted = {
        "AccDf", "AccDr", "AccDut", "AccDrt", "mia_auc", "mia_tpr_at_1pct_fpr", "probe_forget", "prototype_attack_10",
        "leak", "seconds",
    }  # fmt: skip
    assert all(wanted <= set(result) for result in methods.values())
    assert methods["original"]["AccDut"] > 0.8
    assert methods["masked"]["AccDut"] == methods["retrained"]["AccDut"] == 0
    assert methods["masked"]["probe_forget"] == methods["original"]["probe_forget"]
    assert methods["unsc"]["leak"] < methods["random_projector"]["leak"]
    assert results["request"]["forget_classes"] == ["frog"]
    assert results["certificate"]["leak"] == pytest.approx(methods["unsc"]["leak"], rel=1e-6)
    assert results["history"]
    assert {"torch", "transformers", "unsc_hf"} <= set(results["versions"])

    card = ModelCard.load(finished / "README.md")
    assert card.data.eval_results
    assert "suppressed" in card.text or "not forgotten" in card.text
    assert "](report.html)" in card.text
    assert results["command"].startswith("unsc unlearn image --dataset_name data ")
    for file in ("README.md", "results.json", "report.html"):
        assert str(world) not in (finished / file).read_text(encoding="utf-8")


def test_trained_models_are_found_again(finished: Path, world: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (world / "references").rglob("*.safetensors")}
    assert len(before) == 2
    output = world / "again"
    options = ("--forget_classes", 2, "--train_original", "--train_retrained", "--no_controls")
    assert run_recipe(RECIPE, *_common(world, output), *options) == 0
    assert {p: p.stat().st_mtime_ns for p in (world / "references").rglob("*.safetensors")} == before
    first, second = (load_file(folder / "model.safetensors") for folder in (finished, output))
    assert all(torch.equal(first[name], second[name]) for name in first)  # same seed, same model


@pytest.mark.slow
def test_accelerate_launch_and_yaml(original: Path, world: Path) -> None:
    config = world / "options.yaml"
    config.write_text(f"forget_classes: [dog, owl]\nmodel_name_or_path: {original}\ncontrols: false\nmax_steps: 3\n")
    output = world / "launched"
    written = run_process(
        "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--cpu", RECIPE, "--config", config, "--dataset_name", world / "data",
        "--output_dir", output, "--max_steps", "4", "--use_cpu", "--target_forget_accuracy", "0",
    )  # fmt: skip
    assert "Verdict" in written
    assert "UNSC" in written
    results = results_of(output)
    assert results["request"]["forget_classes"] == ["dog", "owl"]
    assert results["hyperparameters"]["max_steps"] == 4  # the command line wins over the file


def test_adapters_from_the_command_line(world: Path, original: Path) -> None:
    output = world / "adapter"
    code = run_recipe(
        RECIPE, "--dataset_name", world / "data", "--model_name_or_path", original, "--forget_classes", "frog",
        "--output_dir", output, "--use_peft", "--lora_r", 4, *FAST[:3],
    )  # fmt: skip
    assert code == 0
    written = {p.name for p in output.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", "results.json"} <= written
    assert not (output / "model.safetensors").exists()
    results = results_of(output)
    assert list(results["methods"]) == ["original", "masked", "random_projector", "unprojected", "unsc"]
    assert results["methods"]["unsc"]["AccDut"] < 0.1 < 0.8 < results["methods"]["original"]["AccDut"]
    merged = results["certificate"]["merged"]
    drift = results["certificate"]["drift"]["relative"]
    assert merged["float32"]["relative"] == pytest.approx(drift, rel=1e-3)
    assert merged["bfloat16"]["relative"] > 0
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "peft"
    assert "base model still remembers" in card.text
    for file in output.glob("*.json"):
        assert str(world) not in file.read_text(encoding="utf-8")


def test_imagefolder_and_a_fine_tuned_original(world: Path, original: Path) -> None:
    folder = world / "folders"
    for split, rows in (("train", image_folder(80, 3)), ("test", image_folder(40, 4))):
        for i, row in enumerate(rows):
            path = folder / split / NAMES[row["label"]] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    output = world / "fine-tuned"
    code = run_recipe(
        RECIPE, "--dataset_name", folder, "--model_name_or_path", original, "--train_original",
        "--forget_classes", "owl", "--references_dir", world / "tuned", "--output_dir", output, "--no_controls",
        *FAST[:3], "--train_epochs", "1", "--max_steps", "3",
    )  # fmt: skip
    assert code == 0
    results = results_of(output)
    assert results["request"]["rows"] == 20
    assert results["methods"]["original"]["AccDrt"] > 0.8  # it began from the given model, not from nothing
    assert results["request"]["model"].startswith("original-")


def test_push_to_hub_uploads_only_what_is_public(original: Path, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[dict[str, Any]] = []
    publish = "unsc_hf.runs.job.publish"
    monkeypatch.setattr(publish, lambda folder, name, **k: pushed.append({"folder": folder, "name": name, **k}))
    code = run_recipe(
        RECIPE, *_common(world, world / "pushed"), "--forget_classes", "cat", "--model_name_or_path", original,
        "--no_controls", "--push_to_hub", "--hub_model_id", "user/without-cat", "--hub_token", "hf_secret",
        "--hub_private_repo", "true",
    )  # fmt: skip
    assert code == 0
    (call,) = pushed  # once, when there is something to publish
    assert (call["name"], call["private"], call["token"]) == ("user/without-cat", True, "hf_secret")
    public = set(public_files(call["folder"]))
    assert {"model.safetensors", "config.json", "README.md", "report.html", "results.json"} <= public
    assert not [p.name for p in (world / "pushed").iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
    for file in [*(world / "pushed").glob("*.json"), world / "pushed" / "README.md"]:
        content = file.read_text(encoding="utf-8")
        assert "hf_secret" not in content
        assert str(world) not in content
    text = (world / "pushed" / "README.md").read_text(encoding="utf-8")
    assert "random subspace" not in text
    assert "Compared with" in text  # the full card, not a bare one


@pytest.fixture(scope="module")
def broken(world: Path, original: Path) -> None:
    """Data, models and options that cannot work."""
    (world / "bad.yaml").write_text("forget_clases: [cat]\n", encoding="utf-8")
    other = ClassLabel(names=["frog", "cat", "dog", "owl"])
    for folder in ("absent", "other"):
        (world / folder).mkdir()
    for split in ("train", "test"):
        rows = Dataset.from_parquet(str(world / "data" / f"{split}.parquet"))
        rows.filter(lambda row: row["label"] != 2).to_parquet(world / "absent" / f"{split}.parquet")
        rows.cast_column("label", other).to_parquet(world / "other" / f"{split}.parquet")
    AutoModelForImageClassification.from_pretrained(original).save_pretrained(world / "nan")
    AutoImageProcessor.from_pretrained(original).save_pretrained(world / "nan")
    weights = load_file(world / "nan" / "model.safetensors")
    weights["vit.encoder.layer.1.intermediate.dense.weight"][0] = torch.nan
    save_file(weights, world / "nan" / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forget_classes": "frogg"}, "no class 'frogg'; closest: 'frog'"),
        ({"forget_classes": "17"}, "id 17 is out of range"),
        ({"forget_classes": " ".join(NAMES)}, "all 4 classes"),
        ({"dataset_name": "{world}/absent"}, r"class 'frog' \(2\) has no rows"),
        ({"dataset_name": "{world}/other"}, "calls label 0 'cat', the data set 'frog'"),
        ({"dataset_name": "{world}/nowhere"}, "cannot load"),
        ({"model_name_or_path": "{world}/nowhere"}, "cannot load"),
        ({"model_name_or_path": "{world}/nan"}, r"vit\.layers\.1\.mlp\.fc1\.weight holds the value nan"),
        ({"retrained_model_name_or_path": "{world}/nowhere"}, "retrained_model_name_or_path: cannot load"),
        ({"label_column": "klass"}, "no column 'klass'"),
        ({"energy": "1.5"}, r"outside \(0, 1\]"),
        ({"test_split": "holdout"}, "no split 'holdout'.*test, train"),
        ({"target_modules": "query"}, "matches no protectable layer.*q_proj"),
        ({"subspace_rule": "rank", "subspace_size": "100000"}, "no layer any capacity"),
        ({"model_size": "huge", "train_original": "true"}, "choose from nano"),
        ({"config": "{world}/bad.yaml"}, "'forget_clases', which is no option; closest: 'forget_classes'"),
        ({"train_retrained": "true"}, "knows the forgotten rows"),
        ({"output_dir": "{world}/without-frog"}, "holds a finished run"),
        ({"output_dir": "{original}"}, "holds a model"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    changes: dict[str, str], message: str, broken: None, original: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {
        "dataset_name": "{world}/data", "model_name_or_path": "{original}", "forget_classes": "frog",
        "output_dir": "{world}/refused", "references_dir": "{world}/references", "disable_tqdm": "true", **changes,
    }  # fmt: skip
    words = [w.format(world=world, original=original) for k, v in given.items() for w in (f"--{k}", *v.split())]
    before = sorted(world.rglob("*"))
    assert run_recipe(RECIPE, *words, "--use_cpu", "--no_controls") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert len(errors[0]) < 400
    assert re.search(message, errors[0])
    assert sorted(world.rglob("*")) == before


def test_quickstart_refuses_a_model_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_recipe(RECIPE, "--model_name_or_path", "user/model") == 2
    assert "dataset_name: not given" in capsys.readouterr().err


@pytest.mark.slow
def test_quickstart_runs_without_arguments(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real path with a shorter training; its figures are checked by running `make demo`."""
    monkeypatch.setattr("unsc_hf.comparison.arguments.PLAN", replace(PLAN, epochs=2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert run_recipe(RECIPE) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) <= 40
    assert shown.err == ""
    for said in ("8: recognised ", "Decisions changed on the other classes: ", "with 95 % confidence.", "report.html"):
        assert said in shown.out
    assert "'loss'" in (tmp_path / "outputs" / "quickstart" / LOG).read_text()
    assert results_of(tmp_path / "outputs" / "quickstart")["request"]["forget_classes"] == ["8"]
    config = UNSCConfig()
    fill_output_dir(config, "quickstart")
    assert str(config.output_dir).endswith("quickstart-2")


def test_a_retrained_model_has_an_output_for_every_class() -> None:
    retain = split_dataset(image_folder(40, 0), forget_classes=["owl"]).retain.cast_column("label", Value("int64"))
    model, _ = ImagePlan("nano").start(retain, NAMES)
    assert model.config.num_labels == 4


def test_digits_are_what_they_should_be() -> None:
    data = digits_dataset()
    assert {name: len(rows) for name, rows in data.items()} == {"train": 1077, "validation": 180, "test": 540}
    assert set(data["train"]["label"][:]) == set(range(10))
    assert data["train"][0]["image"].size == (8, 8)


def test_the_command_answers_in_json(world: Path, original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--forget_classes", "dog", "--model_name_or_path", original, "--no_controls")
    words = [*_common(world, world / "by-command"), *options]
    assert unsc(["unlearn", "image", *map(str, words), "--json"]) == 0
    seen = capsys.readouterr()
    found = json.loads(seen.out.splitlines()[-1])
    assert found["request"]["forget_classes"] == ["dog"]
    assert Path(found["output_dir"], "report.html").is_file()
    assert "Verdict:" in seen.err
