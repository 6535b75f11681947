"""Many classes at once: a tenth of them to nine tenths, beside retrained models and the controls."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from ...data.selection import Request
from ...reporting.plots import BLUE, GREEN, GREY, ORANGE
from .study import Lab, Point, Points, Study, curves, legend, panels, register

_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
_WAYS = {
    "UNSC": {}, "with rehearsal": {"objective": "unsc_retain"}, "random subspace": {"null_space": "random"},
    "no projection": {"null_space": "none"},
}  # fmt: skip
_COLOURS = dict(zip((*_WAYS, "retrained"), (BLUE, "#6fb1e0", ORANGE, GREY, GREEN), strict=True))


@register
class ManyClassesStudy(Study):
    """Nested sets of classes in one random order; retrained models where they may be trained (`train_retrained`)."""

    name = "many-classes"
    title = "How many classes can go at once?"
    tags = {"classes": "classes", "way": "way"}

    def measure(self, lab: Lab) -> list[Point]:
        experiment, points = lab.experiment, []
        classes = np.unique(experiment.labels(experiment.train))
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

    def plot(self, points: Points) -> Figure:
        figure, axes = panels(2, 4.8)
        for one, key in zip(axes, ("AccDut", "AccDrt"), strict=True):
            lines = [(way, points.where(way=way), key, colour) for way, colour in _COLOURS.items()]
            curves(one, "classes", lines, xlabel="classes to forget", ylabel=f"{key} (%)")
        legend(axes[0])
        return figure

    def paragraph(self, points: Points) -> str:
        lines, gaps = [], []
        for count, of_count in points.by("classes").items():
            ways = {way: of_count.where(way=way) for way in _COLOURS}
            parts = ", ".join(f"{way} {runs.percent('AccDrt')}" for way, runs in ways.items() if runs)
            lines.append(f"{count} classes: {parts} (UNSC's AccDut {ways['UNSC'].percent('AccDut')})")
            if ways["UNSC"] and ways["retrained"]:
                gaps.append(100 * (ways["UNSC"].mean("AccDrt") - ways["retrained"].mean("AccDrt")))
        text = f"AccDrt, percent. {'; '.join(lines)}."
        if gaps:
            text += f" Against retraining, UNSC's AccDrt differs by {min(gaps):+.1f} to {max(gaps):+.1f} points."
        return text


def _retrained(lab: Lab, seed: int, folder: str) -> Point:
    return lab.accuracies(lab.experiment.bench(seed), lab.experiment.load(folder))
