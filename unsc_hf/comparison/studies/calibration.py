"""How much calibration needs: rows in a step of unlearning, and retained rows read for the statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ...reporting.plots import BLUE, GREEN, ORANGE
from .study import Lab, Point, Points, Study, curves, legend, panels, register

_BATCHES = (8, 16, 32, 64, 128, 256, 512)
_ROWS = (10, 30, 100, 300, 1000, 3000)


@register
class CalibrationStudy(Study):
    """Batch sizes 8 to 512; statistics from 10 rows of each class to all of them."""

    name = "calibration"
    title = "How many rows do a step and the statistics need?"
    tags = {"batch": "rows in a step", "rows": "rows of a class in the statistics"}

    def measure(self, lab: Lab) -> list[Point]:
        most = int(np.bincount(lab.experiment.labels(lab.experiment.retain)).max())
        points = []
        for seed in lab.seeds:
            points += [lab.run({"batch": n}, seed, {"per_device_train_batch_size": n}) for n in _BATCHES]
            for n in (*(n for n in _ROWS if n < most), most):
                options = {"max_samples_per_class": n, "max_rows_per_class": None}
                points.append(lab.run({"rows": n}, seed, options, rebuild=tuple(options)))
        return points

    def plot(self, points: Points) -> Figure:
        figure, axes = panels(4, 3.7)
        words = {"batch": "forgotten rows in a step", "rows": "retained rows of each class in the statistics"}
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
        text = f"AccDrt, percent, by rows in a step: {by_batch}. By rows of each class in the statistics: {by_rows}."
        kept = {n: runs.mean("AccDrt") for n, runs in rows.items()}
        enough = next((n for n in kept if kept[n] >= kept[max(kept)] - 0.005), None)
        if enough:
            text += f" From {enough} rows of each class on, AccDrt lies within half a point of what all rows give."
        return text
