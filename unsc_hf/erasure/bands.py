"""Where retrained models are at hand: erase until a probe reads as much as it reads in them, on validation rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..data.selection import evenly_spaced
from ..errors import UNSCError
from ..evaluation.probes import linear_probe
from ..evaluation.verdict import Band
from ..models.loading import own_processor
from .eraser import Attempt
from .readings import Batch, FeatureRows, Reading, find_readings, read_rows

logger = logging.getLogger(__name__)

ProbeRows = tuple[Sequence[Batch], Sequence[Batch]]  # that a probe is taught on, and asked about

ROWS_PER_CLASS = 200  # rows of each class that a probe is taught on
ROWS = 4_000  # of all classes together: a probe of 150 classes would take longer than unlearning
FEWEST_ROWS = 25  # of each class in any case
TRIES = 5


def choose_strength(read: Callable[[float], float], band: Band, start: float) -> float:
    """The strength of erasure in [0, 1] whose reading on *validation* rows lies nearest the middle of the band.

    The reading falls as the strength grows, so the interval is bisected, from `start` on. The search ends after five
    tries, or as soon as a reading lies in the inner half of the band.
    """
    seen: dict[float, float] = {}
    low, high, at = 0.0, 1.0, start
    for _ in range(TRIES):
        seen[at] = read(at)
        if band.distance(seen[at]) <= 0.5:
            break
        low, high = (at, high) if seen[at] > band.mean else (low, at)
        at = (low + high) / 2 if high - low > 0.05 or high < 1 else 1.0
        if low == 0.0 and high <= 0.1:
            at = 0.0
        if at in seen:
            break
    return min(seen, key=lambda strength: band.distance(seen[strength]))


class ProbeBands:
    """Bands of what a probe reads in retrained models, and the strengths of erasure that reach them.

    The probe is taught on batches of training rows, `taught_on`, and asked about the forget rows that are held out for
    validation, `asked`. `bands` are by name of the reading.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: FeatureRows,
        references: Sequence[Callable[[], PreTrainedModel]],
        bands: Mapping[str, Band] | None = None,
    ) -> None:
        """Read the bands in the references, unless `bands` gives them by reading, for the same rows.

        `rows` are of whole classes. Each of `references` gives a retrained model, one at a time. One from a folder or
        the Hub reads raw rows by the tokenizer or image processor that was saved with it.

        Raises:
            UNSCError: a language model or single rows, fewer than two references, or one with other hidden states.
        """
        if not rows.task.whole_classes:
            raise UNSCError("references: bands of a probe need whole classes to be forgotten; leave them out.")
        self._model, self._args, self._forgotten = model, rows.args, rows.task.forgotten_classes
        classes = len(rows.task.remaining_classes) + len(self._forgotten)
        self._per_class = min(max(ROWS // classes, FEWEST_ROWS), ROWS_PER_CLASS)
        self.taught_on, self.asked = self._rows = self._batches(rows)
        self._chosen: dict[str, float] = {}
        self.bands = dict(bands) if bands is not None else self._read(rows, references)

    def __call__(self, reading: Reading, attempt: Attempt) -> float:
        """The strength for one reading; see `FeatureEraser.erase`. Asked again, it begins with what it chose before."""

        def read(strength: float) -> float:
            attempt(strength)
            (value,) = self._probes(self._model, [reading], self._rows)
            logger.info("%s: a probe reads %.3f at strength %.3g.", reading.name, value, strength)
            return value

        start = self._chosen.get(reading.name, self._args.erasure_strength)
        self._chosen[reading.name] = choose_strength(read, self.bands[reading.name], start)
        return self._chosen[reading.name]

    def _batches(self, rows: FeatureRows) -> ProbeRows:
        """Evenly spaced training rows of each class, forgotten ones first, and the held-out forget rows."""
        taught_on: list[Batch] = []
        for part, classes in ((rows.forget, self._forgotten), (rows.retain, rows.task.remaining_classes)):
            labels = rows.task.strata(part)
            chosen = [evenly_spaced(np.flatnonzero(labels == c), self._per_class) for c in classes]
            taught_on += rows.batches(part.select(np.concatenate(chosen)))
        return taught_on, rows.batches(rows.held_out)

    def _read(self, rows: FeatureRows, references: Sequence[Callable[[], PreTrainedModel]]) -> dict[str, Band]:
        places = len(self._readings(self._model))
        values: dict[str, list[float]] = {}
        for load in references:
            model = load().to(self._args.device)
            name = str(model.config._name_or_path or "")
            theirs = own_processor(name, rows.processor) if name else rows.processor
            readings = self._readings(model)
            if len(readings) != places:
                raise UNSCError(
                    f"references: a retrained model has {len(readings)} places to read, the original {places}; give "
                    "models of the original's shape, or use feature_erasure='head'."
                )
            batches = self._rows if theirs is rows.processor else self._batches(rows.read_by(model, theirs))
            for reading, value in zip(readings, self._probes(model, readings, batches), strict=True):
                values.setdefault(reading.name, []).append(value)
        return {name: Band.of(each) for name, each in values.items()} or {"head": Band.of([])}

    def _readings(self, model: nn.Module) -> list[Reading]:
        return find_readings(model, self._args.feature_erasure == "layers", False, self.asked[0])

    def _probes(self, model: nn.Module, readings: Sequence[Reading], rows: ProbeRows) -> list[float]:
        """What a probe of each reading says of the held-out forget rows; NaN where there are none."""
        train, test = (read_rows(model, readings, batches) for batches in rows)
        labels, asked = (torch.cat([batch["labels"].cpu() for batch in batches]) for batches in rows)
        values = [
            linear_probe(x, labels, y, asked, self._forgotten, per_class=self._per_class)
            for x, y in zip(train, test, strict=True)
        ]
        return [float("nan") if value is None else value for value in values]
