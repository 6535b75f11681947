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
    """Refuse anything but a `datasets.Dataset`.

    Raises:
        UNSCError: it is something else, such as a `DatasetDict`.
    """
    if not isinstance(dataset, Dataset):
        raise UNSCError(
            f"dataset: got {type(dataset).__name__}, expected a datasets.Dataset; choose a split, or use "
            "Dataset.from_dict."
        )


def is_text(feature: Any) -> bool:
    """Whether a column of this feature holds strings."""
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


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
    strings = [name for name, feature in dataset.features.items() if is_text(feature)]
    if len(strings) == 1:
        return (strings[0],)
    raise UNSCError(f"text_columns: cannot tell which of the columns {columns} hold the text; name them.")


def find_label_column(dataset: Dataset, label_column: str | None = None) -> str:
    """Name of the column that holds class labels.

    Raises:
        UNSCError: the named column is missing, or none can be found; the columns are listed.
    """
    check_dataset(dataset)
    columns = ", ".join(dataset.column_names)
    if label_column is not None:
        if label_column not in dataset.column_names:
            raise UNSCError(f"label_column: no column {label_column!r} in the data set; columns are {columns}.")
        return label_column
    for name in LABEL_COLUMNS:
        if name in dataset.column_names:
            return name
    typed = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    if len(typed) == 1:
        return typed[0]
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
    names = class_names(dataset, label_column) or []
    return labels, {str(i): name for i, name in enumerate(names)}


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
    for i, (ours, theirs) in enumerate(zip(names, model_names, strict=True)):
        if _plain(ours) != _plain(theirs):
            raise UNSCError(f"model: calls label {i} {theirs!r}, the data set {ours!r}; {advice}")


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
