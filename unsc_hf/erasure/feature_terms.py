"""What objectives that read features are given: the head's inputs of a batch, and the original model's class statistics."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.selection import at_most_per_class
from ..models.hooks import capture_inputs
from ..models.outputs import Outputs
from ..objectives.terms import ANSWERS, FeatureTargets
from ..utils.fingerprint import Fingerprint, data_fingerprint
from .class_statistics import ClassStatistics, feature_targets
from .eraser import row_batches
from .readings import Reading, find_readings

if TYPE_CHECKING:
    from ..trainer.trainer import UNSCTrainer

_ROWS_PER_CLASS = 500


class FeatureTerms:
    """Made from the original model, before the first step.

    Attributes:
        statistics: of the retained classes.
        targets: means and whitenings on the model's device.
        answers: whether the model is a language model, whose answer tokens are one group.
    """

    def __init__(self, trainer: UNSCTrainer, model: nn.Module, stored: Any = None) -> None:
        """
        Args:
            stored: the folder that holds the second moments, if there is one: class statistics of this model are read there, or written.

        Raises:
            UNSCError: a single retained class, damaged statistics, or features that are not finite.
        """
        self.answers = trainer.task.label_column is None
        self._reading: Reading = find_readings(model, False, self.answers, {})[0]
        folder = Path(stored) if isinstance(stored, str | os.PathLike) else None
        found = None
        if folder is not None and (folder / "class_statistics.json").is_file():
            found = ClassStatistics.from_pretrained(folder)
            found.check_same_model(trainer.original_weights)
            gone = set(trainer.forgotten_classes) & set(found.classes)
            found = found.without(gone) if gone else found
        if found is None:
            found = self._collect(trainer, model)
            if folder is not None and trainer.is_world_process_zero():
                found.save_pretrained(folder)
        self.statistics = found
        self.targets: FeatureTargets = feature_targets(found, trainer.args.device)

    def _collect(self, trainer: UNSCTrainer, model: nn.Module) -> ClassStatistics:
        """From at most 500 retained rows of each class."""
        retain = trainer._retain_train
        known = trainer.task.strata(retain)
        rows = np.sort(at_most_per_class(known, _ROWS_PER_CLASS))
        chosen = retain.select(rows)
        fingerprint = Fingerprint(
            weights=trainer.original_weights,
            data=data_fingerprint(chosen),
            model=trainer.base_model_name,
            samples=len(rows),
        )

        def parts() -> Iterator[Outputs]:
            for batch in row_batches(trainer, chosen):
                with torch.no_grad():
                    features = self._reading.rows(model, batch).float().cpu()
                labels = torch.full((len(features),), ANSWERS) if self.answers else batch["labels"].cpu()
                yield Outputs(features, features, labels)

        model.eval()
        return ClassStatistics.of(parts(), fingerprint)

    def forward(self, model: nn.Module, inputs: Mapping[str, Any], labels: Tensor) -> tuple[Any, Tensor]:
        """The model's outputs on a batch, and the head's inputs at its labelled positions, with the graph."""
        seen: list[Tensor] = []
        with capture_inputs([self._reading.head], lambda _, x: seen.append(x)):
            outputs = model(**inputs)
        return outputs, self._reading.of_head(seen[-1], {"labels": labels})
