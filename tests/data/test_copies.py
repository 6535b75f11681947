"""Copies are found by what a model reads, whatever their labels and other columns say."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, Image, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from unsc_hf import UNSCError
from unsc_hf.data.copies import copies, input_digests, without_copies, without_overlap


def picture(shade: int) -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(np.full((4, 4, 3), shade, np.uint8)).save(file, "png")
    return file.getvalue()


def rows_of(kind: str, values: list[int], folder: Path) -> Dataset:
    """One row for each value; equal values give equal inputs, and every row another label, text and user."""
    other: dict[str, list[Any]] = {"label": [*range(len(values))], "user": [f"u{i}" for i in range(len(values))]}
    texts = [f"text {value}" for value in values]
    if kind == "image file":
        for value in values:
            (folder / f"{value}.png").write_bytes(picture(value))
        stored = [{"bytes": None, "path": str(folder / f"{value}.png")} for value in values]
        features = Features({"image": Image(), "label": Value("int64"), "user": Value("string")})
        return Dataset.from_dict({"image": stored, **other}, features=features)
    columns: dict[str, dict[str, list[Any]]] = {
        "image": {"image": [PILImage.open(io.BytesIO(picture(value))) for value in values]},
        "text": {"text": texts},
        "pair": {"premise": texts, "hypothesis": ["so"] * len(values)},
        "dialogue": {"prompt": ["what?"] * len(values), "completion": texts},
        "question": {"question": texts, "answer": ["this"] * len(values)},
        "ready image": {"pixel_values": [[[float(value)] * 2] * 2 for value in values]},
        "ready text": {"input_ids": [[1, value] for value in values], "attention_mask": [[1, 1]] * len(values)},
    }
    rows = Dataset.from_dict({**columns[kind], **other})
    return rows.with_format("torch") if kind.startswith("ready") else rows


KINDS = ["image", "image file", "text", "pair", "dialogue", "question", "ready image", "ready text"]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_inputs_are_copies(kind: str, tmp_path: Path) -> None:
    rows, others = rows_of(kind, [1, 2, 3, 2], tmp_path), rows_of(kind, [7, 2, 1], tmp_path)
    assert copies(rows, others).tolist() == [True, True, False, True]
    assert len(set(input_digests(rows))) == 3


def test_named_text_columns_and_unknown_rows_are_read() -> None:
    rows = Dataset.from_dict({"text": ["a", "b"], "body": ["x", "x"], "label": [0, 1]})
    assert len(set(input_digests(rows))) == 2
    assert len(set(input_digests(rows, ["body"]))) == 1
    sound = Dataset.from_dict({"input_values": [[0.5, 1.0], [0.5, 1.0], [0.5, 2.0]], "label": [0, 1, 2]})
    assert copies(sound, sound.select([0])).tolist() == [True, True, False]
    utterance = Dataset.from_dict({"said": ["a", "a"], "label": [0, 1]})
    assert len(set(input_digests(utterance))) == 1


def test_a_missing_image_is_one_line(tmp_path: Path) -> None:
    rows = rows_of("image file", [1, 2], tmp_path)
    (tmp_path / "2.png").unlink()
    with pytest.raises(UNSCError, match=r"dataset: an image cannot be read \(.*2.png'\); leave it out"):
        input_digests(rows)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.lists(st.integers(0, 6), min_size=1, max_size=8))
def test_overlap_is_refused_counted_or_dropped(forget: list[int], retain: list[int]) -> None:
    parts = [Dataset.from_dict({"text": [f"text {value}" for value in values]}) for values in (forget, retain)]
    apart = [value for value in retain if value not in forget]
    shared = len(retain) - len(apart)
    if not shared:
        assert without_overlap(*parts) is parts[1]
        return
    number = f"{shared} of {len(retain)} rows to keep are also among the {len(forget)} rows to forget"
    with pytest.raises(UNSCError, match=number):
        without_overlap(*parts)
    if not apart:
        with pytest.raises(UNSCError, match="nothing to keep"):
            without_overlap(*parts, drop=True)
        return
    assert without_overlap(*parts, drop=True)["text"][:] == [f"text {value}" for value in apart]


def test_what_is_dropped_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    parts = [Dataset.from_dict({"text": values}) for values in (["a"], ["a", "b"])]
    with caplog.at_level(logging.WARNING):
        without_overlap(*parts, drop=True)
    assert "drop_overlap: 1 of 2 rows to keep are also among the 1 rows to forget; they are not kept." in caplog.text


def test_held_out_rows_lose_copies_alone() -> None:
    trained, held_out = (Dataset.from_dict({"text": values}) for values in (["a", "b"], ["c", "a", "c", "d"]))
    assert without_copies(held_out, trained)["text"][:] == ["c", "c", "d"]
    assert without_copies(trained, held_out.select([0])) is trained
    assert len(without_copies(trained, trained)) == 0
