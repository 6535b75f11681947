"""What a study is made of: runs that are measured alike and kept, means over seeds, a picture, a paragraph."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from transformers import PreTrainedModel

from ...errors import UNSCError, first_line
from ..experiment import Experiment
from ..plots import legend as legend
from ..summary import half_interval, with_interval
from ..workbench import Workbench

Point: TypeAlias = dict[str, Any]  # tags and measured numbers of one run


class Lab:
    """Runs of one study, each recorded under the study's name. A stopped study goes on where it was.

    `experiment` holds models and rows, and what is forgotten unless the study makes its own requests.
    """

    def __init__(self, experiment: Experiment, study: str, console: Console | None = None) -> None:
        self.experiment, self.study, self.console = experiment, study, console or Console()
        self.seeds = experiment.seeds

    def point(self, tags: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> Point:
        """Tags and what `make` measures; made once. A run that the options forbid becomes a point with "error"."""

        def measured() -> dict[str, Any]:
            try:
                return {**tags, **make()}
            except UNSCError as error:
                return {**tags, "error": first_line(error)}

        key = hashlib.sha256(json.dumps(tags, sort_keys=True, default=str).encode()).hexdigest()[:16]
        point = self.experiment.record(f"{self.study}-{key}", measured)
        shown = {name: point[name] for name in ("AccDut", "AccDrt", "leak", "error") if point.get(name) is not None}
        measured_words = [f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in shown.items()]
        self.console.print(f"{', '.join(f'{k} {v}' for k, v in tags.items())}: {', '.join(measured_words)}")
        return point

    def points(self, tags: Mapping[str, Any], make: Callable[[], list[Point]]) -> list[Point]:
        """As `point`, for a run that gives several points: they are under "points" in its record."""
        point = self.point(tags, lambda: {"points": make()})
        points: list[Point] = point.get("points", [point])
        return points

    def run(self, tags: Mapping[str, Any], seed: int, options: Mapping[str, Any], rebuild: Sequence[str] = ()) -> Point:
        """Unlearn with options of `UNSCConfig`, and measure; a point with `tags` and the seed.

        `rebuild` names the options that change what statistics are collected from.
        """

        def make() -> dict[str, Any]:
            bench = self.experiment.bench(seed, **{name: options[name] for name in rebuild})
            model = bench.unlearn(**{name: value for name, value in options.items() if name not in rebuild})
            return self.measured(bench, model)

        return self.point({**tags, "seed": seed}, make)

    def measured(self, bench: Workbench, model: PreTrainedModel) -> dict[str, Any]:
        """Accuracies of an unlearned model, and what the last run of its bench cost."""
        cost = {"leak": bench.leak(model), "steps": bench.steps, "seconds": bench.seconds}
        return {**self.accuracies(bench, model), **cost, "stopped_by": bench.stop_reason}

    def accuracies(self, bench: Workbench, model: PreTrainedModel) -> dict[str, Any]:
        """AccDut and AccDrt on the test rows."""
        outputs = self.experiment.collect(bench, model, self.experiment.test, features=False)
        return self.experiment.accuracies(outputs)


class Points(list[Mapping[str, Any]]):
    """What a study measured: each point is a flat mapping of tags and numbers."""

    def where(self, **tags: Any) -> Points:
        """Points with these tags, without the failed ones."""
        return Points(p for p in self if "error" not in p and all(p.get(tag) == value for tag, value in tags.items()))

    def by(self, tag: str) -> dict[Any, Points]:
        """Points by the value of a tag, in the order of their first point, without the failed ones."""
        values = dict.fromkeys(p[tag] for p in self.where() if p.get(tag) is not None)
        return {value: self.where(**{tag: value}) for value in values}

    def values(self, key: str) -> list[float]:
        """Known numbers."""
        return [float(p[key]) for p in self if p.get(key) is not None]

    def mean(self, key: str) -> float:
        """Mean over points, NaN without any."""
        return float(np.mean(known)) if (known := self.values(key)) else float("nan")

    def half(self, key: str) -> float:
        """Half the 95 % interval over points; 0 where it cannot be given."""
        return half_interval(self.values(key)) or 0.0

    def percent(self, key: str) -> str:
        """Mean ± half interval, in percent; a dash where nothing was measured."""
        half = half_interval(self.values(key))
        words = with_interval(100 * self.mean(key), None if half is None else 100 * half)
        return words if self.values(key) else "–"


class Study(ABC):
    """A question, and what answers it; register a subclass with `@register`."""

    name: ClassVar[str]  # how it is asked for
    title: ClassVar[str]  # its question
    tags: ClassVar[Mapping[str, str]]  # heading by key of what tells runs apart, in the order of the table
    numbers: ClassVar[Mapping[str, str]] = {  # heading by key of what is averaged over seeds
        name: name for name in ("AccDut", "AccDrt", "leak", "steps", "seconds")
    }

    @abstractmethod
    def measure(self, lab: Lab) -> list[Point]:
        """Run it; the numbers of runs that differ in their seed alone are averaged."""

    @abstractmethod
    def plot(self, points: Points) -> Figure:
        """Its picture."""

    @abstractmethod
    def paragraph(self, points: Points) -> str:
        """What the points show, in words made from them."""


STUDIES: dict[str, Study] = {}


def register(study: type[Study]) -> type[Study]:
    """Decorator: make a study known by its name."""
    STUDIES[study.name] = study()
    return study


# ---- pictures -------------------------------------------------------------------------------------------------------
Line: TypeAlias = tuple[str, Points, str, Any]  # label, points, key of the height, colour


def panels(count: int, width: float = 4.6, height: float = 3.6) -> tuple[Figure, list[Any]]:
    """A figure with axes side by side."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, count)))


def curves(axes: Any, x: str, lines: Iterable[Line], scale: float = 100.0, **labels: Any) -> list[float]:
    """Draw each line against the tag `x`; returns all means. With `scale` 100, of shares, the axis shows the means.

    `labels` are for `axes.set`.
    """
    heights: list[float] = []
    for label, points, key, colour in lines:
        places = dict(sorted(points.by(x).items()))
        if places:
            means = [scale * runs.mean(key) for runs in places.values()]
            bars = [scale * runs.half(key) for runs in places.values()]
            style = {"ms": 4, "lw": 1.6, "elinewidth": 0.8}
            axes.errorbar(list(places), means, yerr=bars, fmt="o-", label=label, color=colour, **style)
            heights += means
    axes.set(**labels)
    if scale == 100:
        zoom(axes, heights)
    return heights


def zoom(axes: Any, heights: Sequence[float], margin: float = 3.0) -> None:
    """Let a percent axis show the means; the wide intervals of few seeds run off the picture."""
    known = [h for h in heights if h == h]
    if known:
        axes.set_ylim(max(-2.0, min(known) - margin), min(102.0, max(known) + margin))


def bars(axes: Any, groups: Mapping[str, Points], key: str, colours: Sequence[Any], **labels: Any) -> list[float]:
    """Draw one bar for each group of points, in percent; returns all means."""
    heights = [100 * runs.mean(key) for runs in groups.values()]
    for i, (runs, height) in enumerate(zip(groups.values(), heights, strict=True)):
        axes.bar(i, height, yerr=100 * runs.half(key), color=colours[i % len(colours)], capsize=3)
    axes.set_xticks(range(len(groups)), list(groups), rotation=25, ha="right", fontsize=8)
    axes.set(**labels)
    return heights
