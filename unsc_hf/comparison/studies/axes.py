"""Pictures of studies: means over seeds with 95 % intervals."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..plots import bare
from .study import Points

Line = tuple[str, Points, str, Any]  # label, points, key of the height, colour


def panels(count: int, width: float = 4.6, height: float = 3.6) -> tuple[Figure, list[Any]]:
    """A figure with bare axes side by side."""
    figure = Figure(figsize=(width * count, height), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, count)))
    for one in axes:
        bare(one)
    return figure, axes


def curves(axes: Any, x: str, lines: Iterable[Line], scale: float = 100.0, **labels: Any) -> list[float]:
    """Draw each line against the tag `x`; returns all means. Percent axes show the means (`zoom`).

    Args:
        scale: 100 for shares.
        labels: for `axes.set`.
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


def legend(axes: Any, **options: Any) -> None:
    """A small legend without a frame."""
    axes.legend(frameon=False, fontsize=8, **options)
