"""Which column holds the labels or the text, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow
from datasets import ClassLabel, Dataset, Value

from ..errors import UNSCError

LABEL_COLUMNS = ("label", "labels", "fine_label", "intent")


TEXT_COLUMNS = (
    ("text",), ("sentence",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("content",), ("utterance",),
)  # fmt: skip


def find_text_columns(dataset: Dataset, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """The column with the text, or the two columns of a pair.

    Raises:
        UNSCError: a named column is missing, or none can be found; the columns are listed.
    """
    columns = ", ".join(dataset.column_names)
    if given:
        for name in given:
            if name not in dataset.column_names:
                raise UNSCError(f"text_columns: no column {name!r} in the data set; columns are {columns}.")
        return tuple(given)
    for names in TEXT_COLUMNS:
        if all(name in dataset.column_names for name in names):
            return names
    strings = [name for name, feature in dataset.features.items() if _is_text(feature)]
    if len(strings) == 1:
        return (strings[0],)
    raise UNSCError(f"text_columns: cannot tell which of the columns {columns} hold the text; name them.")


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def find_label_column(dataset: Dataset, label_column: str | None = None) -> str:
    """Name of the column that holds class labels.

    Raises:
        UNSCError: when the named column is missing, or none can be found; the columns are listed.
    """
    _check_dataset(dataset)
    if label_column is not None:
        if label_column not in dataset.column_names:
            raise UNSCError(
                f"label_column: no column {label_column!r} in the data set; columns are {', '.join(dataset.column_names)}."
            )
        return label_column
    for name in LABEL_COLUMNS:
        if name in dataset.column_names:
            return name
    typed = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    if len(typed) == 1:
        return typed[0]
    raise UNSCError(f"label_column: none of the columns {', '.join(dataset.column_names)} looks like labels; name one.")


def read_labels(dataset: Dataset, label_column: str | None = None) -> np.ndarray:
    """Class ids of all rows, int64 of shape (rows,); string labels are refused with advice.

    Raises:
        UNSCError: missing column or non-integer labels.
    """
    column = find_label_column(dataset, label_column)
    found = dataset.select_columns([column]).with_format("arrow")[:].column(0)
    if pyarrow.types.is_integer(found.type) and not found.null_count:
        return found.to_numpy().astype(np.int64)
    values = found.to_pylist()
    if any(not isinstance(value, int) or isinstance(value, bool) for value in values):
        odd = next(v for v in values if not isinstance(v, int) or isinstance(v, bool))
        raise UNSCError(
            f"label_column: column {column!r} holds {odd!r}, not class ids; use dataset.class_encode_column({column!r})."
        )
    return np.asarray(values, dtype=np.int64)


def class_names(dataset: Dataset, label_column: str | None = None) -> list[str] | None:
    """Names of the classes when the label column is a ClassLabel, else None."""
    feature = dataset.features[find_label_column(dataset, label_column)]
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def group_labels(dataset: Dataset, label_column: str | None = None) -> tuple[np.ndarray, dict[str, str]]:
    """Class of each row as text, and the readable name of each class."""
    labels = read_labels(dataset, label_column).astype(str)
    names = class_names(dataset, label_column) or []
    return labels, {str(i): name for i, name in enumerate(names)}


def check_labels_match(
    dataset: Dataset, label_column: str | None, num_labels: int, model_names: Sequence[str] | None
) -> None:
    """Refuse a data set whose labels are not the model's.

    Raises:
        UNSCError: an id the model has no output for, or names that stand in another order.
    """
    labels = read_labels(dataset, label_column)
    worst = int(labels.max()) if len(labels) else 0
    if worst >= num_labels or (len(labels) and int(labels.min()) < 0):
        bad = worst if worst >= num_labels else int(labels.min())
        raise UNSCError(
            f"model: has {num_labels} labels, but the data set holds label {bad}; load the model trained on this data."
        )
    names = class_names(dataset, label_column)
    generic = model_names is None or all(name == f"LABEL_{i}" for i, name in enumerate(model_names))
    if names is None or generic:
        return
    assert model_names is not None
    if len(names) != len(model_names):
        raise UNSCError(
            f"model: has {len(model_names)} labels, the data set {len(names)}; load the model trained on this data."
        )
    for i, (ours, theirs) in enumerate(zip(names, model_names, strict=True)):
        if _plain(ours) != _plain(theirs):
            raise UNSCError(
                f"model: calls label {i} {theirs!r}, the data set {ours!r}; load the model trained on this data."
            )


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _check_dataset(dataset: Any) -> None:
    if not isinstance(dataset, Dataset):
        raise UNSCError(
            f"dataset: got {type(dataset).__name__}, expected a datasets.Dataset; choose a split, or use Dataset.from_dict."
        )
