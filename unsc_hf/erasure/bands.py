"""How much to erase, where retrained models are at hand: until a probe reads as much as it reads in them, on validation rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..data.selection import at_most_per_class
from ..errors import UNSCError
from ..evaluation.band import Band, choose_strength
from ..evaluation.probes import linear_probe
from ..models.loading import own_processor
from .eraser import Batch, row_batches
from .readings import Reading, find_readings, read_all

if TYPE_CHECKING:
    from ..trainer.trainer import UNSCTrainer

logger = logging.getLogger(__name__)


Rows = tuple[Sequence[Batch], Sequence[Batch]]  # that a probe is taught on, and asked about


_ROWS_PER_CLASS = 200  # rows of each class that a probe is taught on ...


_ROWS = 4_000  # ... fewer where they would be more than this in all: a probe of 150 classes takes longer than unlearning ...


_FEWEST_ROWS = 25  # ... but not fewer than these


class ProbeBands:
    """Bands of what a probe reads in retrained models, and the strengths of erasure that reach them.

    The probe is taught on training rows, and asked about the forget rows that the trainer holds out for validation.
    """

    def __init__(
        self,
        trainer: UNSCTrainer,
        references: Sequence[Callable[[], PreTrainedModel]],
        bands: Mapping[str, Band] | None = None,
    ) -> None:
        """
        Args:
            trainer: of whole classes.
            references: each gives a retrained model; they are held one at a time. One that was loaded from a folder or the Hub reads
                raw rows by the tokenizer or image processor that was saved with it.
            bands: of each reading, where they are known already for the same rows; `references` are not looked at then.

        Raises:
            UNSCError: a language model or single rows, fewer than two references, or one with other hidden states.
        """
        if trainer.task.label_column is None or not trainer.whole_classes:
            raise UNSCError("references: bands of a probe need whole classes to be forgotten; leave them out.")
        self._trainer = trainer
        forget, retain = trainer._forget_train, trainer._retain_train
        known, mine = trainer.task.strata(retain), trainer.task.strata(forget)
        classes = len(trainer.remaining_classes) + len(trainer.forgotten_classes)
        self._per_class = min(max(_ROWS // classes, _FEWEST_ROWS), _ROWS_PER_CLASS)
        kept = at_most_per_class(known, self._per_class, classes=trainer.remaining_classes)
        gone = at_most_per_class(mine, self._per_class, classes=trainer.forgotten_classes)
        self._parts = (forget.select(gone), retain.select(kept))
        self._rows = self._batches(None)
        self._last: dict[str, float] = {}
        self.bands = dict(bands) if bands is not None else self._read(references)

    def _batches(self, processor: Any) -> Rows:
        """Rows that a probe is taught on and asked about."""
        batches = partial(row_batches, self._trainer, processor=processor)
        return [batch for part in self._parts for batch in batches(part)], batches(self._trainer._forget_validation)

    def _read(self, references: Sequence[Callable[[], PreTrainedModel]]) -> dict[str, Band]:
        """Bands of every reading."""
        ours = self._trainer.processing_class
        own = len(self._places(self._trainer.model))
        found: dict[str, list[float]] = {}
        for load in references:
            model = load().to(self._trainer.args.device)
            name = str(model.config._name_or_path or "")
            theirs = own_processor(name, ours) if name else ours
            rows = self._rows if theirs is ours else self._batches(theirs)
            places = self._places(model)
            if len(places) != own:
                raise UNSCError(
                    f"references: a retrained model has {len(places)} places to read, the original {own}; give models of the original's "
                    "shape, or use feature_erasure='head'."
                )
            for place, value in zip(places, self._probes(model, places, rows), strict=True):
                found.setdefault(place.name, []).append(value)
        return {name: Band.of(values) for name, values in found.items()} or {"head": Band.of([])}

    def _places(self, model: nn.Module) -> list[Reading]:
        return find_readings(model, self._trainer.args.feature_erasure == "layers", False, self._rows[1][0])

    def __call__(self, reading: Reading, attempt: Callable[[float], None]) -> float:
        """The strength for one reading; see `FeatureEraser.erase`. Asked again, it begins with what it chose before."""
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)

        def read(strength: float) -> float:
            attempt(strength)
            (found,) = self._probes(model, [reading], self._rows)
            logger.info("%s: a probe reads %.3f at strength %.3g.", reading.name, found, strength)
            return found

        start = self._last.get(reading.name, trainer.args.erasure_strength)
        self._last[reading.name] = choose_strength(read, self.bands[reading.name], start)
        return self._last[reading.name]

    def _probes(self, model: nn.Module, readings: Sequence[Reading], rows: Rows) -> list[float]:
        """What a probe of each reading says of the held-out forget rows."""
        parts = []
        for batches in rows:
            with torch.no_grad():
                read = [read_all(model, readings, batch) for batch in batches]
            features = [torch.cat([part[i].float().cpu() for part in read]) for i in range(len(readings))]
            parts.append((features, torch.cat([batch["labels"].cpu() for batch in batches])))
        (taught, labels), (asked, unseen) = parts
        found = []
        for train, test in zip(taught, asked, strict=True):
            value = linear_probe(
                train, labels, test, unseen, self._trainer.forgotten_classes, per_class=self._per_class
            )
            found.append(float("nan") if value is None else value)
        return found
