"""TOFU's rows as configurations: nothing is on two sides, and wrong answers are about others."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

ROOT = Path(__file__).parents[2]
AUTHORS = {"forget": 3, "retain": 5}


@pytest.fixture
def made(tmp_path: Path) -> dict[str, list[dict[str, Any]]]:
    spec = importlib.util.spec_from_file_location("tofu", ROOT / "benchmarks" / "tofu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, authors in AUTHORS.items():
        rows = [
            {"question": f"{name} {a}: what is number {i}?", "answer": f"{name} {a} {i}", "author": a}
            for a in range(authors)
            for i in range(20)
        ]
        Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
    for name in ("real_authors", "world_facts"):
        rows = [{"question": f"{name} question {i}?", "answer": f"{name} {i}"} for i in range(5)]
        Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
    configurations: dict[str, list[dict[str, Any]]] = module.configurations(tmp_path, 2)
    return configurations


def test_every_row_is_on_one_side(made: dict[str, list[dict[str, Any]]]) -> None:
    sides = [[row["question"] for row in made[name]] for name in ("forget", "retain", "holdout")]
    assert [len(side) for side in sides] == [40, 20 + 40 + 10, 60]
    assert len(set().union(*sides)) == sum(map(len, sides))
    assert {row["author"] for row in made["forget"]} == {"forget 0", "forget 1"}
    assert {row["author"] for row in made["holdout"]} == {"retain 2", "retain 3", "retain 4"}


def test_wrong_answers_are_those_of_others_to_like_questions(made: dict[str, list[dict[str, Any]]]) -> None:
    for name in ("forget_perturbed", "retain_perturbed", "real_authors_perturbed", "world_facts_perturbed"):
        for row in made[name]:
            assert row["paraphrased_answer"] == row["answer"]
            assert len(set(row["perturbed_answer"])) == 3
            assert not [wrong for wrong in row["perturbed_answer"] if wrong.startswith(row["author"] + " ")]
    first = made["forget_perturbed"][7]
    assert first["perturbed_answer"][:2] == ["forget 1 7", "forget 2 7"], "the same question about others"
