"""A small data set with TOFU's configurations, and a tiny model that answers its questions badly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset

from helpers.language import questions
from unsc_hf.comparison.references.texts import LanguagePlan
from unsc_hf.data.dialogues import to_dialogues

CONFIGS = ["--forget_config", "forget10", "--retain_config", "retain90", "--unseen_config", "holdout10"]


def perturbed(rows: Dataset) -> Dataset:
    """With a paraphrase of each answer and three wrong ones."""
    answers = rows["answer"][:]
    wrong = [[f"{answers[(i + shift) % len(answers)]}" for shift in (1, 2, 3)] for i in range(len(answers))]
    right = [f"Indeed, {answer}" for answer in answers]
    return rows.add_column("paraphrased_answer", right).add_column("perturbed_answer", wrong)


def write_tofu(folder: Path, with_perturbed: bool = True) -> Path:
    """The configurations as JSON lines, declared in README.md."""
    sets = {"forget10": questions(3), "retain90": questions(5, start=20), "holdout10": questions(3, start=60)}
    if with_perturbed:
        sets["forget10_perturbed"] = perturbed(sets["forget10"])
        sets["retain_perturbed"] = perturbed(questions(3, start=20))
        for name, start in (("real_authors", 70), ("world_facts", 80)):
            sets[f"{name}_perturbed"] = perturbed(questions(2, start=start)).remove_columns("paraphrased_answer")
    folder.mkdir(parents=True)
    lines = []
    for name, rows in sets.items():
        rows.to_json(folder / f"{name}.json")
        lines.append(f"- config_name: {name}\n  data_files: {name}.json")
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(lines) + "\n---\n")
    return folder


def write_model(folder: Path, size: str = "nano") -> Any:
    """An untrained Llama with a tokenizer for these rows."""
    rows = to_dialogues(questions(8))
    model, tokenizer = LanguagePlan(size=size, vocabulary_size=300, max_length=128).start(rows)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model
