"""Pictures of a comparison of methods: kept and changed against forgotten, classes, layers, relearning, attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from ..evaluation.audits.relearning import EVERY
from ..reporting.plots import BLUE, GREEN, GREY, plot_per_class, save
from ..reporting.report import Picture
from .summary import ORIGINAL, RETRAINED, half_interval, title, values

_FORGETTING = {
    "front.png": ("AccDrt", "AccDrt: accuracy on the others (%)",
                  "What was kept against what was forgotten; bars are 95 % intervals over seeds."),
    "flips.png": ("flips", "decisions changed on kept test rows (%)",
                  "Decisions changed on kept test rows against what was forgotten; retraining changes as many as its "
                  "band says."),
}  # fmt: skip

# Audit, what it gave (None: a number of each layer), length of the x axis (None: of a step), labels, caption.
_CURVES: dict[str, tuple[str, str | None, float | None, str, str, str]] = {
    "depth.png": (
        "probe", None, None, "hidden state (0: embeddings)", "linear probe on the forgotten classes (%)",
        "What a linear probe still reads of the forgotten classes in each layer."),
    "relearning.png": (
        "relearning", "curve", None, f"training on 10 examples of every class ({EVERY} steps each)",
        "accuracy on the forgotten classes (%)",
        "How fast the forgotten classes come back from ten examples of each class."),
    "attack.png": (
        "membership", "loss_roc", 100.0, "unseen rows accused (%)", "forgotten training rows found (%)",
        "The loss attack on the forgotten training rows; chance is the diagonal."),
}  # fmt: skip


def pictures(outcome: Mapping[str, Any], folder: Path) -> list[Picture]:
    """Draw what was measured of one forget set into files of `folder`."""
    runs, references = outcome["runs"], outcome["references"]
    drawn = []
    for file, (column, label, caption) in _FORGETTING.items():
        if values(runs[ORIGINAL], column):
            drawn.append(Picture(save(_against_forgetting(outcome, column, label), folder / file), caption))
    shown = [ORIGINAL, "unsc" if "unsc" in runs else list(runs)[-1]]
    per_class = {title(name): _per_class(runs[name]) for name in shown}
    if references:
        per_class[RETRAINED] = _per_class(references)
    path = plot_per_class(per_class, outcome["classes"], outcome["forgotten"], folder / "per_class.png")
    drawn.append(Picture(path, "Test accuracy of every class, mean over seeds."))
    for file, (audit, key, length, x_label, y_label, caption) in _CURVES.items():
        curves = _curves({**runs, RETRAINED: references}, audit, key)
        if curves:
            drawn.append(Picture(save(_lines(curves, length, x_label, y_label), folder / file), caption))
    return drawn


def legend(axes: Any, **options: Any) -> None:
    """A small legend without a frame."""
    axes.legend(frameon=False, fontsize=8, **options)


def _colours(names: Sequence[str]) -> dict[str, Any]:
    """One colour for each method, the same in all pictures."""
    fixed = {"unsc": BLUE, ORIGINAL: GREY, RETRAINED: GREEN}
    others = [name for name in names if name not in fixed]
    return {**fixed, **{name: colormaps["tab20"]((i + 2) % 20) for i, name in enumerate(others)}}


def _per_class(records: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    return {int(c): float(np.mean([record["per_class"][c] for record in records])) for c in records[0]["per_class"]}


def _against_forgetting(outcome: Mapping[str, Any], column: str, label: str) -> Figure:
    """A column against AccDut with 95 % intervals, and the retrained models' band (mean ± 2 standard deviations)."""
    runs, heights = outcome["runs"], list[float]()
    colours, markers = _colours(list(runs)), "oDsv^P*X<>"
    figure = Figure(figsize=(8.2, 4.8))
    axes = figure.subplots()
    for i, (name, records) in enumerate(runs.items()):
        x, y = (100 * np.asarray(values(records, path)) for path in ("AccDut", column))
        if not len(x) or not len(y):
            continue
        heights.append(float(y.mean()))
        axes.errorbar(
            x.mean(), y.mean(), xerr=half_interval(x.tolist()), yerr=half_interval(y.tolist()), elinewidth=0.8,
            label=title(name), color=colours[name], marker=markers[i % len(markers)], ls="none",
            ms=9 if name == "unsc" else 6, zorder=3 if name == "unsc" else 2,
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


def _curves(runs: Mapping[str, Any], audit: str, key: str | None) -> dict[str, np.ndarray]:
    """Mean curve of each method over its seeds: what an audit gave under `key`, by default its number of each layer."""

    def curve(record: Mapping[str, Any]) -> list[float]:
        result = record["audits"].get(audit, {})
        layers = [result[name] for name in sorted(result) if name.startswith("layer_")]
        return layers if key is None else result.get(key) or []

    known = {name: [line for record in of if (line := curve(record))] for name, of in runs.items()}
    return {name: np.mean(np.asarray(lines, dtype=float), axis=0) for name, lines in known.items() if lines}


def _lines(curves: Mapping[str, np.ndarray], length: float | None, x_label: str, y_label: str) -> Figure:
    colours = _colours(list(curves))
    figure = Figure(figsize=(8.2, 4.6))
    axes = figure.subplots()
    for i, (name, curve) in enumerate(curves.items()):
        strong = name in ("unsc", ORIGINAL, RETRAINED)
        style = "-" if strong else ("-", "--", "-.")[i % 3]
        x = np.linspace(0, len(curve) - 1 if length is None else length, len(curve))
        axes.plot(x, 100 * curve, style, color=colours[name], lw=2.6 if strong else 1.1, label=title(name))
    axes.set(ylim=(-2, 102), xlabel=x_label, ylabel=y_label)
    legend(axes, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure
