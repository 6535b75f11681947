"""Erase readings of a model in closed form, by changes that are folded into the layers that write them.

What is measured: for each reading (`readings.py`) the differences of class means, of the forgotten rows minus the
retained rows of the class that they were re-labelled to.

What is written: hidden states come first, the head's input last. The layer that writes a reading gets the change of
least leak that takes a share of these differences out (`closed_form.py`).

When it stops: a reading is done when its differences are near their target, or when no step brings them nearer.

What bounds it: erased features leave the null space. What that costs is in the held-out leak, and the leak budget
bounds it. The answers bound it too: forgotten rows that lie nearer to what they resemble may be recognised again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import UNSCError
from ..models.layers import ProtectedLayer, plain_name
from ..models.outputs import head_weights
from .closed_form import Folds, LowRank, folding_sites, least_leak, output_shifts
from .readings import (
    ErasureRows,
    FeatureRows,
    Reading,
    erasure_rows,
    find_readings,
    find_writer,
    jacobian,
    read_rows,
    read_writer,
)  # fmt: skip

logger = logging.getLogger(__name__)

_PASSES = 3  # steps of Newton's method: what lies behind a writer is not linear
_NEAR = 0.05  # of the differences before: near enough to the target
_DAMPING = (1.0, 0.5, 0.25)  # shares of a step, tried until one brings the differences nearer
_BROUGHT_BACK = 0.005  # how much more of the held-out forget rows may be known after erasure, at least one row
_LOWERED = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # logits, in the mean over the rows of a class
_HIDDEN_SHARES = 1 / 8  # how finely the share of hidden states is sought where the budget does not hold all
_SCALES = 0.01  # how finely the scale of all changes is sought

Attempt = Callable[[float], None]
Choose = Callable[[Reading, Attempt], float]  # tries strengths for a reading, and returns the one to keep


@dataclass(frozen=True)
class Erased:
    """What was done for one reading."""

    reading: str
    writer: str
    strength: float  #: share of the differences that was taken out; what the head does not read goes whole
    before: float  #: norm of the differences of class means before all erasure
    after: float  #: and after this reading's


@dataclass(frozen=True)
class _State:
    """A reading and the inputs of its writer, as they are now."""

    features: Tensor  # differences of class means, (width, pairs)
    inputs: Tensor  # the same of the writer's inputs, (in, pairs)
    moment: Tensor  # second moment of the retained rows' inputs, (in, in)


@dataclass(eq=False)
class _Place:
    reading: Reading
    writer: ProtectedLayer
    before: Tensor  # differences of class means before all erasure, (width, pairs)
    folded: int = 0  # changes that are written for it


class FeatureEraser:
    """Erases the readings of one model in place, one after another; `done` is what was erased so far.

    Layers that may be changed are `sites` (a LoRA layer as a whole), and their changes are `folds`. `head` is the
    reading of the head's input, and `head_rows` are its weight's rows by class, (labels, width), None for language
    models.
    """

    def __init__(self, model: nn.Module, layers: Sequence[ProtectedLayer], place: str, rows: ErasureRows) -> None:
        """`layers` are the trained layers; `place` is "head" or "layers".

        UNSCError where the model returns no hidden states, or no layer that may be changed writes any reading.
        """
        self.model, self.rows = model, rows
        self.sites, self.folds = folding_sites(model, layers), Folds(model)
        readings = find_readings(model, place == "layers", rows.answers, rows.retained[0])
        self.head = readings[-1]
        self.head_rows = None if rows.answers else head_weights(model, len(self.head.head.weight))[0].cpu()
        self.done: list[Erased] = []
        writers = {r: find_writer(model, self.sites, r, rows.retained[0]) for r in readings}
        written = [(r, writer) for r, writer in writers.items() if writer is not None and writer.geometry.groups == 1]
        if not written:
            raise UNSCError(
                "feature_erasure: no layer that may be changed writes what a probe reads; widen target_modules, "
                "or lower energy so that the last layers keep capacity."
            )
        before = self._differences([reading for reading, _ in written])
        self._places = [_Place(*parts, before[i]) for i, parts in enumerate(written)]

    def erase(self, choose: Choose) -> None:
        """Erase every reading that has a writer, by the share in [0, 1] that `choose` returns for it."""
        self.done = [self._erase(place, choose) for place in self._places]

    def take_back_last(self) -> None:
        self.done.pop()
        self._unfold(self._places[-1])

    def erase_last(self, choose: Choose) -> None:
        self.done.append(self._erase(self._places[-1], choose))

    def scaled(self, hidden: float, factor: float) -> list[Erased]:
        """What was done, after all changes were scaled by `factor`, and those of hidden states by `hidden` too."""
        shares = [factor * hidden] * (len(self.done) - 1) + [factor]
        left = self._differences([place.reading for place in self._places])
        return [
            replace(one, strength=one.strength * share, after=float(now.norm()))
            for one, share, now in zip(self.done, shares, left, strict=True)
        ]

    def read_heads(self) -> tuple[Tensor, Tensor]:
        """The head's inputs on forgotten and on retained rows, float64, (rows, width)."""
        (forgotten,), (retained,) = self._read_rows([self.head])
        return forgotten.double(), retained.double()

    def _erase(self, place: _Place, choose: Choose) -> Erased:
        start, held = self._read(place), self._held(place)
        slope = jacobian(self.model, place.writer, place.reading, self.rows.forgotten[0])
        attempts: dict[float, tuple[list[LowRank], Tensor]] = {}  # changes, and the differences that they leave
        written: float | None = None

        def attempt(strength: float) -> None:
            nonlocal written
            if strength == written:
                return
            self._unfold(place)
            if strength in attempts:
                for change in attempts[strength][0]:
                    self.folds.fold(place.writer, change)
            else:
                attempts[strength] = self._approach(place, start, held, slope, self._target(place, strength))
            written, place.folded = strength, len(attempts[strength][0])

        strength = choose(place.reading, attempt)
        attempt(strength)
        left = attempts[strength][1]
        return Erased(place.reading.name, place.writer.name, strength, float(place.before.norm()), float(left.norm()))

    def _unfold(self, place: _Place) -> None:
        for _ in range(place.folded):
            self.folds.unfold(place.writer)
        place.folded = 0

    def _held(self, place: _Place) -> tuple[Tensor, Tensor]:
        """What the writer's earlier readings must keep: input differences (in, columns), and their second moments'
        sum (in, in)."""
        width = place.writer.geometry.width
        inputs, moment = torch.zeros(width, 0, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
        for other in self._places[: self._places.index(place)]:
            if other.writer is place.writer:
                state = self._read(other)
                inputs, moment = torch.cat([inputs, state.inputs], 1), moment + state.moment
        return inputs, moment

    def _approach(
        self, place: _Place, now: _State, held: tuple[Tensor, Tensor], slope: Tensor, target: Tensor
    ) -> tuple[list[LowRank], Tensor]:
        """Fold until the differences are `target`, as nearly as can be; the changes, and the differences left."""
        folded: list[LowRank] = []
        near = _NEAR * float(now.features.norm())
        while len(folded) < _PASSES and float((now.features - target).norm()) > near:
            shifts = output_shifts(slope, target - now.features)
            still = torch.zeros(len(shifts), held[0].shape[1], dtype=shifts.dtype)
            inputs, shifts = torch.cat([now.inputs, held[0]], 1), torch.cat([shifts, still], 1)
            change = least_leak(inputs, shifts, held[1] + now.moment)
            for damping in _DAMPING:
                step = change.scaled(damping)
                self.folds.fold(place.writer, step)
                reached = self._read(place)
                if float((reached.features - target).norm()) < float((now.features - target).norm()):
                    break
                self.folds.unfold(place.writer)
            else:
                break
            now = reached
            folded.append(step)
        return folded, now.features

    def _target(self, place: _Place, strength: float) -> Tensor:
        """Differences of class means (width, pairs) that shall be left of those before."""
        if place.reading.state is not None or self.head_rows is None:
            return (1 - strength) * place.before
        rows = self.head_rows[torch.unique(self.rows.labels)].double()
        if 2 * len(rows) > rows.shape[1]:  # the head reads everything
            return (1 - strength) * place.before
        # What the head reads decides answers, and a retrained model's answers on such rows are as sure as any: half as
        # much is taken of that part. The rest serves nobody but a probe, and is taken out whole.
        basis, _ = torch.linalg.qr(rows.T)
        return (1 - strength / 2) * (basis @ (basis.T @ place.before))

    def _differences(self, readings: Sequence[Reading]) -> list[Tensor]:
        """As they are now, (width, pairs) for each reading."""
        return [self.rows.differences(*pair) for pair in zip(*self._read_rows(readings), strict=True)]

    def _read_rows(self, readings: Sequence[Reading]) -> list[list[Tensor]]:
        """Of both kinds of rows, every reading."""
        return [read_rows(self.model, readings, part) for part in (self.rows.forgotten, self.rows.retained)]

    def _read(self, place: _Place) -> _State:
        forgotten, retained = (
            read_writer(self.model, place.writer, place.reading, part)
            for part in (self.rows.forgotten, self.rows.retained)
        )
        features, inputs = (self.rows.differences(*pair) for pair in zip(forgotten, retained, strict=True))
        x = retained[1].double()
        return _State(features, inputs, x.T @ x / len(x))


def erase_features(
    model: nn.Module,
    layers: Sequence[ProtectedLayer],
    rows: FeatureRows,
    pseudo_labels: Tensor | None,
    leak: Callable[[], float],
    known: Callable[[], float],
    target: float,
    choose: Choose | None = None,
) -> list[Erased]:
    """Erase the features of an unlearned model in place, within the leak budget and without bringing answers back.

    Args:
        layers: the trained layers of its projection.
        rows: of the request; their `args` say how much to erase, where, and within which budget.
        pseudo_labels: new labels of the training rows to forget, None for a language model.
        leak, known: held-out leak of the model, and how much it knows of the held-out forget rows, as it is now;
            the same on every process.
        target: how much of the held-out forget rows may be known in any case.
        choose: chooses the strength for each reading instead of `args.erasure_strength`.

    Raises:
        UNSCError: hidden states that the model does not return, no layer that may be changed, or too few rows.
    """
    args = rows.args
    most_known = max(known(), target) + max(_BROUGHT_BACK, 1 / len(rows.held_out))
    limits = _Limits(leak, known, args.max_leak, most_known)
    eraser = FeatureEraser(model, layers, args.feature_erasure, erasure_rows(rows, pseudo_labels))
    eraser.erase(choose or (lambda reading, attempt: args.erasure_strength))
    return _keep_limits(eraser, limits, choose)


@dataclass(frozen=True)
class _Limits:
    leak: Callable[[], float]
    known: Callable[[], float]
    max_leak: float | None
    most_known: float

    def affordable(self) -> bool:
        return self.max_leak is None or self.leak() <= self.max_leak

    def forgotten(self) -> bool:
        return self.known() <= self.most_known

    def hold(self) -> bool:
        return self.affordable() and self.forgotten()


def _keep_limits(eraser: FeatureEraser, limits: _Limits, choose: Choose | None) -> list[Erased]:
    """Scale what was erased until it keeps the limits.

    One strength for all readings is scaled as a whole. Chosen strengths depend on each other: the head's was chosen
    with all changes of hidden states in place. So there the hidden states are scaled alone, and the head's input, which
    most attacks read, is served first. Answers that came back are lowered in the head, which changes no feature. Where
    the head may not be changed, less is erased.
    """
    over_budget = f"exceeds the leak budget (max_leak {limits.max_leak})"
    hidden, factor, reasons = 1.0, 1.0, []
    if not limits.affordable():
        reasons.append(over_budget)
        if choose is not None and len(eraser.done) > 1 and eraser.done[-1].reading == eraser.head.name:
            hidden = _serve_head_first(eraser, limits, choose)
        if not limits.affordable():
            factor = _scale_down(eraser.folds, limits.affordable)
    back = limits.known()
    if back > limits.most_known:
        lowered = _lower_answers(eraser, limits)
        if lowered is not None:
            logger.warning(
                f"Erasure brought {back:.3g} of the held-out forget rows back: the logits of the forgotten classes "
                f"were lowered in the head, on their rows by {lowered:g} in the mean."
            )
        if not limits.hold():
            known = f"{back:.3g} known on held-out ones, {limits.most_known:.3g} at most"
            reasons.append(f"brings forgotten rows back ({known})" if lowered is None else over_budget)
            eraser.folds.settle()
            factor *= _scale_down(eraser.folds, limits.hold)
    if not reasons:
        return eraser.done
    logger.warning(
        "Erasure was scaled to %.0f %%%s: all of it %s.",
        100 * factor * hidden,
        "" if hidden == 1 else f" in hidden states, {100 * factor:.0f} % at the head's input",
        " and ".join(dict.fromkeys(reasons)),
    )
    return eraser.scaled(hidden, factor)


def _serve_head_first(eraser: FeatureEraser, limits: _Limits, choose: Choose) -> float:
    """The largest share of the hidden states' changes, to an eighth, that leaves enough budget for the head's input.

    On return the head's input is erased with that share in place. Where the share is zero it may exceed the budget.
    """
    eraser.take_back_last()
    low, high, served = 0.0, 1.0, False
    while high - low > _HIDDEN_SHARES:
        middle = (low + high) / 2
        if served:
            eraser.take_back_last()
        eraser.folds.scale(middle)
        served = limits.affordable()
        if served:
            eraser.erase_last(choose)
        low, high = (middle, high) if served and limits.affordable() else (low, middle)
    if served and low == middle:
        return low
    if served:
        eraser.take_back_last()
    if low > 0:
        eraser.folds.scale(low)
    else:
        eraser.folds.clear()
    eraser.erase_last(choose)
    return low


def _scale_down(folds: Folds, fits: Callable[[], bool]) -> float:
    """The largest scale of all changes, to 1 %, that keeps the limits. The changes are left at that scale."""
    low, high = 0.0, 1.0
    while high - low > _SCALES:
        middle = (low + high) / 2
        folds.scale(middle)
        low, high = (middle, high) if fits() else (low, middle)
    folds.scale(low)
    return low


def _lower_answers(eraser: FeatureEraser, limits: _Limits) -> float | None:
    """Lower the logits of the forgotten classes on their rows, in the head, until the rows are forgotten again.

    Returns how far, in the mean over the rows of a class; None where it is not possible and nothing has changed.
    """
    name = plain_name(eraser.head.head.name.removesuffix(".base_layer"))
    site = next((one for one in eraser.sites if one.name == name), None)
    if site is None or eraser.head_rows is None:
        return None
    forgotten, retained = eraser.read_heads()
    own = eraser.rows.own
    classes = torch.unique(own)
    means = torch.stack([forgotten[own == c].mean(0) for c in classes.tolist()], 1)
    lower = torch.zeros(len(eraser.head_rows), len(classes), dtype=torch.float64)
    lower[classes, torch.arange(len(classes))] = -1.0
    change = least_leak(means, lower, retained.T @ retained / len(retained))
    for logits in _LOWERED:
        eraser.folds.fold(site, change.scaled(logits))
        if limits.forgotten():
            return logits
        eraser.folds.unfold(site)
    return None
