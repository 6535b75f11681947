"""What studies measure with: runs that are measured alike, and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from transformers import PreTrainedModel

from ...errors import UNSCError, first_line
from ..experiment import Experiment
from ..workbench import Workbench

Point = dict[str, Any]  # tags and measured numbers of one run


class Lab:
    """Runs of one study. A stopped study goes on where it was.

    Attributes:
        experiment: models and rows; `experiment.request` is what the study forgets, unless it makes its own requests.
        study: name of the study; its records are kept under it.
        seeds: one run for each.
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

    def run(self, tags: Mapping[str, Any], seed: int, options: Mapping[str, Any], rebuild: Sequence[str] = ()) -> Point:
        """Unlearn with options of `UNSCConfig`, and measure.

        Args:
            tags: what distinguishes the point; the seed is added.
            rebuild: those options that change what statistics are collected from.
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
