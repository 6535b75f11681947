"""Many classes at once: a tenth of them to nine tenths, beside retrained models and the controls."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ...data.selection import Request
from .study import Lab, Panel, Point, Points, study

_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
_WAYS: dict[str, dict[str, Any]] = {
    "UNSC": {}, "with rehearsal": {"objective": "unsc_retain"}, "random subspace": {"null_space": "random"},
    "no projection": {"null_space": "none"},
}  # fmt: skip


def _conclude(points: Points) -> str:
    counts = points.by("classes")
    parts = [f"{count} classes: {runs.listed('way', 'AccDrt')}" for count, runs in counts.items()]
    gaps = [
        100 * (runs.where(way="UNSC").mean("AccDrt") - runs.where(way="retrained").mean("AccDrt"))
        for runs in counts.values()
        if runs.where(way="retrained")
    ]
    text = f"AccDrt in percent: {'; '.join(parts)}."
    return f"{text} UNSC differs from retraining by {min(gaps):+.1f} to {max(gaps):+.1f} points." if gaps else text


@study(
    "How many classes can go at once?",
    tags={"classes": "classes", "way": "way"},
    panels=[Panel(y, "classes", by="way") for y in ("AccDut", "AccDrt")],
    conclude=_conclude,
)
def many_classes(lab: Lab) -> Iterator[Point]:
    """Nested sets of classes in one random order; retrained models where they may be trained (`train_retrained`)."""
    experiment = lab.experiment
    classes = np.unique(experiment.labels(experiment.train))
    order = np.random.default_rng(0).permutation(classes).tolist()
    counts = dict.fromkeys(min(max(1, round(share * len(classes))), len(classes) - 1) for share in _SHARES)
    for count in counts:
        request = Request(forget_classes=tuple(sorted(order[:count])))
        inner = Lab(replace(experiment, request=request), f"{lab.study}-{count}", lab.console)
        for seed in lab.seeds:
            for way, options in _WAYS.items():
                yield inner.run({"way": way, "classes": count}, seed, **options)
            if experiment.trains_references:
                tags = {"way": "retrained", "classes": count, "seed": seed}
                yield inner.point(tags, partial(_retrained, inner, seed))


def _retrained(lab: Lab, seed: int) -> Point:
    model = lab.experiment.load(lab.experiment.reference(seed))
    return lab.accuracies(lab.experiment.bench(seed), model)
