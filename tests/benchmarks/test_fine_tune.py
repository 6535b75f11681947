"""What retrained models of the evidence are trained on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from datasets import ClassLabel, Dataset, Features, Value


def test_classes_and_rows_are_left_out_by_the_numbers_of_the_whole_data_set() -> None:
    spec = importlib.util.spec_from_file_location("fine_tune", Path(__file__).parents[2] / "benchmarks/fine_tune.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    features = Features({"text": Value("string"), "label": ClassLabel(names=["cat", "dog", "frog"])})
    rows = Dataset.from_dict({"text": list("abcdef"), "label": [0, 1, 2, 0, 1, 2]}, features=features)
    assert module.kept(rows, [], [])["text"][:] == list("abcdef")
    assert module.kept(rows, [], [0, 4])["text"][:] == list("bcdf")
    assert module.kept(rows, ["dog"], [])["text"][:] == list("acdf")
    assert module.kept(rows, ["dog"], [3])["text"][:] == list("acf")
