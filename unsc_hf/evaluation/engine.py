"""One evaluation of every model: the same rows, accuracies and attacks in single runs and in comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ..data.columns import read_labels
from ..data.selection import at_most_per_class
from ..models.outputs import Outputs, RowOutputs
from .accuracy import kept_classes, macro_accuracy, of_classes, per_class_accuracy, row_accuracy
from .flips import count_flips
from .membership import attack_forgotten_rows
from .probes import Head, probe_head, prototype_attack
from .verdict import MethodResult

ROWS = 5000  # training rows to forget, and to keep, that every model is evaluated on: about so many of each ...
ROWS_PER_CLASS = 500  # ... and at most so many of a class


def sample_rows(rows: Dataset, labels: np.ndarray) -> Dataset:
    """About 5,000 rows, as many of each class and at most 500, always the same ones."""
    limit = min(ROWS_PER_CLASS, -(-ROWS // len(np.unique(labels))))
    return rows.select(np.sort(at_most_per_class(labels, limit)))


@dataclass(frozen=True)
class EvaluationRows:
    """The rows that every model is evaluated on: sampled training rows to forget and to keep, and all test rows."""

    forget: Dataset
    retain: Dataset
    test: Dataset

    @classmethod
    def sample(cls, forget: Dataset, retain: Dataset, test: Dataset, label_column: str | None) -> EvaluationRows:
        """Sample the training rows."""
        forget, retain = (sample_rows(rows, read_labels(rows, label_column)) for rows in (forget, retain))
        return cls(forget, retain, test)

    def outputs(self, collect: Callable[[Dataset], Outputs]) -> RowOutputs:
        """Outputs of a model; `collect` runs it on raw rows."""
        return RowOutputs(collect(self.forget), collect(self.retain), collect(self.test))


def accuracies(outputs: RowOutputs, forgotten: Sequence[int]) -> dict[str, Any]:
    """`AccDut`, `AccDrt`, `AccDf`, `AccDr` and `per_class`, the test accuracy by class id.

    Where no class is `forgotten` whole, single rows are, and AccDf is the share of them that the model knows.
    """
    forget, retain, test = outputs.forget, outputs.retain, outputs.test
    kept = kept_classes(test.logits.shape[1], forgotten)
    return {
        "AccDut": macro_accuracy(test.logits, test.labels, forgotten),
        "AccDrt": macro_accuracy(test.logits, test.labels, kept),
        "AccDf": macro_accuracy(forget.logits, forget.labels) if forgotten else row_accuracy(forget),
        "AccDr": macro_accuracy(retain.logits, retain.labels, kept),
        "per_class": per_class_accuracy(test.logits, test.labels),
    }


def output_metrics(outputs: RowOutputs, forgotten: Sequence[int]) -> dict[str, Any]:
    """What the logits say: accuracies, the membership attack, and what forgotten test rows are called."""
    attack = attack_forgotten_rows(outputs, forgotten) if _finite(outputs) else {}
    membership = {f"mia_{name}": attack.get(name) for name in ("auc", "tpr_at_1pct_fpr")}
    test = outputs.test
    answers = {c: _shares(test.logits[test.labels == c].argmax(1)) for c in forgotten if bool((test.labels == c).any())}
    return {**accuracies(outputs, forgotten), **membership, "answers": answers or None}


def _shares(answers: Tensor) -> dict[int, float]:
    """Share of each answer among `answers`, (rows,)."""
    ids, counts = np.unique(answers.numpy(), return_counts=True)
    return {int(c): int(count) / len(answers) for c, count in zip(ids, counts, strict=True)}


def kept_changes(outputs: Outputs, original: Outputs, forgotten: Sequence[int]) -> dict[str, float]:
    """Flips, negative flips and drift against the original model, on the test rows of the remaining classes."""
    kept = ~of_classes(outputs.labels, forgotten)
    if not bool(kept.any()):
        return {}
    flips = count_flips(original.logits[kept], outputs.logits[kept], outputs.labels[kept], forgotten)
    return {"flips": flips.share, "negative_flips": flips.negative_share, "drift": flips.drift}


def evaluate_outputs(
    outputs: RowOutputs,
    head: Head,
    forgotten: Sequence[int],
    leak: float | None,
    seconds: float | None,
    original: RowOutputs | None = None,
) -> MethodResult:
    """All metrics of a model, from its outputs with features and its head; for `leak` and `seconds` see `MethodResult`.

    `forgotten` is empty for single rows. Decisions are compared with those of `original`, if it is given.
    """
    metrics, examined = output_metrics(outputs, forgotten), bool(forgotten) and _finite(outputs)
    probe = probe_head(outputs, forgotten) if examined else None
    prototype = prototype_attack(outputs, head, forgotten, shots=10) if examined else None
    changed = {} if original is None else kept_changes(outputs.test, original.test, forgotten)
    results = {**metrics, **changed, "probe_forget": probe, "prototype_attack_10": prototype}
    return MethodResult(**results, leak=leak, seconds=seconds)


def _finite(outputs: RowOutputs) -> bool:
    """Whether the features are numbers: a control may diverge."""
    parts = (outputs.forget, outputs.retain, outputs.test)
    return all(bool(torch.isfinite(part.need_features()).all()) for part in parts)
