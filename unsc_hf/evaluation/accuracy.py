"""Accuracies, in the literature's names: AccDf, AccDr on training rows, AccDut, AccDrt on test rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np


def per_class_accuracy(predictions: Any, labels: Any) -> dict[int, float]:
    """Share of right predictions for each class that occurs in `labels`.

    Args:
        predictions: ids, shape (rows,), or logits, shape (rows, labels).
        labels: ids, shape (rows,).
    """
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.ndim == 2:
        predictions = predictions.argmax(1)
    return {int(c): float((predictions[labels == c] == c).mean()) for c in np.unique(labels)}


def macro_accuracy(predictions: Any, labels: Any, classes: Iterable[int] | None = None) -> float | None:
    """Mean over classes of the accuracy on each (all that occur when `classes` is None); None when none occurs."""
    by_class = per_class_accuracy(predictions, labels)
    chosen = [value for label, value in by_class.items() if classes is None or label in set(classes)]
    return float(np.mean(chosen)) if chosen else None
