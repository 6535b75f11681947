"""How much calibration needs: rows in a step of unlearning, and retained rows read for the statistics."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from ...data.columns import read_labels
from ...reporting.plots import BLUE, GREEN, ORANGE
from .lab import Lab, curve, matching, mean, panels, percent, zoom
from .registry import Points, Study, register

_BATCHES = (8, 16, 32, 64, 128, 256, 512)
_ROWS = (10, 30, 100, 300, 1000, 3000)


def measure(lab: Lab) -> list[dict[str, Any]]:
    """Batch sizes 8 to 512; 10 rows of each class to all of them."""
    labels = read_labels(lab.experiment.retain, lab.experiment.config.label_column)
    most = max(int((labels == c).sum()) for c in set(labels.tolist()))
    rows = [*(n for n in _ROWS if n < most), most]
    points = []
    for seed in lab.seeds:
        points += [lab.run({"batch": n}, seed, {"per_device_train_batch_size": n}) for n in _BATCHES]
        for n in rows:
            options = {"max_samples_per_class": n, "max_rows_per_class": None}
            points.append(lab.run({"rows": n}, seed, options, rebuild=tuple(options)))
    return points


def plot(points: Points) -> Figure:
    figure, axes = panels(4, 3.7)
    words = {"batch": "forgotten rows in a step", "rows": "retained rows of each class in the statistics"}
    for (tag, label), (kept, lost) in zip(words.items(), (axes[:2], axes[2:]), strict=True):
        runs = [p for p in points if p.get(tag) is not None]
        zoom(kept, curve(kept, runs, tag, "AccDrt", "AccDrt", BLUE))
        heights = curve(lost, runs, tag, "AccDut", "AccDut", ORANGE) + curve(lost, runs, tag, "leak", "leak", GREEN)
        zoom(lost, heights)
        kept.set(xscale="log", xlabel=label, ylabel="AccDrt (%)")
        lost.set(xscale="log", xlabel=label, ylabel="AccDut, held-out leak (%)")
        lost.legend(frameon=False, fontsize=8)
    return figure


def paragraph(points: Points) -> str:
    def line(tag: str) -> str:
        settings = sorted({p[tag] for p in matching(points) if p.get(tag) is not None})
        return ", ".join(f"{n}: {percent(matching(points, **{tag: n}), 'AccDrt')}" for n in settings)

    rows = sorted({p["rows"] for p in matching(points) if p.get("rows") is not None})
    full = mean(matching(points, rows=rows[-1]), "AccDrt") if rows else float("nan")
    enough = next((n for n in rows if mean(matching(points, rows=n), "AccDrt") >= full - 0.005), None)
    enough_rows = (
        f" From {enough} rows of each class on, AccDrt lies within half a point of what all rows give."
        if enough
        else ""
    )
    return (
        f"AccDrt, percent, by rows in a step: {line('batch')}. "
        f"By rows of each class in the statistics: {line('rows')}.{enough_rows}"
    )


register(
    Study(
        "calibration",
        "How many rows do a step and the statistics need?",
        measure,
        {"batch": "rows in a step", "rows": "rows of a class in the statistics"},
        {"AccDut": "AccDut", "AccDrt": "AccDrt", "leak": "leak", "steps": "steps", "seconds": "seconds"},
        plot,
        paragraph,
    )
)
