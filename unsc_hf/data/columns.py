"""Which column holds the labels or the text, and its values."""

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


def check_dataset(dataset: Any) -> None:
    """Raise UNSCError for anything but a `datasets.Dataset`, such as a `DatasetDict`."""
    if not isinstance(dataset, Dataset):
        raise UNSCError(
            f"dataset: got {type(dataset).__name__}, expected a datasets.Dataset; choose a split, or use "
            "Dataset.from_dict."
        )


def check_column(dataset: Dataset, column: str, argument: str) -> None:
    """Raise UNSCError, which names `argument` and lists the columns, when `column` is missing."""
    if column not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise UNSCError(f"{argument}: no column {column!r} in the data set; columns are {columns}.")


def is_text(feature: Any) -> bool:
    """Whether a column of this feature holds strings."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def find_text_columns(dataset: Dataset, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """The column with the text, or the two columns of a pair.

    Raises:
        UNSCError: a named column is missing, or none can be found; the columns are listed.
    """
    if given:
        for name in given:
            check_column(dataset, name, "text_columns")
        return tuple(given)
    for names in TEXT_COLUMNS:
        if all(name in dataset.column_names for name in names):
            return names
    strings = [name for name, feature in dataset.features.items() if is_text(feature)]
    if len(strings) == 1:
        return (strings[0],)
    columns = ", ".join(dataset.column_names)
    raise UNSCError(f"text_columns: cannot tell which of the columns {columns} hold the text; name them.")


def find_label_column(dataset: Dataset, label_column: str | None = None) -> str:
    """Name of the column that holds class labels.

    Raises:
        UNSCError: the named column is missing, or none can be found; the columns are listed.
    """
    check_dataset(dataset)
    if label_column is not None:
        check_column(dataset, label_column, "label_column")
        return label_column
    for name in LABEL_COLUMNS:
        if name in dataset.column_names:
            return name
    typed = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    if len(typed) == 1:
        return typed[0]
    columns = ", ".join(dataset.column_names)
    raise UNSCError(f"label_column: none of the columns {columns} looks like labels; name one.")


def read_labels(dataset: Dataset, label_column: str | None = None) -> np.ndarray:
    """Class ids of all rows, int64 of shape (rows,).

    Raises:
        UNSCError: the column is missing, or holds something else than integers.
    """
    column = find_label_column(dataset, label_column)
    stored = dataset.select_columns([column]).with_format("arrow")[:].column(0)
    if pyarrow.types.is_integer(stored.type) and not stored.null_count:
        return stored.to_numpy().astype(np.int64)
    values = stored.to_pylist()
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool):
            raise UNSCError(
                f"label_column: column {column!r} holds {value!r}, not class ids; use "
                f"dataset.class_encode_column({column!r})."
            )
    return np.asarray(values, dtype=np.int64)


def class_names(dataset: Dataset, label_column: str | None = None) -> list[str] | None:
    """Names of the classes when the label column is a ClassLabel, else None."""
    feature = dataset.features[find_label_column(dataset, label_column)]
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def group_labels(dataset: Dataset, label_column: str | None = None) -> tuple[np.ndarray, dict[str, str]]:
    """Class of each row as text, and the readable name of each class."""
    labels = read_labels(dataset, label_column).astype(str)
    return labels, {str(i): name for i, name in enumerate(class_names(dataset, label_column) or ())}


def check_labels_match(
    dataset: Dataset, label_column: str | None, num_labels: int, model_names: Sequence[str] | None
) -> None:
    """Refuse a data set whose labels are not the model's.

    Names are compared without case and punctuation, and not at all where the model has only `LABEL_0`, `LABEL_1`, ...

    Raises:
        UNSCError: an id the model has no output for, or names in another order.
    """
    advice = "load the model trained on this data."
    labels = read_labels(dataset, label_column)
    outside = labels[(labels < 0) | (labels >= num_labels)]
    if len(outside):
        worst = outside.max() if outside.max() >= num_labels else outside.min()
        raise UNSCError(f"model: has {num_labels} labels, but the data set holds label {worst}; {advice}")
    names = class_names(dataset, label_column)
    if names is None or model_names is None or all(name == f"LABEL_{i}" for i, name in enumerate(model_names)):
        return
    if len(names) != len(model_names):
        raise UNSCError(f"model: has {len(model_names)} labels, the data set {len(names)}; {advice}")
    for i, pair in enumerate(zip(model_names, names, strict=True)):
        theirs, ours = ("".join(filter(str.isalnum, name.lower())) for name in pair)
        if ours != theirs:
            raise UNSCError(f"model: calls label {i} {pair[0]!r}, the data set {pair[1]!r}; {advice}")
