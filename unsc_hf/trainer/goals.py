"""What it means that the rows of a request are forgotten: what is held out, what is measured, and when to stop."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from datasets import Dataset
from torch import Tensor, nn

from ..config import UNSCConfig
from ..data.selection import hold_out
from ..errors import UNSCError
from ..evaluation.flips import count_flips
from ..evaluation.membership import accuracy_gap, exposure, tolerated_exposure
from ..models.outputs import Outputs
from ..objectives.pseudo_labels import MatchedTargets, Matching
from ..tasks import Task
from ..tasks.base import Measure
from .checks import Check
from .rows import MAX_VALIDATION_ROWS, ModelReader, UnlearningRows, at_most

_CLASS_TARGET = 0.002  # accuracy at which whole classes count as forgotten ...
_CLASS_LOSS = 3.0  # ... if rows are given their class with 5 % (exp(-3)) or less: unseen rows stay known for longer
_TOKEN_TOLERANCE = 0.01  # answers count as forgotten when their tokens are predicted this nearly as well as unseen ones
_VALIDATION_ROWS = 50  # forget rows wanted for validation where whole classes are forgotten ...
_MOST_HELD_OUT = 0.4  # ... but never more than this share of them
_CURVE_ROWS = 300  # held-out retained rows that a check reads: they draw a curve, nothing is decided by them
_SETTLING_RATE = 10.0  # a run that settles beside unseen rows learns at most this many times faster than stated


class ForgettingGoal(ABC):
    """When the rows of a request count as forgotten.

    Attributes:
        target: what is known of the forget rows must be at or below this; fixed by `fix` before the first step.
        least_loss: the loss on forget rows (of whole classes, on the one known best) must be at least this, too.
        measure: what the target is a value of, for messages.
        refines: whether the last stretch is walked back to where the target is just reached.
        rate_limit: how many times the stated learning rate may be reached by doubling.
    """

    target: float
    least_loss = 0.0
    measure = "forget accuracy"
    refines = True
    rate_limit = math.inf

    def __init__(self, task: Task, args: UNSCConfig, unseen: Dataset | None = None) -> None:
        self.task, self.args, self.unseen = task, args, unseen

    @property
    def pseudo_labels(self) -> str:
        """The stated strategy, else the one that fits this goal."""
        if self.args.pseudo_labels is not None:
            return self.args.pseudo_labels
        return "top1" if self.unseen is None else "matched"

    def hold_out(self, forget: Dataset) -> tuple[Dataset, Dataset]:
        """Rows to train on, and rows that checks read. Single rows must each be forgotten, so none is kept aside."""
        return forget, forget

    @abstractmethod
    def fix(self, model: nn.Module, reader: ModelReader, rows: UnlearningRows) -> None:
        """Set the target, from the original model where it depends on one."""

    def matching(self, model: nn.Module, reader: ModelReader, rows: UnlearningRows) -> Matching | None:
        """How well each forget row should be known, for strategies that look at unseen rows; None for the others."""
        if self.pseudo_labels != "matched" or self.unseen is None:
            return None
        return Matching.of(reader.iterate(model, rows.forget, "Margins"), self.read_unseen(model, reader))

    def read_unseen(self, model: nn.Module, reader: ModelReader) -> Iterable[Outputs]:
        """The original model's outputs on unseen rows."""
        if self.unseen is None:
            raise UNSCError("unseen_dataset: not given; give rows that the model never saw (a validation split).")
        return reader.iterate(model, self.unseen, "Unseen rows")

    def watch(
        self, targets: list[dict[str, Tensor]], outputs: Outputs, matching: Matching | None
    ) -> list[dict[str, Tensor]]:
        """Targets of the forget rows, with whatever `current_targets` needs to follow the model."""
        return targets

    def current_targets(self, targets: Tensor, numbers: Tensor) -> Tensor:
        """Targets of the rows of these numbers as they stand now; by default those made before the first step."""
        return targets

    def check(
        self, model: nn.Module, reader: ModelReader, rows: UnlearningRows, leak: float, held_out_logits: Tensor
    ) -> Check:
        """Forgetting and keeping at this moment, on rows that are not trained on.

        Args:
            leak: on the held-out retained rows.
            held_out_logits: the original's on the same rows.
        """
        forget, retain = self._measured(model, reader, self._check_rows(rows))
        check = Check(forget.accuracy, forget.loss, retain.accuracy, leak, **self._compared(model, reader, forget))
        if retain.outputs is None:
            return check
        before = held_out_logits[_curve_rows(len(held_out_logits))]
        flips = count_flips(before, retain.outputs.logits, retain.outputs.labels, self.task.forgotten_classes)
        return replace(check, flips=flips.share, negative_flips=flips.negative_share)

    def _compared(self, model: nn.Module, reader: ModelReader, forget: Measure) -> dict[str, float | None]:
        """More fields of a check, where forget rows are compared with others."""
        return {}

    def _check_rows(self, rows: UnlearningRows) -> Sequence[Dataset]:
        """Of many single rows, some show how far all are."""
        return [at_most(part, MAX_VALIDATION_ROWS) for part in (rows.forget_validation, _curve(rows.retain_held_out))]

    def _measured(self, model: nn.Module, reader: ModelReader, parts: Sequence[Dataset]) -> list[Measure]:
        return [self.task.measure(reader.iterate(model, part, "Check")) for part in parts]


class ClassesGone(ForgettingGoal):
    """Whole classes: held-out rows of them are not recognised any more."""

    refines = False

    @property
    def pseudo_labels(self) -> str:
        return self.args.pseudo_labels or "soft"

    def hold_out(self, forget: Dataset) -> tuple[Dataset, Dataset]:
        """Whole classes generalise, so a part of their rows is kept aside to see it. Of few rows the part is larger: a
        handful cannot show that a class is gone."""
        fraction = max(self.args.validation_fraction, min(_MOST_HELD_OUT, _VALIDATION_ROWS / len(forget)))
        return hold_out(forget, fraction, self.task.strata(forget), MAX_VALIDATION_ROWS, self.args.seed)

    def fix(self, model: nn.Module, reader: ModelReader, rows: UnlearningRows) -> None:
        stated = self.args.target_forget_accuracy
        self.target, self.least_loss = (_CLASS_TARGET, _CLASS_LOSS) if stated is None else (stated, 0.0)

    def _check_rows(self, rows: UnlearningRows) -> Sequence[Dataset]:
        return [rows.forget_validation, _curve(rows.retain_held_out)]


class StatedAccuracy(ForgettingGoal):
    """Single rows or answers, down to an accuracy that the user has stated."""

    def __init__(self, task: Task, args: UNSCConfig, accuracy: float, unseen: Dataset | None = None) -> None:
        super().__init__(task, args, unseen)
        self._accuracy = accuracy

    def fix(self, model: nn.Module, reader: ModelReader, rows: UnlearningRows) -> None:
        self.target = self._accuracy


class AnswersLikeUnseen(ForgettingGoal):
    """Answers of a language model: their tokens are predicted at most a point better than those of unseen answers."""

    def fix(self, model: nn.Module, reader: ModelReader, rows: UnlearningRows) -> None:
        unseen = self.task.measure(iter(self.read_unseen(model, reader)))
        self.target = unseen.accuracy + _TOKEN_TOLERANCE


class LikeUnseenRows(ForgettingGoal):
    """Single rows of a classifier: their losses do not tell them from rows that the model never saw.

    The target is an exposure (see `evaluation.membership.exposure`): the AUC of an attacker who compares losses.
    Accuracy says less the fewer the rows are: of two rows that a model should know with 98 %, none need be wrong.

    Where retained rows are rehearsed, forgotten rows are compared with unseen rows under the *current* model: if its
    accuracy on unseen rows drops, the target drops with it. Without rehearsal nothing would keep both from being
    forgotten together, so the comparison stays with the original model.
    """

    measure = "exposure"

    def __init__(self, task: Task, args: UNSCConfig, unseen: Dataset, follows: bool) -> None:
        """
        Args:
            follows: whether the objective rehearses retained rows, so that the goal may follow the model.
        """
        super().__init__(task, args, unseen)
        self.follows = follows
        self.rate_limit = _SETTLING_RATE if follows else math.inf
        self.matched: list[MatchedTargets] = []
        self._read: list[Outputs] = []

    def fix(self, model: nn.Module, reader: ModelReader, rows: UnlearningRows) -> None:
        self.target = tolerated_exposure(len(rows.forget_validation))
        self.unseen_before = self.task.measure(iter(self.read_unseen(model, reader))).in_order()
        self._read = []

    def read_unseen(self, model: nn.Module, reader: ModelReader) -> Iterable[Outputs]:
        """As of any goal; a classifier's outputs are small, so they are read once."""
        if not self._read:
            self._read = list(super().read_unseen(model, reader))
        return self._read

    def watch(
        self, targets: list[dict[str, Tensor]], outputs: Outputs, matching: Matching | None
    ) -> list[dict[str, Tensor]]:
        """Matched targets change with the model, so each row says which one is its own."""
        if matching is None:
            return targets
        self.matched = [MatchedTargets(matching, outputs, torch.stack([row["pseudo_labels"] for row in targets]))]
        return [{**row, "target_row": torch.tensor(i)} for i, row in enumerate(targets)]

    def current_targets(self, targets: Tensor, numbers: Tensor) -> Tensor:
        if not self.follows or not self.matched:
            return targets
        return self.matched[0].now[numbers.cpu()].to(targets)

    def _compared(self, model: nn.Module, reader: ModelReader, forget: Measure) -> dict[str, float | None]:
        """Exposure, and where retained rows are rehearsed the gap in accuracy.

        Without rehearsal, pushing rows until they are answered wrongly would take retained rows with them.
        """
        unseen = self._unseen_now(model, reader) if self.follows else self.unseen_before
        losses = forget.row_losses()
        gap = accuracy_gap(forget.accuracy, unseen.accuracy, len(losses)) if self.follows else None
        return {"exposure": exposure(losses, unseen.row_losses()), "gap": gap}

    def _unseen_now(self, model: nn.Module, reader: ModelReader) -> Measure:
        """Unseen rows under the model as it is now; the targets of the forget rows follow them."""
        rows = at_most(self.unseen, MAX_VALIDATION_ROWS)
        now = self.task.measure(reader.iterate(model, rows, "Unseen rows")).in_order()
        for matched in self.matched:
            matched.follow(now.row_losses())
        return now


def make_goal(task: Task, args: UNSCConfig, unseen: Dataset | None, follows: bool) -> ForgettingGoal:
    """The goal of a request, from what the task says of its rows.

    Args:
        unseen: rows that the original never saw.
        follows: whether the objective rehearses retained rows.

    Raises:
        UNSCError: single rows without anything to compare them with.
    """
    stated = args.target_forget_accuracy
    if not task.whole_classes and stated is None and unseen is None:
        raise UNSCError(
            "unseen_dataset: not given, but single rows are to be forgotten, not whole classes; give rows that the "
            "model never saw (a validation split), or set target_forget_accuracy."
        )
    if task.whole_classes:
        return ClassesGone(task, args, unseen)
    if stated is not None or unseen is None:
        return StatedAccuracy(task, args, stated or 0.0, unseen)
    if task.label_column is None:
        return AnswersLikeUnseen(task, args, unseen)
    return LikeUnseenRows(task, args, unseen, follows)


def _curve(held_out: Dataset) -> Dataset:
    """Some of the held-out retained rows, evenly spaced."""
    return held_out.select(range(*_curve_rows(len(held_out)).indices(len(held_out))))


def _curve_rows(count: int) -> slice:
    return slice(0, count, -(-count // _CURVE_ROWS))
