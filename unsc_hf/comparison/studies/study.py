"""What a study is made of: runs that are measured alike and kept, means over seeds, panels of a picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.console import Console
from transformers import PreTrainedModel

from ...errors import UNSCError, first_line
from ..experiment import Experiment
from ..plots import legend
from ..summary import half_interval, values, with_interval
from ..workbench import Workbench

Point: TypeAlias = dict[str, Any]  # tags and measured numbers of one run

_NUMBERS = {
    "AccDut": "AccDut (%)", "AccDrt": "AccDrt (%)", "leak": "leak", "steps": "steps", "seconds": "seconds",
}  # fmt: skip


class Lab:
    """Runs of one study, each recorded under the study's name. A stopped study goes on where it was.

    `experiment` holds models and rows, and what is forgotten unless the study makes its own requests.
    """

    def __init__(self, experiment: Experiment, study: str, console: Console | None = None) -> None:
        self.experiment, self.study, self.console = experiment, study, console or Console()
        self.seeds = experiment.seeds

    def point(self, tags: Mapping[str, Any], make: Callable[[], Mapping[str, Any]]) -> Point:
        """Tags and what `make` measures; made once. A failed run becomes a point with "error", which is not kept."""
        key = hashlib.sha256(json.dumps(tags, sort_keys=True, default=str).encode()).hexdigest()[:16]
        try:
            point = self.experiment.record(f"{self.study}-{key}", lambda: {**tags, **make()})
        except UNSCError as error:
            point = {**tags, "error": first_line(error)}
        shown = {name: point[name] for name in ("AccDut", "AccDrt", "leak", "error") if point.get(name) is not None}
        words = [f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in shown.items()]
        self.console.print(f"{', '.join(f'{k} {v}' for k, v in tags.items())}: {', '.join(words)}")
        return point

    def points(self, tags: Mapping[str, Any], make: Callable[[], list[Point]]) -> list[Point]:
        """As `point`, for a run that gives several points: they are under "points" in its record."""
        point = self.point(tags, lambda: {"points": make()})
        points: list[Point] = point.get("points", [point])
        return points

    def run(self, tags: Mapping[str, Any], seed: int, **options: Any) -> Point:
        """Unlearn with options of `UNSCConfig`, and measure; a point with `tags` and the seed."""

        def make() -> dict[str, Any]:
            bench = self.experiment.bench(seed)
            return self.measured(bench, bench.run(Workbench.unlearn, options))

        return self.point({**tags, "seed": seed}, make)

    def measured(self, bench: Workbench, model: PreTrainedModel) -> dict[str, Any]:
        """Accuracies of an unlearned model, and what the last run of its bench cost."""
        return {**self.accuracies(bench, model), **bench.cost(model), "stopped_by": bench.stop_reason}

    def accuracies(self, bench: Workbench, model: PreTrainedModel) -> dict[str, Any]:
        """AccDut and AccDrt on the test rows."""
        experiment = self.experiment
        return experiment.accuracies(experiment.collect(bench, model, experiment.test, features=False))


class Points(list[Mapping[str, Any]]):
    """What a study measured: each point is a flat mapping of tags and numbers."""

    def where(self, **tags: Any) -> Points:
        """Points with these tags, without the failed ones."""
        return Points(p for p in self if "error" not in p and all(p.get(tag) == value for tag, value in tags.items()))

    def by(self, tag: str) -> dict[Any, Points]:
        """Points by the value of a tag, in the order of their first point, without the failed ones."""
        found = dict.fromkeys(p[tag] for p in self.where() if p.get(tag) is not None)
        return {value: self.where(**{tag: value}) for value in found}

    def mean(self, key: str) -> float:
        """Mean over the points that have this number, NaN where none has."""
        known = values(self, key)
        return float(np.mean(known)) if known else float("nan")

    def half(self, key: str) -> float:
        """Half the 95 % interval over points; 0 where it cannot be given."""
        return half_interval(values(self, key)) or 0.0

    def percent(self, key: str) -> str:
        """Mean ± half interval, in percent; a dash where nothing was measured."""
        return with_interval(100 * self.mean(key), 100 * self.half(key) or None) if values(self, key) else "–"

    def listed(self, tag: str, key: str) -> str:
        """Percent of each value of a tag, for a sentence."""
        known = {value: runs for value, runs in self.by(tag).items() if values(runs, key)}
        return ", ".join(f"{value}: {runs.percent(key)}" for value, runs in known.items())


@dataclass(frozen=True)
class Panel:
    """One diagram of a study's picture: means over seeds with their 95 % intervals.

    Attributes:
        y: number that is drawn upwards.
        x: tag of the places. Words stand beside each other, numbers on a line.
        by: tag that has a line for each of its values.
        at: number that is drawn to the right instead of the tag `x`.
        log: logarithmic axes: "x", or "xy" with the size of `y` and without intervals.
    """

    y: str
    x: str
    by: str | None = None
    at: str | None = None
    log: str = ""

    def draw(self, axes: Any, points: Points, headings: Mapping[str, str]) -> None:
        """Draw into `axes`; `headings` are those of tags and numbers."""
        places, label = list(points.by(self.x)), headings[self.y]
        words, marked = any(isinstance(place, str) for place in places), bool(self.at and not self.log)
        scale, heights = 100 if "%" in label else 1, list[float]()
        for i, (name, line) in enumerate((points.by(self.by) if self.by else {"": points}).items()):
            by_place = line.by(self.x)
            runs = {place: by_place[place] for place in (places if words else sorted(places)) if place in by_place}
            means, bars = (
                [scale * number(of, self.y) for of in runs.values()] for number in (Points.mean, Points.half)
            )
            if self.at:
                x = [of.mean(self.at) for of in runs.values()]
            else:
                x = [places.index(place) + 0.08 * i if words else place for place in runs]
            style = {"fmt": "o" if words or marked else "o-", "ms": 4, "lw": 1.6, "elinewidth": 0.8}
            if "y" in self.log:
                means, bars = np.abs(means).tolist(), [0.0] * len(bars)
            axes.errorbar(x, means, bars, label=name, color=colormaps["tab10"](i % 10), **style)
            for place, where in zip(runs, zip(x, means, strict=True), strict=True) if marked else ():
                axes.annotate(f"{place:g}", where, xytext=(3, 4), textcoords="offset points", fontsize=7)
            heights += [mean for mean in means if mean == mean]
        axes.set(xlabel=headings[self.at or self.x], ylabel=label)
        axes.set(**{f"{axis}scale": "log" for axis in self.log})
        if words:
            axes.set_xticks(range(len(places)), places, rotation=25, ha="right", fontsize=8)
        if scale == 100 and heights:  # the wide intervals of few seeds run off the picture
            axes.set_ylim(min(heights) - 3, max(heights) + 3)


Measure: TypeAlias = Callable[[Lab], Iterable[Point]]


@dataclass(frozen=True)
class Study:
    """A question, and what answers it.

    Attributes:
        name: how it is asked for.
        title: the question.
        tags: heading by key of what tells runs apart, in the order of the table.
        panels: of its picture.
        conclude: says in two sentences what the points show.
        measure: gives the points; the numbers of those that differ in their seed alone are averaged.
        numbers: heading by key of what is averaged. With "(%)" in its heading it is a share, shown in percent.
    """

    name: str
    title: str
    tags: Mapping[str, str]
    panels: Sequence[Panel]
    conclude: Callable[[Points], str]
    measure: Measure
    numbers: Mapping[str, str]

    def picture(self, points: Points) -> Figure:
        """All panels for which something was measured."""
        measured = [panel for panel in self.panels if values(points.where(), panel.y) and points.by(panel.x)]
        panels = measured or self.panels[:1]
        figure = Figure(figsize=(4.4 * len(panels), 3.6), layout="constrained")
        axes = np.atleast_1d(figure.subplots(1, len(panels)))
        for one, panel in zip(axes, panels, strict=True):
            panel.draw(one, points, {**self.tags, **self.numbers})
        if panels[0].by:
            legend(axes[0])
        return figure

    def table(self, points: Iterable[Mapping[str, Any]]) -> list[list[str]]:
        """A row for each combination of tags, the header first: means and half 95 % intervals over seeds."""
        groups: dict[tuple[Any, ...], Points] = {}
        for point in points:
            groups.setdefault(tuple(point.get(tag) for tag in self.tags), Points()).append(point)
        rows = [[*self.tags.values(), *self.numbers.values()]]
        for combination, runs in groups.items():
            measured = runs.where()
            cells = [_cell(measured, key, heading) for key, heading in self.numbers.items()]
            if not measured:
                cells = [str(runs[0]["error"]), *[""] * (len(cells) - 1)]
            rows.append([*("–" if value is None else str(value) for value in combination), *cells])
        return rows


def _cell(points: Points, key: str, heading: str) -> str:
    if "%" in heading or not values(points, key):
        return points.percent(key)
    half = points.half(key)
    return f"{points.mean(key):.3g}" + (f" ± {half:.2g}" if half else "")


STUDIES: dict[str, Study] = {}


def study(
    title: str, *, tags: Mapping[str, str], panels: Sequence[Panel], conclude: Callable[[Points], str],
    numbers: Mapping[str, str] = _NUMBERS,
) -> Callable[[Measure], Measure]:  # fmt: skip
    """Decorator: register a function from a `Lab` to points as a study; see `Study`. Its name is the function's."""

    def register(measure: Measure) -> Measure:
        name = measure.__name__.replace("_", "-")
        STUDIES[name] = Study(name, title, tags, panels, conclude, measure, numbers)
        return measure

    return register
