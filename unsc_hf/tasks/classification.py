"""Rows with one label each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel

from ..config import UNSCConfig
from ..data.columns import check_labels_match, class_names, find_label_column, group_labels, read_labels
from ..data.inputs import default_collator, prepare_dataset
from ..errors import UNSCError
from ..evaluation.accuracy import macro_accuracy, row_accuracy
from ..models.loading import model_label_names
from ..models.outputs import Outputs, classify, join_outputs, one_per_sample
from ..objectives.pseudo_labels import Matching, pseudo_labels
from .base import Measure, Task, register


@register
class ClassificationTask(Task):
    """Rows with one label each."""

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Every model that no other task accepts; labels are checked when the task is made."""
        return True

    def __init__(
        self, model: PreTrainedModel, args: UNSCConfig, forget: Dataset, retain: Dataset, processing_class: Any
    ) -> None:
        label_names = model_label_names(model)
        for dataset in (forget, retain):
            check_labels_match(dataset, args.label_column, model.config.num_labels, label_names)
        self._model, self._args, self._processing_class = model, args, processing_class
        self.class_names = class_names(forget, args.label_column) or label_names
        self.label_column = find_label_column(forget, args.label_column)
        wanted = set(read_labels(forget, args.label_column).tolist())
        kept = set(read_labels(retain, args.label_column).tolist())
        if len(wanted | kept) < 2:
            raise UNSCError(
                "retain_dataset: holds a single class, the one to forget; pseudo-labels need another class."
            )
        self.forgotten_classes, self.remaining_classes = sorted(wanted - kept), sorted(kept)
        self.whole_classes = not wanted & kept

    def default_collator(self) -> Any:
        return default_collator(self._processing_class)

    def prepare(self, dataset: Dataset) -> Dataset:
        columns = self._args.label_column, self._args.text_columns
        return prepare_dataset(dataset, self._processing_class, self._model, *columns)

    def strata(self, dataset: Dataset) -> np.ndarray:
        return read_labels(dataset, self._args.label_column)

    def groups(self, dataset: Dataset) -> np.ndarray:
        return group_labels(dataset, self._args.label_column)[0]

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        return classify(model, inputs)[0]

    def outputs(self, logits: Tensor, labels: Tensor) -> Outputs:
        return one_per_sample(logits, labels)

    def targets(
        self, strategy: str, forget: Outputs, retain: Outputs | None, matching: Matching | None
    ) -> list[dict[str, Tensor]]:
        labels = pseudo_labels(
            strategy,
            forget,
            self.remaining_classes,
            retain=retain,
            matching=matching,
            temperature=self._args.pseudo_label_temperature,
            seed=self._args.seed,
        )
        hard = labels if labels.dim() == 1 else labels.argmax(1)
        if strategy != "matched" and bool((hard == forget.labels).any()):
            raise RuntimeError("a pseudo-label equals the row's own label")
        reference = -F.cross_entropy(forget.logits, forget.labels, reduction="none")
        return [{"pseudo_labels": label, "reference": value} for label, value in zip(labels, reference, strict=True)]

    def collate_targets(self, batch: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        for name in ("pseudo_labels", "reference", "target_row"):
            if name in rows[0]:
                batch[name] = torch.stack([row[name] for row in rows])

    def positions(self, logits: Tensor, labels: Tensor, pseudo: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return logits, labels, pseudo, torch.arange(len(labels), device=labels.device)

    def measure(self, outputs: Iterator[Outputs]) -> Measure:
        """Over rows; where whole classes are forgotten, the mean accuracy of classes and the smallest of their losses.

        So a class that is still known is not hidden among others that are gone.
        """
        rows = join_outputs(list(outputs))
        accuracy = macro_accuracy(rows.logits, rows.labels) if self.whole_classes else row_accuracy(rows)
        losses = F.cross_entropy(rows.logits.double(), rows.labels, reduction="none")
        by_class = [float(losses[rows.labels == label].mean()) for label in torch.unique(rows.labels)]
        return Measure(accuracy or 0.0, min(by_class) if self.whole_classes else float(losses.mean()), losses, rows)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """The Trainer's own loss is a mean over batches, and several processes fill up the last one. This loss is the
        mean over rows, the same for any number of processes.
        """
        from ..evaluation.metrics import MacroAccuracy  # `evaluate` takes seconds to import

        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        given, labels = torch.as_tensor(np.asarray(logits)), torch.as_tensor(np.asarray(prediction.label_ids))
        metric = MacroAccuracy(keep_in_memory=True)
        accuracy: dict[str, float] = metric.compute(predictions=given.argmax(-1).numpy(), references=labels.numpy())
        return {**accuracy, "loss": float(F.cross_entropy(given.double(), labels))}
