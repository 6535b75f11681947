"""How much calibration needs: rows in a step of unlearning, and retained rows read for the statistics."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from ...reporting.plots import BLUE, GREEN, ORANGE
from .study import Lab, Point, Points, Study, curves, legend, panels, register

_BATCHES = (8, 16, 32, 64, 128, 256, 512)
_ROWS = (1, 3, 10, 30, 100)


@register
class CalibrationStudy(Study):
    """Batch sizes 8 to 512; statistics from 1 row a direction to 100."""

    name = "calibration"
    title = "How many rows do a step and the statistics need?"
    tags = {"batch": "rows in a step", "rows": "rows of the statistics for each direction"}

    def measure(self, lab: Lab) -> list[Point]:
        points = []
        for seed in lab.seeds:
            points += [lab.run({"batch": n}, seed, {"per_device_train_batch_size": n}) for n in _BATCHES]
            for n in _ROWS:
                options = {"rows_per_direction": n}
                points.append(lab.run({"rows": n}, seed, options, rebuild=tuple(options)))
        return points

    def plot(self, points: Points) -> Figure:
        figure, axes = panels(4, 3.7)
        words = {
            "batch": "forgotten rows in a step",
            "rows": "rows of the statistics a direction",
        }
        lines = [("AccDut", points, "AccDut", ORANGE), ("leak", points, "leak", GREEN)]
        for (tag, label), (kept, lost) in zip(words.items(), (axes[:2], axes[2:]), strict=True):
            shared: dict[str, Any] = {"xscale": "log", "xlabel": label}
            curves(kept, tag, [("AccDrt", points, "AccDrt", BLUE)], ylabel="AccDrt (%)", **shared)
            curves(lost, tag, lines, ylabel="AccDut, held-out leak (%)", **shared)
            legend(lost)
        return figure

    def paragraph(self, points: Points) -> str:
        batches, rows = (dict(sorted(points.by(tag).items())) for tag in self.tags)
        by_batch, by_rows = (
            ", ".join(f"{n}: {runs.percent('AccDrt')}" for n, runs in settings.items()) for settings in (batches, rows)
        )
        text = f"AccDrt, percent, by rows in a step: {by_batch}. By rows of the statistics a direction: {by_rows}."
        kept = {n: runs.mean("AccDrt") for n, runs in rows.items()}
        enough = next((n for n in kept if kept[n] >= kept[max(kept)] - 0.005), None)
        if enough:
            text += f" From {enough} rows a direction on, AccDrt lies within half a point of the most rows."
        return text
