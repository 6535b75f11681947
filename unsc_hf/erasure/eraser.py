"""Forgetting in the features: closed-form erasure, folded into the layers that write them.

`UNSCTrainer` runs it after unlearning when `feature_erasure` says so. For each reading (`readings.py`), first hidden states, then
the head's input, the layer that writes it gets the change of least leak after which the mean of the forgotten rows lies nearer
to that of the retained rows of the class they were re-labelled to (`erasure.py`). The changes leave the null space: what they
cost is in the held-out leak, and the leak budget bounds them. So does the answer: where forgotten rows are nearer to what they resemble, what
had kept the forgotten class out of the answers may lose its hold.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..data.inputs import default_collator, prepare_dataset
from ..data.selection import at_most_per_class, evenly_spaced
from ..errors import UNSCError
from ..models.head import head_weights
from ..models.layers import ProtectedLayer, plain_name
from ..utils.distributed import gathered
from .closed_form import LowRank, differences, least_leak, output_shifts, shared_pairs
from .readings import IGNORED, Reading, find_readings, find_writer, read_all, read_writer
from .replay import Replay
from .writers import Folds, folding_sites

if TYPE_CHECKING:
    from ..trainer.trainer import UNSCTrainer

logger = logging.getLogger(__name__)


_FORGOTTEN_ROWS = 600  # forgotten rows that are read, and retained ones of a language model ...


_FORGOTTEN_ROWS_PER_CLASS = 100  # ... more where many classes are forgotten


_ROWS_PER_CLASS = 150  # retained rows of each class that forgotten rows are re-labelled to ...


_OTHER_ROWS = 300  # ... and of the others together: they count in the leak


_FEW_ROWS = 20


_PASSES = 3  # steps of Newton's method: what is behind a writer bends the way


_NEAR = 0.05  # of the differences before


_DAMPING = (1.0, 0.5, 0.25)  # shares of a step, until one brings the differences nearer


_BROUGHT_BACK = 0.005  # how much more of the held-out forget rows may be known after erasure, or one row


_LOWERED = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # logits, in the mean over the rows of a class


_HIDDEN_SHARES = 1 / 8  # how finely the share of hidden states is sought where the budget does not hold all


PLACES = ("none", "head", "layers")


Batch = Mapping[str, Any]


Fold = Callable[[ProtectedLayer, LowRank], None]


Choose = Callable[[Reading, Callable[[float], None]], float]


@dataclass(frozen=True)
class ErasureRows:
    """The rows that erasure reads, in batches on the model's device.

    Attributes:
        forgotten, retained: batches.
        own, relabelled: the class of each forgotten reading row and the one it is re-labelled to, (rows,).
        labels: classes of the retained reading rows, (rows,).
    """

    forgotten: Sequence[Batch]
    retained: Sequence[Batch]
    own: Tensor
    relabelled: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Erased:
    """What was done for one reading.

    Attributes:
        reading, writer: names.
        strength: share of the difference of class means that was taken out, of what the head does not read all of it.
        before, after: norm of the differences of class means before all erasure, and after this reading's.
    """

    reading: str
    writer: str
    strength: float
    before: float
    after: float


@dataclass
class FeatureEraser:
    """Erases readings of one model, one after another.

    Attributes:
        model: changed in place by `fold`.
        sites: layers that may be changed, by name: the module whose output is read, a LoRA layer as a whole.
        readings: in the order in which the model computes them.
        rows: see `ErasureRows`.
        head_rows: rows of the head's weight by class, (labels, width); None for language models.
        fold: adds a low-rank change to a site's weight.
        unfold: takes the last change of a site back.
    """

    model: nn.Module
    sites: Sequence[ProtectedLayer]
    readings: Sequence[Reading]
    rows: ErasureRows
    head_rows: Tensor | None
    fold: Fold
    unfold: Callable[[ProtectedLayer], None]
    done: list[Erased] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pairs = shared_pairs(self.rows.own, self.rows.relabelled, self.rows.labels)
        self._writers: dict[str, ProtectedLayer] = {}
        self._folded: dict[str, int] = {}  # changes of each reading
        self._before: dict[str, Tensor] = {}
        for reading in self.readings:
            writer = find_writer(self.model, self.sites, reading, self.rows.retained[0])
            if writer is not None and writer.geometry.groups == 1:
                self._writers[reading.name] = writer
        if not self._writers:
            raise UNSCError(
                "feature_erasure: no layer that may be changed writes what a probe reads; widen target_modules, or lower energy so "
                "that the last layers keep capacity."
            )

    def erase(self, strength: float, choose: Choose | None = None) -> list[Erased]:
        """Erase every reading that has a writer.

        Args:
            strength: share of each difference of class means to take out, in [0, 1]; of the head's input, what the head's rows
                do not read is taken out whole.
            choose: instead of `strength`; called with a reading and a function that tries a strength, returns the one to keep.
        """
        self._before = self._differences()
        pick = choose or (lambda reading, attempt: strength)
        self.done = [self._erase(reading, pick) for _, reading in self._with_writers()]
        return self.done

    def take_back_last(self) -> None:
        """Take back what was done for the last reading."""
        last = self.done.pop()
        for _ in range(self._folded[last.reading]):
            self.unfold(self._writers[last.reading])

    def erase_last(self, choose: Choose) -> None:
        """Erase the last reading again, after the others were changed; see `erase`."""
        _, reading = self._with_writers()[-1]
        self.done.append(self._erase(reading, choose))

    def _erase(self, reading: Reading, choose: Choose) -> Erased:
        name, before = reading.name, self._before[reading.name]
        writer, tried = self._writers[name], None
        reading = replace(reading, replay=Replay(self.model, writer.module, reading, self.rows.retained[0]))
        start = self._start(reading, writer)
        found: dict[float, tuple[list[LowRank], Tensor]] = {}
        self._folded[name] = 0

        def attempt(share: float) -> None:
            nonlocal tried
            if share == tried:
                return
            for _ in range(self._folded[name]):
                self.unfold(writer)
            if share in found:
                for change in found[share][0]:
                    self.fold(writer, change)
            else:
                found[share] = self._approach(reading, writer, start, self._target(reading, before, share))
            tried, self._folded[name] = share, len(found[share][0])

        share = choose(reading, attempt)
        attempt(share)
        return Erased(name, writer.name, share, float(before.norm()), float(found[share][1].norm()))

    def left(self) -> dict[str, float]:
        """Norms of the differences as they are now, by reading."""
        return {name: float(found.norm()) for name, found in self._differences().items()}

    def _start(self, reading: Reading, writer: ProtectedLayer) -> _Start:
        """What every attempt at a reading begins with: taken once, for strengths are tried one after another."""
        held, moment = self._held(reading, writer)
        slope = read_writer(self.model, writer, reading, self.rows.forgotten[0], jacobian=True).jacobian
        assert slope is not None
        return _Start(held, moment, slope, self._read(reading, writer))

    def _approach(
        self, reading: Reading, writer: ProtectedLayer, start: _Start, target: Tensor
    ) -> tuple[list[LowRank], Tensor]:
        """Fold until the differences are `target`, as nearly as the tail's bends allow.

        Returns:
            The changes that were folded, and the differences that are left.
        """
        folded: list[LowRank] = []
        now = start.state
        near = _NEAR * float(now.features.norm())
        while len(folded) < _PASSES and float((now.features - target).norm()) > near:
            shifts = output_shifts(start.slope, target - now.features)
            still = torch.zeros(len(shifts), sum(part.shape[1] for part in start.held), dtype=shifts.dtype)
            inputs, moment = torch.cat([now.inputs, *start.held], 1), start.moment + now.moment
            change = least_leak(inputs, torch.cat([shifts, still], 1), moment)
            for damping in _DAMPING:
                step = change.scaled(damping)
                self.fold(writer, step)
                reached = self._read(reading, writer)
                if float((reached.features - target).norm()) < float((now.features - target).norm()):
                    break
                self.unfold(writer)
            else:
                break
            now = reached
            folded.append(step)
        return folded, now.features

    def _held(self, reading: Reading, writer: ProtectedLayer) -> tuple[list[Tensor], Tensor]:
        """Input differences of the writer's earlier readings, which must stay, and the second moments of their retained rows."""
        held, moment = [], torch.zeros(writer.geometry.width, writer.geometry.width, dtype=torch.float64)
        for name, other in self._with_writers():
            if name == reading.name:
                break
            if self._writers[name] is writer:
                found = self._read(other, writer)
                held.append(found.inputs)
                moment = moment + found.moment
        return held, moment

    def _with_writers(self) -> list[tuple[str, Reading]]:
        return [(reading.name, reading) for reading in self.readings if reading.name in self._writers]

    def _target(self, reading: Reading, before: Tensor, strength: float) -> Tensor:
        """Differences of class means (width, pairs) that shall be left of those before."""
        if reading.state is not None or self.head_rows is None:
            return (1 - strength) * before
        rows = self.head_rows[torch.unique(self.rows.labels)].double()
        if 2 * len(rows) > rows.shape[1]:  # the head reads everything
            return (1 - strength) * before
        # What the head reads decides answers, and a retrained model's answers on such rows are as sure as any: of that part half as
        # much is taken. The rest serves nobody but a probe, and goes.
        basis, _ = torch.linalg.qr(rows.T)
        return (1 - strength / 2) * (basis @ (basis.T @ before))

    def _differences(self) -> dict[str, Tensor]:
        """Differences of class means of every reading that has a writer, (width, pairs)."""
        readings = [reading for _, reading in self._with_writers()]
        with torch.no_grad():
            forgotten, retained = (
                [read_all(self.model, readings, batch) for batch in part]
                for part in (self.rows.forgotten, self.rows.retained)
            )

        def joined(parts: list[list[Tensor]], i: int) -> Tensor:
            return torch.cat([part[i].float().cpu() for part in parts])

        return {
            reading.name: self._between(joined(forgotten, i), joined(retained, i)) for i, reading in enumerate(readings)
        }

    def _between(self, forgotten: Tensor, retained: Tensor) -> Tensor:
        rows = self.rows
        return differences(forgotten, rows.own, rows.relabelled, retained, rows.labels, self.pairs)

    def _read(self, reading: Reading, writer: ProtectedLayer) -> _State:
        """Both kinds of rows, as they are now."""
        parts = []
        for batches in (self.rows.forgotten, self.rows.retained):
            found = [read_writer(self.model, writer, reading, batch) for batch in batches]
            parts.append([torch.cat([one.features for one in found]), torch.cat([one.inputs for one in found])])
        (features, inputs), (kept_features, kept_inputs) = parts
        x = kept_inputs.double()
        return _State(self._between(features, kept_features), self._between(inputs, kept_inputs), x.T @ x / len(x))


@dataclass(frozen=True)
class _State:
    """Differences of class means of a reading, (width, pairs), and of its writer's inputs, (in, pairs); the second moment of
    the retained rows' inputs, (in, in)."""

    features: Tensor
    inputs: Tensor
    moment: Tensor


@dataclass(frozen=True)
class _Start:
    """A reading and its writer before any change for it.

    Attributes:
        held, moment: of the writer's earlier readings; see `_held`.
        slope: derivative of the mean feature by a constant added to the writer's output, (width, out).
        state: differences and moment.
    """

    held: list[Tensor]
    moment: Tensor
    slope: Tensor
    state: _State


# ---- for a trainer --------------------------------------------------------------------------------------------------
def erase_features(trainer: UNSCTrainer, choose: Choose | None = None) -> list[Erased]:
    """Erase the features of an unlearned model as its options say, within the leak budget and without bringing answers back.

    Args:
        trainer: after its last step; `args.feature_erasure` is "head" or "layers".
        choose: see `FeatureEraser.erase`.

    Raises:
        UNSCError: hidden states that the model does not return, no layer to fold into, or sharded weights.
    """
    args, plan = trainer.args, trainer.plan
    assert plan is not None
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
        raise UNSCError("feature_erasure: sharded weights cannot be folded into; unlearn on one process, or with DDP.")
    rows = erasure_rows(trainer)
    answers = trainer.task.label_column is None
    readings = find_readings(model, args.feature_erasure == "layers", answers, rows.retained[0])
    folds = Folds(model)
    eraser = FeatureEraser(
        model,
        folding_sites(model, plan.selection.layers),
        readings,
        rows,
        None if answers else head_weights(model, int(model.config.num_labels))[0].cpu(),
        folds.fold,
        folds.unfold,
    )
    known = max(trainer._check().known, plan.target) + max(_BROUGHT_BACK, 1 / len(trainer._forget_validation))
    eraser.erase(args.erasure_strength, choose)

    def leak() -> float:
        decided: float = gathered(trainer.held_out_leak().total, args.device)[0]  # one process decides for all
        return decided

    return _within_limits(eraser, folds, leak, lambda: trainer._check().known, args.max_leak, known, choose)


def _within_limits(
    eraser: FeatureEraser,
    folds: Folds,
    leak: Callable[[], float],
    known: Callable[[], float],
    max_leak: float | None,
    most_known: float,
    choose: Choose | None,
) -> list[Erased]:
    """Scale what was erased until the leak keeps the budget, and see that no more than `most_known` of the held-out forget rows is known.

    One strength for all readings is scaled as a whole. Chosen strengths stand one on the other: the head's was chosen with all of the hidden
    states' in place. There the hidden states are scaled alone, and the head's input, which most attacks read, is served first.
    Answers that came back are lowered in the head, which changes no feature; where the head may not be changed, less is erased.
    """

    def affordable() -> bool:
        return max_leak is None or leak() <= max_leak

    def fits() -> bool:
        return affordable() and known() <= most_known

    hidden, factor, reasons = 1.0, 1.0, []
    if not affordable():
        reasons.append(f"exceeds the leak budget (max_leak {max_leak})")
        if choose is not None and len(eraser.done) > 1 and eraser.done[-1].reading == eraser.readings[-1].name:
            hidden = _head_first(eraser, folds, affordable, partial(eraser.erase_last, choose))
        if not affordable():
            factor = _scaled(folds, affordable)
    back = known()
    if back > most_known:
        lowered = _lower_answers(eraser, folds, lambda: known() <= most_known)
        if lowered is not None:
            logger.warning(
                "Erasure brought %.3g of the held-out forget rows back: the logits of the forgotten classes were lowered in the head, on "
                "their rows by %g in the mean.",
                back,
                lowered,
            )
        if not fits():
            reasons.append(
                f"exceeds the leak budget (max_leak {max_leak})"
                if lowered is not None
                else f"brings forgotten rows back ({back:.3g} known on held-out ones, {most_known:.3g} at most)"
            )
            folds.settle()
            factor *= _scaled(folds, fits)
    if not reasons:
        return eraser.done
    logger.warning(
        "Erasure was scaled to %.0f %%%s: all of it %s.",
        100 * factor * hidden,
        "" if hidden == 1 else f" in hidden states, {100 * factor:.0f} % at the head's input",
        " and ".join(dict.fromkeys(reasons)),
    )
    left = eraser.left()
    shares = [factor * hidden] * (len(eraser.done) - 1) + [factor]
    return [
        replace(one, strength=one.strength * share, after=left[one.reading])
        for one, share in zip(eraser.done, shares, strict=True)
    ]


def _lower_answers(eraser: FeatureEraser, folds: Folds, gone: Callable[[], bool]) -> float | None:
    """Lower the logits of the forgotten classes on their rows, in the head, by as little as makes them be `gone`.

    Returns:
        How far, in the mean over the rows of a class; None where it is not possible, and nothing has changed.
    """
    head, rows = eraser.readings[-1], eraser.rows
    name = plain_name(head.head.name.removesuffix(".base_layer"))
    site = next((one for one in eraser.sites if one.name == name), None)
    if site is None or eraser.head_rows is None:
        return None
    with torch.no_grad():
        forgotten, retained = (
            torch.cat([head.rows(eraser.model, batch).double().cpu() for batch in part])
            for part in (rows.forgotten, rows.retained)
        )
    classes = torch.unique(rows.own)
    means = torch.stack([forgotten[rows.own == c].mean(0) for c in classes.tolist()], 1)
    lower = torch.zeros(len(eraser.head_rows), len(classes), dtype=torch.float64)
    lower[classes, torch.arange(len(classes))] = -1.0
    change = least_leak(means, lower, retained.T @ retained / len(retained))
    for logits in _LOWERED:
        folds.fold(site, change.scaled(logits))
        if gone():
            return logits
        folds.unfold(site)
    return None


def _head_first(eraser: FeatureEraser, folds: Folds, fits: Callable[[], bool], serve: Callable[[], None]) -> float:
    """The largest share of the hidden states' changes, to an eighth, that leaves room for the head's input.

    Args:
        fits: whether what is erased now keeps the limits.
        serve: erases the head's input anew. It is served on return; beyond the limits at worst, where the share is nought.
    """
    eraser.take_back_last()
    low, high, served = 0.0, 1.0, False
    while high - low > _HIDDEN_SHARES:
        middle = (low + high) / 2
        if served:
            eraser.take_back_last()
        folds.scale(middle)
        served = fits()
        if served:
            serve()
        low, high = (middle, high) if served and fits() else (low, middle)
    if served and low == middle:
        return low
    if served:
        eraser.take_back_last()
    if low > 0:
        folds.scale(low)
    else:
        folds.clear()
    serve()
    return low


def _scaled(folds: Folds, fits: Callable[[], bool]) -> float:
    """The largest scale of all changes, to 1 %, that keeps the limits; they are left at that scale."""
    low, high = 0.0, 1.0
    while high - low > 0.01:
        middle = (low + high) / 2
        folds.scale(middle)
        low, high = (middle, high) if fits() else (low, middle)
    folds.scale(low)
    return low


def erasure_rows(trainer: UNSCTrainer) -> ErasureRows:
    """Rows that erasure reads: of the training rows to forget and to keep evenly spaced ones, none that is held out."""
    plan = trainer.plan
    assert plan is not None
    forget, retain = trainer._forget_train, trainer._retain_train
    mine = trainer.task.strata(forget)
    gone = np.unique(mine)
    limit = max(_FORGOTTEN_ROWS // len(gone), _FORGOTTEN_ROWS_PER_CLASS)
    chosen = np.sort(at_most_per_class(mine, limit))
    batches = partial(row_batches, trainer)
    forgotten = batches(forget.select(chosen))
    if plan.pseudo_labels is None:  # a language model: answers are one group
        retained = batches(retain.select(evenly_spaced(np.arange(len(retain)), _FORGOTTEN_ROWS)))
        counts = [sum(int((b["labels"][:, 1:] != IGNORED).sum()) for b in part) for part in (forgotten, retained)]
        relabelled, labels = (torch.zeros(count, dtype=torch.long) for count in counts)
        return ErasureRows(forgotten, retained, relabelled, relabelled, labels)
    new = plan.pseudo_labels[torch.from_numpy(chosen)]
    relabelled = new if new.dim() == 1 else new.argmax(1)
    known, own = trainer.task.strata(retain), torch.from_numpy(mine[chosen])
    pairs = shared_pairs(own, relabelled, torch.from_numpy(known))
    alone = sorted(set(gone.tolist()) - {c for c, _ in pairs})
    if alone:
        logger.warning(
            "Class %s is not erased: fewer than two of its rows have the same new label, so there is no mean to move.",
            alone[0],
        )
    shared = sorted({new for _, new in pairs})
    kept = [evenly_spaced(np.flatnonzero(known == c), _ROWS_PER_CLASS) for c in shared]
    others = evenly_spaced(np.flatnonzero(~np.isin(known, shared)), _OTHER_ROWS)
    rows = np.sort(np.concatenate([*kept, others]))
    few = [c for c, part in zip(shared, kept, strict=True) if len(part) < _FEW_ROWS]
    if few:
        logger.warning("Class %s has fewer than %d retained rows: its mean is uncertain.", few[0], _FEW_ROWS)
    return ErasureRows(forgotten, batches(retain.select(rows)), own, relabelled, torch.from_numpy(known[rows]))


def row_batches(trainer: UNSCTrainer, rows: Dataset, processor: Any = None) -> list[dict[str, Any]]:
    """Rows of a trainer's data in batches on its device, ready for its model, or for one with a `processor` of its own."""
    args = trainer.args
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] = trainer._collate
    prepared = trainer._prepared(rows)
    if processor is not None and trainer.task.prepare(rows).format["type"] == "custom":  # raw images or texts
        prepared = prepare_dataset(rows, processor, trainer.model, args.label_column, args.text_columns)
        collate = default_collator(processor)
    size, device = args.per_device_eval_batch_size, args.device
    loader = DataLoader(prepared, batch_size=size, collate_fn=collate, generator=torch.Generator())
    return [{name: value.to(device) for name, value in batch.items()} for batch in loader]
