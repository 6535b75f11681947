"""Which rows are forgotten, kept or held out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from ..errors import UNSCError, closest
from .columns import check_column, check_dataset, class_names, read_labels

WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")


class Split(NamedTuple):
    """Rows to forget and rows to keep; both are views of the same data set."""

    forget: Dataset
    retain: Dataset


def resolve_classes(
    classes: Iterable[Any] | str | int, names: Sequence[str] | None, present: Iterable[int]
) -> list[int]:
    """Class ids of `classes`, given by name or id.

    Args:
        classes: names, ids, or ids as text.
        names: class names by id, if known.
        present: ids that occur in the data.

    Raises:
        UNSCError: unknown name (the closest are listed), id out of range, class absent from the data, or an empty list.
    """
    if isinstance(classes, str | int):
        classes = [classes]
    present = sorted(set(present))
    ids: list[int] = []
    for item in classes:
        text = str(item)
        if names is not None and text in names:
            ids.append(list(names).index(text))
            continue
        known = [str(i) for i in present] if names is None else list(names)
        if not WHOLE_NUMBER.fullmatch(text):
            raise UNSCError(f"forget_classes: no class {text!r}; closest: {closest(text, known)}.")
        number = int(text)
        if names is not None and not 0 <= number < len(names):
            raise UNSCError(
                f"forget_classes: id {number} is out of range; the data set has classes 0 to {len(names) - 1}."
            )
        ids.append(number)
    if not ids:
        raise UNSCError("forget_classes: empty; name at least one class.")
    absent = next((number for number in ids if number not in present), None)
    if absent is not None:
        label = absent if names is None else names[absent]
        raise UNSCError(
            f"forget_classes: class {label!r} ({absent}) has no rows in the data; present ids: {present[:20]}."
        )
    return sorted(set(ids))


def split_dataset(
    dataset: Dataset,
    forget_classes: Iterable[Any] | str | int | None = None,
    indices: Iterable[int] | None = None,
    where: Callable[[dict[str, Any]], bool] | None = None,
    column_values: Mapping[str, Any] | None = None,
    label_column: str | None = None,
) -> Split:
    """Split into rows to forget and rows to keep.

    Args:
        dataset: a `datasets.Dataset`.
        forget_classes: class names or ids.
        indices: row numbers.
        where: predicate on a row; rows for which it is true are forgotten.
        column_values: `{"author": [3, 7]}` takes the rows whose column holds one of the values.
        label_column: found by itself when None.

    Exactly one of `forget_classes`, `indices`, `where` and `column_values` must be given.

    Raises:
        UNSCError: a bad selection, or one of the two parts would be empty.
    """
    check_dataset(dataset)
    selections = {"forget_classes": forget_classes, "indices": indices, "where": where, "column_values": column_values}
    given = [name for name, value in selections.items() if value is not None]
    if len(given) != 1:
        raise UNSCError(f"split_dataset: got {given or 'nothing'}; give exactly one of {', '.join(selections)}.")
    if forget_classes is not None:
        labels = read_labels(dataset, label_column)
        ids = resolve_classes(forget_classes, class_names(dataset, label_column), labels.tolist())
        chosen = np.isin(labels, ids)
        if chosen.all():
            raise UNSCError(
                f"forget_classes: all {len(ids)} classes of the data would be forgotten; keep at least one."
            )
    elif indices is not None:
        chosen = _rows_by_index(indices, len(dataset))
    elif column_values is not None:
        chosen = _rows_by_value(dataset, column_values)
    elif where is not None:
        chosen = np.fromiter((bool(where(row)) for row in dataset), dtype=bool, count=len(dataset))
    if not chosen.any():
        raise UNSCError(f"{given[0]}: selects no row of {len(dataset)}; there is nothing to forget.")
    if chosen.all():
        raise UNSCError(f"{given[0]}: selects all {len(dataset)} rows; there is nothing left to retain.")
    return Split(dataset.select(np.flatnonzero(chosen)), dataset.select(np.flatnonzero(~chosen)))


def _rows_by_index(indices: Iterable[int], count: int) -> np.ndarray:
    rows = np.asarray(list(indices), dtype=np.int64)
    outside = rows[(rows < 0) | (rows >= count)]
    if len(outside):
        raise UNSCError(f"indices: {int(outside[0])} is out of range; the data set has rows 0 to {count - 1}.")
    values, counts = np.unique(rows, return_counts=True)
    if (counts > 1).any():
        raise UNSCError(f"indices: row {int(values[counts > 1][0])} is given more than once.")
    chosen = np.zeros(count, dtype=bool)
    chosen[rows] = True
    return chosen


def _rows_by_value(dataset: Dataset, column_values: Mapping[str, Any]) -> np.ndarray:
    """Rows where every named column holds one of its values. Values are compared as text, so "3" matches 3."""
    chosen = np.ones(len(dataset), dtype=bool)
    for column, wanted in column_values.items():
        check_column(dataset, column, "column_values")
        accepted = {str(value) for value in ([wanted] if isinstance(wanted, str | int | float) else wanted)}
        stored = dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()
        values = np.asarray([str(value) for value in stored])
        present = set(values.tolist())
        absent = sorted(accepted - present)
        if absent:
            raise UNSCError(
                f"column_values: no row has {column} {absent[0]!r}; closest: {closest(absent[0], present)}."
            )
        chosen &= np.isin(values, sorted(accepted))
    return chosen


@dataclass(frozen=True)
class Request:
    """Which rows to forget: one of the selections that `split_dataset` takes.

    Attributes:
        forget_classes: names or ids.
        indices: row numbers in the training data.
        column_values: values by column.
        option: name of the selection on the command line, for errors; its name above when None.
    """

    forget_classes: tuple[Any, ...] | None = None
    indices: tuple[int, ...] | None = None
    column_values: Mapping[str, Any] | None = None
    option: str | None = field(default=None, compare=False)

    def split(self, dataset: Dataset, label_column: str | None = None) -> Split:
        """Rows to forget and rows to keep.

        Raises:
            UNSCError: as `split_dataset`, but naming `option`.
        """
        try:
            return split_dataset(
                dataset, self.forget_classes, self.indices, None, self.column_values, label_column=label_column
            )
        except UNSCError as error:
            argument, _, message = str(error).partition(": ")
            if self.option is None or getattr(self, argument, None) is None:
                raise
            raise UNSCError(f"{self.option}: {message}") from None


def hold_out(dataset: Dataset, fraction: float, labels: np.ndarray, limit: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split off a validation part, stratified by class; returns (rest, held out).

    Each class with two rows or more gives at least one. If there is only one row, both parts are that row.

    Args:
        dataset: rows to split.
        fraction: share of the rows to hold out.
        labels: class of each row, (rows,).
        limit: most rows to hold out.
        seed: draws the rows.
    """
    if len(dataset) == 1:
        return dataset, dataset
    rng = np.random.default_rng(seed)
    wanted = min(fraction, limit / len(dataset))
    held: list[int] = []
    for value in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == value))
        held.extend(members[: min(max(1, round(wanted * len(members))), len(members) - 1)].tolist())
    if not held:
        held = [int(rng.integers(len(dataset)))]
    mask = np.zeros(len(dataset), dtype=bool)
    mask[held] = True
    return dataset.select(np.flatnonzero(~mask)), dataset.select(np.flatnonzero(mask))


def evenly_spaced(rows: np.ndarray, limit: int | None) -> np.ndarray:
    """At most `limit` of the rows, evenly spaced; all of them when None."""
    if limit is None or len(rows) <= limit:
        return rows
    return rows[np.linspace(0, len(rows) - 1, limit).astype(np.int64)]


def at_most_per_class(labels: Any, limit: int) -> np.ndarray:
    """Row numbers of at most `limit` rows of each class, int64, one class after another; always the same ones.

    `labels` are the class of each row, an array or a CPU tensor of shape (rows,).
    """
    labels, rng = np.asarray(labels), np.random.default_rng(0)
    return np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:limit] for c in np.unique(labels)])
