"""Many classes at once: a tenth of them to nine tenths, beside retrained models and the controls."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ...data.columns import read_labels
from ...data.selection import Request
from ...reporting.plots import BLUE, GREEN, GREY, ORANGE
from .lab import Lab, curve, different, matching, mean, panels, percent, zoom
from .registry import Points, Study, register

_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)


_WAYS = {
    "UNSC": {},
    "with rehearsal": {"objective": "unsc_retain"},
    "random subspace": {"null_space": "random"},
    "no projection": {"null_space": "none"},
}


_COLOURS = {
    "UNSC": BLUE,
    "with rehearsal": "#6fb1e0",
    "random subspace": ORANGE,
    "no projection": GREY,
    "retrained": GREEN,
}


def measure(lab: Lab) -> list[dict[str, Any]]:
    """Nested sets of classes in one random order; retrained models where they may be trained (`train_retrained`)."""
    experiment, points = lab.experiment, []
    classes = sorted(set(read_labels(experiment.train, experiment.config.label_column).tolist()))
    order = np.random.default_rng(0).permutation(classes).tolist()
    for share in _SHARES:
        count = min(max(1, round(share * len(classes))), len(classes) - 1)
        request = Request(forget_classes=tuple(sorted(order[:count])))
        inner = Lab(replace(experiment, request=request), f"{lab.study}-{count}", lab.console)
        for seed in lab.seeds:
            for way, options in _WAYS.items():
                points.append(inner.run({"way": way, "classes": count}, seed, options))
        if experiment.arguments.train_retrained or experiment.arguments.quickstart:
            for seed, folder in zip(lab.seeds, inner.experiment.references(), strict=True):
                tags = {"way": "retrained", "classes": count, "seed": seed}
                points.append(inner.point(tags, partial(_retrained, inner, seed, folder)))
    return points


def _retrained(lab: Lab, seed: int, folder: str) -> dict[str, Any]:
    return lab.accuracies(lab.experiment.bench(seed), lab.experiment.load(folder))


def plot(points: Points) -> Figure:
    figure, axes = panels(2, 4.8)
    for one, key in zip(axes, ("AccDut", "AccDrt"), strict=True):
        heights = []
        for way, colour in _COLOURS.items():
            runs = matching(points, way=way)
            if runs:
                heights += curve(one, runs, "classes", key, way, colour)
        one.set(xlabel="classes to forget", ylabel=f"{key} (%)")
        zoom(one, heights)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def paragraph(points: Points) -> str:
    lines = []
    for count in different(points, "classes"):
        ways = {way: matching(points, way=way, classes=count) for way in _COLOURS}
        parts = [f"{way} {percent(runs, 'AccDrt')}" for way, runs in ways.items() if runs]
        lines.append(f"{count} classes: {', '.join(parts)} (UNSC's AccDut {percent(ways['UNSC'], 'AccDut')})")
    best = []
    for count in different(points, "classes"):
        ours, theirs = (matching(points, way=way, classes=count) for way in ("UNSC", "retrained"))
        if ours and theirs:
            best.append(mean(ours, "AccDrt") - mean(theirs, "AccDrt"))
    text = f"AccDrt, percent. {'; '.join(lines)}."
    return text + (
        f" Against retraining, UNSC's AccDrt differs by {100 * min(best):+.1f} to {100 * max(best):+.1f} points."
        if best
        else ""
    )


register(
    Study(
        "many-classes",
        "How many classes can go at once?",
        measure,
        {"classes": "classes", "way": "way"},
        {"AccDut": "AccDut", "AccDrt": "AccDrt", "leak": "leak", "steps": "steps", "seconds": "seconds"},
        plot,
        paragraph,
    )
)
