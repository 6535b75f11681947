"""Accuracies, in the literature's names: AccDf, AccDr on training rows, AccDut, AccDrt on test rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.outputs import Outputs


def per_class_accuracy(predictions: Any, labels: Any) -> dict[int, float]:
    """Share of right predictions, ids (rows,) or logits (rows, labels), for each class that occurs in `labels`,
    (rows,)."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.ndim == 2:
        predictions = predictions.argmax(1)
    return {int(c): float((predictions[labels == c] == c).mean()) for c in np.unique(labels)}


def macro_accuracy(predictions: Any, labels: Any, classes: Iterable[int] | None = None) -> float | None:
    """Mean over classes of the accuracy on each (all that occur when `classes` is None); None when none occurs."""
    by_class = per_class_accuracy(predictions, labels)
    wanted = set(by_class if classes is None else classes)
    chosen = [value for label, value in by_class.items() if label in wanted]
    return float(np.mean(chosen)) if chosen else None


def row_accuracy(outputs: Outputs) -> float:
    """Share of rows whose label is the most likely one."""
    return float((outputs.logits.argmax(-1) == outputs.labels).float().mean())


def of_classes(labels: Tensor, classes: Sequence[int]) -> Tensor:
    """Which rows are of the classes, bool, (rows,)."""
    return torch.isin(labels, torch.tensor(list(classes), dtype=labels.dtype, device=labels.device))


def kept_classes(classes: int, forgotten: Sequence[int]) -> list[int]:
    """Ids of the classes that remain, of all that a model has a logit for."""
    return [c for c in range(classes) if c not in set(forgotten)]
