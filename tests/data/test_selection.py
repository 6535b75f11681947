"""What comes from a command line or a file: any text at all gives a result or one clear error."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from unsc_hf import UNSCError, split_dataset
from unsc_hf.comparison.arguments import read_indices, read_names
from unsc_hf.data.columns import read_labels
from unsc_hf.data.selection import Request, at_most_per_class, resolve_classes
from unsc_hf.reporting.results import finite

QUIET = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NAMES = ["cat", "dog", "T-shirt/top", "7", "a b", "é✓", "<b>"]


def outcome(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """What a call gives, or what its one error says."""
    try:
        return call(), None
    except UNSCError as error:
        return None, str(error)


@QUIET
@given(st.lists(st.text(max_size=12), min_size=1, max_size=4))
def test_row_numbers_are_numbers_or_an_error(words: list[str]) -> None:
    numeric = all(re.fullmatch("-?[0-9]+", word) for word in words)
    found, said = outcome(lambda: read_indices(words))
    if numeric:
        assert found == tuple(int(word) for word in words)
    else:
        assert "forget_indices" in (said or "")


@QUIET
@given(st.lists(st.integers(-5, 10**6), min_size=1, max_size=30))
def test_row_numbers_from_a_file_are_those_written(tmp_path: Path, numbers: list[int]) -> None:
    file = tmp_path / "rows.txt"
    file.write_text("\n".join(map(str, numbers)))
    assert read_indices([str(file)]) == tuple(numbers)


@QUIET
@given(st.binary(max_size=200))
def test_any_file_of_names_gives_names_or_an_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "names.txt"
    file.write_bytes(content)
    names, said = outcome(lambda: read_names([str(file)]))
    assert "forget_classes" in said if said else all(name == name.strip() and name for name in names)
    rows, said = outcome(lambda: read_indices([str(file)]))
    assert "forget_indices" in said if said else all(isinstance(row, int) for row in rows)


@QUIET
@given(st.lists(st.one_of(st.sampled_from(NAMES), st.integers(-3, 9), st.text(max_size=6)), max_size=4))
def test_classes_are_found_or_refused_by_name(asked: list[Any]) -> None:
    present = [0, 1, 2, 4, 5]
    found, said = outcome(lambda: resolve_classes(asked, NAMES, present))
    if said is not None:
        assert said.startswith("forget_classes:")
        return
    assert found == sorted(set(found))
    assert set(found) <= set(present)
    for item in asked:
        wanted = NAMES.index(str(item)) if str(item) in NAMES else int(str(item))
        assert wanted in found


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_way_to_name_rows_parts_the_same_rows(data: st.DataObject) -> None:
    """Classes, row numbers, a column's values and a predicate that mean the same rows give the same two parts."""
    labels = data.draw(st.lists(st.integers(0, 3), min_size=2, max_size=40))
    features = Features({"label": ClassLabel(names=list("abcd")), "who": Value("string"), "row": Value("int64")})
    rows = Dataset.from_dict(
        {"label": labels, "who": [f"user {c}" for c in labels], "row": list(range(len(labels)))}, features=features
    )
    chosen = data.draw(st.sets(st.sampled_from(sorted(set(labels))), min_size=1))
    numbers = [i for i, label in enumerate(labels) if label in chosen]
    ways: list[dict[str, Any]] = [
        {"forget_classes": ["abcd"[c] for c in chosen]},
        {"indices": data.draw(st.permutations(numbers))},
        {"column_values": {"who": [f"user {c}" for c in chosen]}},
        {"where": lambda row: row["label"] in chosen},
    ]
    for way in ways:
        if len(numbers) == len(labels):
            with pytest.raises(UNSCError):
                split_dataset(rows, **way)
            continue
        forget, retain = split_dataset(rows, **way)
        assert forget["row"][:] == numbers
        assert sorted([*forget["row"][:], *retain["row"][:]]) == list(range(len(labels)))
        assert not set(read_labels(forget).tolist()) & set(read_labels(retain).tolist())
    scattered = data.draw(st.sets(st.integers(0, len(labels) - 1), min_size=1, max_size=len(labels) - 1))
    for way in ({"indices": sorted(scattered, reverse=True)}, {"where": lambda row: row["row"] in scattered}):
        forget, retain = split_dataset(rows, **way)
        assert set(forget["row"][:]) == scattered
        assert sorted([*forget["row"][:], *retain["row"][:]]) == list(range(len(labels)))
    if len(numbers) < len(labels):
        parts = Request(indices=tuple(numbers)).split(rows)
        assert [len(part) for part in parts] == [len(numbers), len(labels) - len(numbers)]


@QUIET
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.floats(), st.integers(), st.text()),
        lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner), st.tuples(inner, inner)),
        max_leaves=12,
    )
)
def test_what_is_written_as_json_can_be_read_by_anybody(value: Any) -> None:
    text = json.dumps(finite(value), allow_nan=False)
    assert json.loads(text) == json.loads(json.dumps(finite(finite(value))))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 20))
def test_rows_of_each_class_are_limited(labels: list[int], limit: int) -> None:
    rows = at_most_per_class(labels, limit)
    known = np.asarray(labels)
    assert len(set(rows.tolist())) == len(rows)
    assert np.array_equal(np.bincount(known[rows], minlength=5), np.minimum(np.bincount(known, minlength=5), limit))
    assert known[rows].tolist() == sorted(known[rows].tolist())
    assert at_most_per_class(torch.tensor(labels), limit).tolist() == rows.tolist()
