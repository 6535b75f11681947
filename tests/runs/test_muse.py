"""`unsc evaluate lm` on data in MUSE's layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from helpers.language import questions
from helpers.tofu import write_model
from transformers import AutoTokenizer

from unsc_hf.cli.main import main
from unsc_hf.evaluation.language import tofu
from unsc_hf.evaluation.language.knowledge import rouge
from unsc_hf.runs.evaluation_arguments import EvaluationArguments
from unsc_hf.runs.language_evaluation import MUSE_EVAL

TEXT = "The ferry to the island leaves at nine, and nobody on it knows the captain's name."


def write_muse(folder: Path) -> Path:
    """MUSE's configurations with their splits, as JSON lines, declared in README.md."""
    texts = [f"{TEXT} It was day {i}." for i in range(8)]
    sets = {
        "verbmem": {"forget": Dataset.from_list([{"prompt": text[:40], "gt": text[41:]} for text in texts[:3]])},
        "privleak": {
            "forget": Dataset.from_dict({"text": texts[:4]}), "holdout": Dataset.from_dict({"text": texts[4:]}),
        },
        "knowmem": {
            "forget_qa": questions(3), "forget_qa_icl": questions(1, start=90), "retain_qa": questions(2, start=20),
            "retain_qa_icl": questions(1, start=91),
        },
    }  # fmt: skip
    folder.mkdir(parents=True)
    lines = ["---", "configs:"]
    for config, splits in sets.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        for split, rows in splits.items():
            rows.to_json(folder / f"{config}-{split}.json")
            lines += [f"  - split: {split}", f"    path: {config}-{split}.json"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def test_muse_is_measured_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = write_muse(tmp_path / "muse"), tmp_path / "out"
    write_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    asked: list[tuple[list[str], int]] = []

    def answer(model: object, prompts: list[list[int]], pad: int, end: int, most: int, *_: object) -> list[list[int]]:
        asked.append((tokenizer.batch_decode(prompts), most))
        ends = ("\n\nmore", "\nQuestion more", " Question: more")
        return [tokenizer(f"P0 lives in Oslo.{ends[i % 3]}")["input_ids"] for i in range(len(prompts))]

    monkeypatch.setattr(tofu, "generate", answer)
    command = [
        "evaluate",
        "lm",
        "--model_name_or_path",
        tmp_path / "model",
        "--dataset_name",
        data,
        "--output_dir",
        out,
    ]
    assert main([*map(str, command), "--use_cpu", "--disable_tqdm"]) == 0
    summary = json.loads((out / "MUSE_SUMMARY.json").read_text())
    assert set(summary) == {*tofu.MUSE}
    assert {most for prompts, most in asked if "Question" not in prompts[0]} == {128}
    knowledge = next(prompts for prompts, most in asked if most == 32)
    example = "Question: Where does P90 live?\nAnswer: P90 lives in Oslo.\n\nQuestion: What does P90 do?\nAnswer: "
    assert knowledge[0].startswith(example)
    assert knowledge[0].endswith("\n\nQuestion: Where does P0 live?\nAnswer:")
    rows = json.loads((out / MUSE_EVAL).read_text())["forget_knowmem_ROUGE"]["value_by_index"]
    assert {row["generation"] for row in rows.values()} == {"P0 lives in Oslo."}, "an answer ends where another begins"
    assert rows["0"]["rougeL_f1"] == 1.0
    strength = json.loads((out / MUSE_EVAL).read_text())["extraction_strength"]["value_by_index"]
    assert len(strength) == 3, "of the texts to continue, not of those of the membership attack"
    truths = [row["answer"] for row in questions(3)]
    expected = sum(rouge("P0 lives in Oslo.", truth)["rougeL_f1"] for truth in truths) / len(truths)
    assert summary["forget_knowmem_ROUGE"] == pytest.approx(expected)
    logs = ["--retain_logs", str(out / MUSE_EVAL)]
    assert main([*map(str, command[:-1]), str(tmp_path / "again"), *logs, "--use_cpu", "--disable_tqdm"]) == 0
    assert json.loads((tmp_path / "again" / "MUSE_SUMMARY.json").read_text())["privleak"] == pytest.approx(0.0)


def test_named_rows_come_before_the_layout(tmp_path: Path) -> None:
    data = write_muse(tmp_path / "muse")
    sets = EvaluationArguments(
        dataset_name=str(data), forget_config="knowmem", forget_split="forget_qa", retain_config="knowmem",
        retain_split="retain_qa",
    ).sets()  # fmt: skip
    assert {name: len(rows) for name, rows in sets.items()} == {"forget": 6, "retain": 4}
