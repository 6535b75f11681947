"""How much to erase, where retrained models are at hand: until a probe reads as much as it reads in them, on validation rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from .errors import UNSCError
from .evaluation.band import Band, choose_strength
from .evaluation.probes import linear_probe
from .feature_erasure import Batch, evenly, row_batches
from .readings import Reading, find_readings

if TYPE_CHECKING:
    from .trainer import UNSCTrainer

logger = logging.getLogger(__name__)

_ROWS_PER_CLASS = 200  # rows of each class that a probe is taught on


class ProbeBands:
    """Bands of what a probe reads in retrained models, and the strengths of erasure that reach them.

    The probe is taught on training rows, and asked about the forget rows that the trainer holds out for validation.
    """

    def __init__(self, trainer: UNSCTrainer, references: Sequence[Callable[[], nn.Module]]) -> None:
        """
        Args:
            trainer: of whole classes.
            references: each gives a retrained model; they are held one at a time.

        Raises:
            UNSCError: a language model or single rows, fewer than two references, or one with other hidden states.
        """
        if trainer.task.label_column is None or not trainer.whole_classes:
            raise UNSCError("references: bands of a probe need whole classes to be forgotten; leave them out.")
        self._trainer = trainer
        forget, retain = trainer._forget_train, trainer._retain_train
        known = trainer.task.strata(retain)
        chosen = [evenly(np.flatnonzero(known == c), _ROWS_PER_CLASS) for c in trainer.remaining_classes]
        mine = trainer.task.strata(forget)
        wanted = [evenly(np.flatnonzero(mine == c), _ROWS_PER_CLASS) for c in trainer.forgotten_classes]
        batches = partial(row_batches, trainer)
        taught = [*batches(forget.select(np.concatenate(wanted))), *batches(retain.select(np.concatenate(chosen)))]
        asked = batches(trainer._forget_validation)
        self._rows: tuple[Sequence[Batch], Sequence[Batch]] = (taught, asked)
        readings: dict[str, list[float]] = {}
        counts = []
        for load in references:
            model = load().to(trainer.args.device)
            places = find_readings(model, trainer.args.feature_erasure == "layers", False, asked[0])
            counts.append(len(places))
            for place in places:
                readings.setdefault(place.name, []).append(self._probe(model, place))
        own = len(find_readings(trainer.model, trainer.args.feature_erasure == "layers", False, asked[0]))
        if any(count != own for count in counts):
            raise UNSCError(
                f"references: a retrained model has {next(n for n in counts if n != own)} places to read, the original {own}; give models "
                "of the original's shape, or use feature_erasure='head'."
            )
        self.bands = {name: Band.of(values) for name, values in readings.items()}

    def __call__(self, reading: Reading, attempt: Callable[[float], None]) -> float:
        """The strength for one reading; see `FeatureEraser.erase`."""
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)

        def read(strength: float) -> float:
            attempt(strength)
            found = self._probe(model, reading)
            logger.info("%s: a probe reads %.3f at strength %.3g.", reading.name, found, strength)
            return found

        return choose_strength(read, self.bands[reading.name], trainer.args.erasure_strength)

    def _probe(self, model: nn.Module, reading: Reading) -> float:
        features, labels = zip(*(self._features(model, reading, part) for part in self._rows), strict=True)
        found = linear_probe(
            features[0], labels[0], features[1], labels[1], self._trainer.forgotten_classes, per_class=_ROWS_PER_CLASS
        )
        return float("nan") if found is None else found

    @staticmethod
    def _features(model: nn.Module, reading: Reading, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            rows = [reading.rows(model, batch).float().cpu() for batch in batches]
        return torch.cat(rows), torch.cat([batch["labels"].cpu() for batch in batches])
