"""Pictures of a comparison of methods: what was kept, and which decisions changed, against what was forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from ..reporting.plots import BLUE, GREEN, GREY, save
from ..reporting.report import Picture
from .summary import ORIGINAL, half_interval, title, values

# Column, label and caption by file.
_PICTURES = {
    "front.png": (
        "AccDrt", "AccDrt: accuracy on the others (%)",
        "What was kept against what was forgotten; bars are 95 % intervals over seeds."),
    "flips.png": (
        "flips", "decisions changed on kept test rows (%)",
        "Decisions changed on kept test rows; retraining changes as many as its band says."),
}  # fmt: skip


def pictures(outcome: Mapping[str, Any], folder: Path) -> list[Picture]:
    """Draw one forget set into files of `folder`."""
    return [
        Picture(save(_against_forgetting(outcome, column, label), folder / file), caption)
        for file, (column, label, caption) in _PICTURES.items()
    ]


def legend(axes: Any, **options: Any) -> None:
    """A small legend without a frame."""
    axes.legend(frameon=False, fontsize=8, **options)


def _against_forgetting(outcome: Mapping[str, Any], column: str, label: str) -> Figure:
    """A column against AccDut with 95 % intervals, and the retrained models' band (mean ± 2 standard deviations)."""
    fixed, markers, heights = {"unsc": BLUE, ORIGINAL: GREY}, "oDsv^P*X<>", list[float]()
    figure = Figure(figsize=(8.2, 4.8))
    axes = figure.subplots()
    for i, (name, records) in enumerate(outcome["runs"].items()):
        x, y = (100 * np.asarray(values(records, path)) for path in ("AccDut", column))
        if not len(x) or not len(y):
            continue
        heights.append(float(y.mean()))
        axes.errorbar(
            x.mean(), y.mean(), xerr=half_interval(x.tolist()), yerr=half_interval(y.tolist()), elinewidth=0.8,
            label=title(name), color=fixed.get(name) or colormaps["tab20"](i % 20), marker=markers[i % len(markers)],
            ls="none", ms=9 if name == "unsc" else 6, zorder=3 if name == "unsc" else 2,
        )  # fmt: skip
    band = 100 * np.asarray(values(outcome["references"], column))
    if len(band) > 1:
        low, high = band.mean() - 2 * band.std(ddof=1), band.mean() + 2 * band.std(ddof=1)
        axes.axhspan(low, high, color=GREEN, alpha=0.18, lw=0, label="retrained, ± 2 sd")
    axes.axvline(1, color=GREY, ls=":", lw=1)
    axes.set_xscale("symlog", linthresh=1)
    ticks = [0, 0.5, 1, 2, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set(
        xlim=(-0.3, 110), ylim=(max(-2.0, min(heights) - 5), min(102.0, max(heights) + 8)), ylabel=label,
        xlabel="AccDut: accuracy left on the forgotten classes (%; log beyond the dotted line)",
    )  # fmt: skip
    legend(axes, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
