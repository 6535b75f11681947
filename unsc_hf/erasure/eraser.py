"""Erase readings of a model in closed form, by changes that are folded into the layers that write them.

What is measured: for each reading (`readings.py`) the differences of class means, of the forgotten rows minus the
retained rows of the class that they were re-labelled to.

What is written: hidden states come first, the head's input last. The layer that writes a reading gets the change of
least leak that takes a share of these differences out (`closed_form.py`).

When it stops: a reading is done when its differences are near their target, or when no step brings them nearer.
Whether the model can afford all of it is asked afterwards (`limits.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import UNSCError
from ..models.hooks import evaluation_mode
from ..models.layers import ProtectedLayer
from ..models.outputs import head_weights
from .closed_form import LowRank, least_leak, output_shifts
from .readings import ErasureRows, Reading, find_readings, find_writer, jacobian, read_all, read_writer
from .writers import Folds, folding_sites

_PASSES = 3  # steps of Newton's method: what lies behind a writer is not linear
_NEAR = 0.05  # of the differences before: near enough to the target
_DAMPING = (1.0, 0.5, 0.25)  # shares of a step, tried until one brings the differences nearer

Attempt = Callable[[float], None]
Choose = Callable[[Reading, Attempt], float]  # tries strengths for a reading, and returns the one to keep


@dataclass(frozen=True)
class Erased:
    """What was done for one reading."""

    reading: str
    writer: str
    strength: float  # share of the differences that was taken out; what the head does not read goes whole
    before: float  # norm of the differences of class means before all erasure
    after: float  # and after this reading's


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
    """Erases the readings of one model, one after another.

    Attributes:
        model, rows: what is changed in place, and the rows that are read.
        sites, folds: layers that may be changed (a LoRA layer as a whole), and their changes.
        head: reading of the head's input.
        head_rows: rows of the head's weight by class, (labels, width); None for language models.
        done: what was erased so far.
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
        forgotten, retained = self._read_all([self.head])
        return _joined(forgotten, 0).double(), _joined(retained, 0).double()

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
        forgotten, retained = self._read_all(readings)
        return [self.rows.differences(_joined(forgotten, i), _joined(retained, i)) for i in range(len(readings))]

    def _read_all(self, readings: Sequence[Reading]) -> list[list[list[Tensor]]]:
        with evaluation_mode(self.model):
            parts = (self.rows.forgotten, self.rows.retained)
            return [[read_all(self.model, readings, batch) for batch in part] for part in parts]

    def _read(self, place: _Place) -> _State:
        forgotten, retained = (
            [read_writer(self.model, place.writer, place.reading, batch) for batch in part]
            for part in (self.rows.forgotten, self.rows.retained)
        )
        features, inputs = (self.rows.differences(_joined(forgotten, i), _joined(retained, i)) for i in (0, 1))
        x = _joined(retained, 1).double()
        return _State(features, inputs, x.T @ x / len(x))


def _joined(parts: Sequence[Sequence[Tensor]], i: int) -> Tensor:
    return torch.cat([part[i].float().cpu() for part in parts])
