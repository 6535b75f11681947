"""What every task offers, and the register of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel

from ..config import UNSCConfig
from ..errors import UNSCError
from ..models.outputs import Outputs
from ..objectives.pseudo_labels import Matching


@dataclass(frozen=True)
class Measure:
    """Forgetting or keeping on some rows, against the true labels: means, and the rows of a classifier."""

    accuracy: float
    loss: float  #: mean; where whole classes are forgotten, that of the class with the smallest
    losses: Tensor | None = None  #: of each row of a classifier, (rows,); None for language models
    outputs: Outputs | None = None  #: of a classifier, which are small; None for language models

    def row_losses(self) -> Tensor:
        """The loss of each row; TypeError where tokens are measured, not rows."""
        if self.losses is None:
            raise TypeError("the losses of single rows are measured for classifiers alone.")
        return self.losses

    def in_order(self) -> Measure:
        """With its losses sorted."""
        return replace(self, losses=self.row_losses().sort().values)


class Task(ABC):
    """What differs between kinds of models: how rows are prepared, what a label is, what forgetting is measured by.

    A task is one file: a subclass with the decorator `@register`. The most specific task that accepts a model is used.
    """

    specificity: ClassVar[int] = 0  #: of several tasks that accept a model, the largest is used
    whole_classes: bool = False  #: whether no retained row shares a class with a forget row
    forgotten_classes: Sequence[int] = ()  #: ids that occur among the forget rows but not among the retained ones
    remaining_classes: Sequence[int] = ()  #: ids that occur among the retained rows
    class_names: Sequence[str] = ()  #: by id
    label_column: str | None = None  #: where labels are; None where rows have no single label
    preprocess_logits: Any = None  #: `Trainer`'s `preprocess_logits_for_metrics`

    @classmethod
    @abstractmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Whether this task is meant for the model."""

    @abstractmethod
    def __init__(
        self, model: PreTrainedModel, args: UNSCConfig, forget: Dataset, retain: Dataset, processing_class: Any
    ) -> None:
        """Check that the rows fit the model; UNSCError where they do not."""

    @abstractmethod
    def default_collator(self) -> Any:
        """Makes batches of prepared rows."""

    @abstractmethod
    def prepare(self, dataset: Dataset) -> Dataset:
        """Rows ready for the model."""

    @abstractmethod
    def strata(self, dataset: Dataset) -> np.ndarray:
        """Stratum of each row, (rows,): rows of each are held out."""

    @abstractmethod
    def groups(self, dataset: Dataset) -> np.ndarray:
        """Group of each row in the statistics, (rows,)."""

    @abstractmethod
    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Logits of a batch."""

    @abstractmethod
    def outputs(self, logits: Tensor, labels: Tensor) -> Outputs:
        """Logits and labels of the labelled positions of a batch."""

    @abstractmethod
    def targets(
        self, strategy: str, forget: Outputs, retain: Outputs | None, matching: Matching | None
    ) -> list[dict[str, Tensor]]:
        """For each forget row its "pseudo_labels", and "reference", the log-likelihood under the original model."""

    @abstractmethod
    def collate_targets(self, batch: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        """Add the targets of `rows` to their batch."""

    @abstractmethod
    def positions(self, logits: Tensor, labels: Tensor, pseudo: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits, labels, targets and sample numbers of the labelled positions of a training batch."""

    @abstractmethod
    def measure(self, outputs: Iterator[Outputs]) -> Measure:
        """How well rows are known."""

    @abstractmethod
    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics of `Trainer.evaluate`."""

    def refusals(self, inputs: dict[str, Tensor], labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """A batch with a refusal in place of each answer: inputs and labels.

        Raises:
            UNSCError: rows that are not answered in words.
        """
        raise UNSCError("objective: 'idk_dpo' puts refusals in place of answers; it is for language models alone.")


TASKS: list[type[Task]] = []


def register(task: type[Task]) -> type[Task]:
    """Decorator: make a task known."""
    TASKS.append(task)
    return task
