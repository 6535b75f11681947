"""What studies work with: runs that are measured alike and kept, means over seeds, axes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from transformers import PreTrainedModel

from ...errors import UNSCError, first_line
from ..experiment import Experiment
from ..methods import Workbench
from ..plots import bare
from ..summary import half_interval, with_interval

Point = dict[str, Any]


class Lab:
    """Runs of one study. A stopped study goes on where it was.

    Attributes:
        experiment: models and rows; `experiment.request` is what the study forgets, unless it makes its own requests.
        study: name of the study; its records are kept under it.
    """

    def __init__(self, experiment: Experiment, study: str, console: Console | None = None) -> None:
        self.experiment, self.study, self.console = experiment, study, console or Console()

    @property
    def seeds(self) -> Sequence[int]:
        return self.experiment.seeds

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
        self.console.print(
            f"{', '.join(f'{k} {v}' for k, v in tags.items())}: "
            + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{v}" for k, v in shown.items())
        )
        return point

    def points(self, tags: Mapping[str, Any], make: Callable[[], list[Point]]) -> list[Point]:
        """As `point`, for a run that gives several points: they are under "points" in its record."""
        point = self.point(tags, lambda: {"points": make()})
        points: list[Point] = point.get("points", [point])
        return points

    def run(
        self, tags: Mapping[str, Any], seed: int, options: Mapping[str, Any], rebuild: Sequence[str] = (), **more: Any
    ) -> Point:
        """Unlearn with options of `UNSCConfig`, and measure.

        Args:
            tags: what distinguishes the point; the seed is added.
            rebuild: those options that change what statistics are collected from.
            more: `relabel` and the like, for `Workbench.unlearn`.
        """

        def make() -> dict[str, Any]:
            bench = self.experiment.bench(seed, **{name: options[name] for name in rebuild})
            model = bench.unlearn(**{k: v for k, v in options.items() if k not in rebuild}, **more)
            return self.measured(bench, model)

        return self.point({**tags, "seed": seed}, make)

    def measured(self, bench: Workbench, model: PreTrainedModel) -> dict[str, Any]:
        """Accuracies of an unlearned model, and what the last run of its bench cost."""
        return {
            **self.accuracies(bench, model),
            "leak": bench.leak(model),
            "steps": bench.steps,
            "seconds": bench.seconds,
            "stopped_by": bench.stop_reason,
        }

    def accuracies(self, bench: Workbench, model: PreTrainedModel) -> dict[str, Any]:
        """AccDut and AccDrt on the test rows."""
        outputs = self.experiment.collect(bench, model, self.experiment.test, features=False)
        return self.experiment.accuracies(outputs)


# ---- reading points -------------------------------------------------------------------------------------------------
def matching(points: Sequence[Mapping[str, Any]], **tags: Any) -> list[Mapping[str, Any]]:
    """Points with these tags, without the failed ones."""
    return [p for p in points if "error" not in p and all(p.get(name) == value for name, value in tags.items())]


def values(points: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Known numbers."""
    return [float(p[key]) for p in points if p.get(key) is not None]


def mean(points: Sequence[Mapping[str, Any]], key: str) -> float:
    """Mean over points, NaN without any."""
    known = values(points, key)
    return float(np.mean(known)) if known else float("nan")


def spread(points: Sequence[Mapping[str, Any]], key: str) -> float:
    """Half the 95 % interval over points; 0 where it cannot be given."""
    return half_interval(values(points, key)) or 0.0


def percent(points: Sequence[Mapping[str, Any]], key: str) -> str:
    """Mean ± half interval, in percent; a dash where nothing was measured."""
    if not values(points, key):
        return "–"
    half = half_interval(values(points, key))
    return with_interval(100 * mean(points, key), None if half is None else 100 * half)


def different(points: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """Values of a tag, in the order of their first point."""
    return list(dict.fromkeys(p[key] for p in points if key in p))


def panels(count: int, width: float = 4.6, height: float = 3.6) -> tuple[Figure, list[Any]]:
    """A figure with bare axes side by side."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, count)))
    for one in axes:
        bare(one)
    return figure, axes


def curve(
    axes: Any, points: Sequence[Mapping[str, Any]], x: str, y: str, label: str, colour: Any, scale: float = 100.0
) -> list[float]:
    """Mean of `y` over seeds against `x`, with 95 % intervals; returns the means."""
    places = sorted({p[x] for p in matching(points) if p.get(x) is not None})
    rows = [matching(points, **{x: place}) for place in places]
    heights, bars = [scale * mean(row, y) for row in rows], [scale * spread(row, y) for row in rows]
    axes.errorbar(places, heights, yerr=bars, fmt="o-", ms=4, lw=1.6, elinewidth=0.8, label=label, color=colour)
    return heights


def zoom(axes: Any, heights: Sequence[float], margin: float = 3.0) -> None:
    """Let a percent axis show the means; the wide intervals of few seeds run off the picture."""
    known = [h for h in heights if h == h]
    if known:
        axes.set_ylim(max(-2.0, min(known) - margin), min(102.0, max(known) + margin))


def bars(
    axes: Any, points: Sequence[Mapping[str, Any]], groups: Sequence[tuple[str, Mapping[str, Any]]], key: str,
    colours: Sequence[Any],
) -> None:  # fmt: skip
    """One bar with its interval for each group of points, in percent."""
    for i, (_, tags) in enumerate(groups):
        runs = matching(points, **tags)
        axes.bar(i, 100 * mean(runs, key), yerr=100 * spread(runs, key), color=colours[i % len(colours)], capsize=3)
    axes.set_xticks(range(len(groups)), [label for label, _ in groups], rotation=25, ha="right", fontsize=8)
