"""What an audit is: a function of an `Examination` that returns named numbers, registered under its own name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from ...models.outputs import Outputs, RowOutputs
from ..accuracy import kept_classes, of_classes

Reading = dict[str, float | list[float]]


@dataclass(frozen=True)
class Examination:
    """One model, and everything an audit may compare it with."""

    model: PreTrainedModel  #: under audit; an audit that changes it works on a copy
    outputs: RowOutputs  #: its logits and features on training rows to forget, training rows to keep, and test rows
    original: RowOutputs  #: the same of the model before unlearning
    references: Sequence[RowOutputs]  #: the same of retrained models; the model under audit is never among them
    forgotten: Sequence[int]  #: ids of the forgotten classes
    forget: Dataset  #: this, `retain` and `test` are the rows behind the outputs
    retain: Dataset
    test: Dataset
    collect: Callable[[PreTrainedModel, Dataset], Outputs]  #: outputs of a model on rows
    #: (rows, batch size, seed) -> endless shuffled batches with "labels", on the model's device
    batches: Callable[[Dataset, int, int], Iterator[dict[str, Any]]]
    #: what each audit's `calibrate` returned, by name; the same for every model of a comparison
    calibration: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def kept(self) -> list[int]:
        """Ids of the classes that remain."""
        return kept_classes(self.original.test.logits.shape[1], self.forgotten)

    def of_forgotten(self, labels: Tensor) -> Tensor:
        """Which rows are of forgotten classes, bool, (rows,)."""
        return of_classes(labels, self.forgotten)


Run = Callable[[Examination], Reading]
Calibrate = Callable[[Examination], dict[str, Any]]


@dataclass(frozen=True)
class Audit:
    """One audit."""

    name: str  #: the function's; its numbers are called `name.key`
    title: str  #: what tables call it
    headline: str | None  #: the key that a verdict compares with the retrained models' band; None takes no part in it
    run: Run
    #: Chooses how strong the audit is, once for a comparison. It examines the original, on validation rows instead of
    #: test rows. What it returns is in `Examination.calibration`; its "summary" is printed.
    calibrate: Calibrate | None = None


AUDITS: dict[str, Audit] = {}


def audit(title: str, headline: str | None = None, calibrate: Calibrate | None = None) -> Callable[[Run], Run]:
    """Decorator: register a function as an audit."""

    def register(run: Run) -> Run:
        AUDITS[run.__name__] = Audit(run.__name__, title, headline, run, calibrate)
        return run

    return register


def calibrate(exam: Examination, audits: Iterable[Audit]) -> dict[str, dict[str, Any]]:
    """What `calibrate` of each audit that has one returns, by name."""
    return {one.name: one.calibrate(exam) for one in audits if one.calibrate is not None}
