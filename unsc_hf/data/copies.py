"""Rows that are copies of others: a model reads the same from both, whatever their labels say."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
from datasets import Dataset, Image

from ..errors import UnreadableRowError, UNSCError, first_line
from ..utils.fingerprint import row_digests
from .columns import LABEL_COLUMNS, TEXT_COLUMNS, is_text

logger = logging.getLogger(__name__)

# What models read of rows that are ready for them, and what language models read of raw rows.
_READ = (("pixel_values",), ("input_ids",), ("inputs_embeds",), ("prompt", "completion"), ("question", "answer"))


def input_digests(dataset: Dataset, text_columns: Sequence[str] | None = None) -> list[str]:
    """A hash of what a model reads of each row, as it is stored; labels and other columns do not count.

    Raises:
        UnreadableRowError: an image file is missing.
    """
    names = set(dataset.column_names)
    read = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    if not read:
        known = (tuple(text_columns or ()), *_READ, *TEXT_COLUMNS)
        read = list(next((columns for columns in known if columns and names.issuperset(columns)), ()))
    read = read or [name for name, feature in dataset.features.items() if is_text(feature)]
    read = read or [name for name in dataset.column_names if name not in LABEL_COLUMNS]
    try:
        return row_digests(dataset.select_columns(read))
    except OSError as error:
        raise UnreadableRowError(f"dataset: an image cannot be read ({first_line(error)}); leave it out.") from error


def copies(dataset: Dataset, others: Dataset, text_columns: Sequence[str] | None = None) -> np.ndarray:
    """Which rows are copies of a row of `others`, bool of shape (rows,)."""
    known = set(input_digests(others, text_columns))
    return np.array([digest in known for digest in input_digests(dataset, text_columns)], dtype=bool)


def without_overlap(
    forget: Dataset, retain: Dataset, drop: bool = False, text_columns: Sequence[str] | None = None
) -> Dataset:
    """The rows to keep, none of which is a copy of a row to forget.

    Args:
        forget, retain: rows to forget and to keep.
        drop: leave copies out of the rows to keep, instead of refusing them.

    Raises:
        UNSCError: copies that are not to be dropped, or nothing but copies.
    """
    shared = copies(retain, forget, text_columns)
    number = f"{int(shared.sum())} of {len(retain)} rows to keep are also among the {len(forget)} rows to forget"
    if shared.all():
        raise UNSCError(f"retain_dataset: {number}, so there is nothing to keep; give other rows to keep.")
    if not shared.any():
        return retain
    if not drop:
        raise UNSCError(
            f"retain_dataset: {number}, and cannot be both; leave them out of the rows to keep yourself, or with "
            "drop_overlap (--drop_overlap)."
        )
    logger.warning("drop_overlap: %s; they are not kept.", number)
    return retain.select(np.flatnonzero(~shared))


def without_copies(held_out: Dataset, trained: Dataset, text_columns: Sequence[str] | None = None) -> Dataset:
    """The held-out rows that are no copies of trained ones; none may be left."""
    shared = copies(held_out, trained, text_columns)
    return held_out.select(np.flatnonzero(~shared)) if shared.any() else held_out
