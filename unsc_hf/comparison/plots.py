"""Pictures of a comparison of methods: kept against forgotten, classes, layers, relearning, attack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..evaluation.audits.relearning import EVERY
from ..reporting.plots import BLUE, GREEN, GREY, save, shorten
from .summary import ORIGINAL, RETRAINED, half_interval, title, values

_MANY_CLASSES = 24


def _colours(names: Sequence[str]) -> dict[str, Any]:
    """One colour for each method, the same in all pictures."""
    palette = colormaps["tab20"]
    fixed = {"unsc": BLUE, ORIGINAL: GREY, RETRAINED: GREEN}
    others = [name for name in names if name not in fixed]
    return {**fixed, **{name: palette((i + 2) % 20) for i, name in enumerate(others)}}


def legend(axes: Any, **options: Any) -> None:
    """A small legend without a frame."""
    axes.legend(frameon=False, fontsize=8, **options)


def plot_front(outcome: Mapping[str, Any], path: Path) -> Path:
    """AccDrt against AccDut with 95 % intervals, and the retrained models' band (mean ± 2 standard deviations)."""
    runs = outcome["runs"]
    colours = _colours(list(runs))
    figure = Figure(figsize=(8.2, 4.8))
    axes = figure.subplots()
    markers = "oDsv^P*X<>"
    for i, (name, records) in enumerate(runs.items()):
        x, y = (100 * np.asarray(values(records, column)) for column in ("AccDut", "AccDrt"))
        if not len(x) or not len(y):
            continue
        axes.errorbar(
            x.mean(), y.mean(), xerr=half_interval(x.tolist()), yerr=half_interval(y.tolist()), elinewidth=0.8,
            label=title(name), color=colours[name], marker=markers[i % len(markers)], ls="none",
            ms=9 if name == "unsc" else 6, zorder=3 if name == "unsc" else 2,
        )  # fmt: skip
    band = 100 * np.asarray(values(outcome["references"], "AccDrt"))
    if len(band) > 1:
        low, high = band.mean() - 2 * band.std(ddof=1), band.mean() + 2 * band.std(ddof=1)
        axes.axhspan(low, high, color=GREEN, alpha=0.18, lw=0, label="retrained, ± 2 sd")
    axes.axvline(1, color=GREY, ls=":", lw=1)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(-0.3, 110)
    ticks = [0, 0.5, 1, 2, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    kept = [float(100 * np.mean(values(r, "AccDrt"))) for r in runs.values() if values(r, "AccDrt")] or [0.0, 100.0]
    axes.set_ylim(max(-2.0, min(kept) - 5), min(102.0, max(kept) + 8))
    axes.set_xlabel("AccDut: accuracy left on the forgotten classes (%; log beyond the dotted line)")
    axes.set_ylabel("AccDrt: accuracy on the others (%)")
    legend(axes, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return save(figure, path)


def plot_relearning(outcome: Mapping[str, Any], path: Path) -> Path:
    """Accuracy on the forgotten classes while they are taught again from ten examples of each class."""
    labels = "steps of training on 10 examples of every class", "accuracy on the forgotten classes (%)"
    return save(_lines(_curves(outcome, "relearning", "curve"), EVERY, *labels), path)


def plot_attack(outcome: Mapping[str, Any], path: Path) -> Path:
    """ROC of the loss attack on the forgotten training rows."""
    curves = _curves(outcome, "membership", "loss_roc")
    points = max((len(curve) for curve in curves.values()), default=2)
    figure = _lines(curves, 100 / (points - 1), "unseen rows accused (%)", "forgotten training rows found (%)")
    figure.axes[0].plot([0, 100], [0, 100], color=GREY, ls=":", lw=1)
    return save(figure, path)


def _curves(outcome: Mapping[str, Any], audit: str, key: str | None) -> dict[str, np.ndarray]:
    """Mean curve of each method over its seeds: what an audit gave under `key`, by default its number of each layer."""

    def curve(record: Mapping[str, Any]) -> list[float]:
        result = record["audits"].get(audit, {})
        layers = [result[name] for name in sorted(result) if name.startswith("layer_")]
        return layers if key is None else result.get(key) or []

    records = {**outcome["runs"], RETRAINED: outcome["references"]}
    known = {name: [line for record in of if (line := curve(record))] for name, of in records.items()}
    return {name: np.mean(np.asarray(lines, dtype=float), axis=0) for name, lines in known.items() if lines}


def _lines(curves: Mapping[str, np.ndarray], step: float, x_label: str, y_label: str) -> Figure:
    colours = _colours(list(curves))
    figure = Figure(figsize=(8.2, 4.6))
    axes = figure.subplots()
    for i, (name, curve) in enumerate(curves.items()):
        strong = name in ("unsc", ORIGINAL, RETRAINED)
        style = "-" if strong else ("-", "--", "-.")[i % 3]
        x = step * np.arange(len(curve))
        axes.plot(x, 100 * curve, style, color=colours[name], lw=2.6 if strong else 1.1, label=title(name))
    axes.set(ylim=(-2, 102), xlabel=x_label, ylabel=y_label)
    legend(axes, loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def plot_changes(outcome: Mapping[str, Any], path: Path) -> Path:
    """Change of each retained class's test accuracy against the original, a row for each method.

    Of many classes those that change most are shown.
    """
    forgotten, classes = set(outcome["forgotten"]), outcome["classes"]
    records = {name: of for name, of in {**outcome["runs"], RETRAINED: outcome["references"]}.items() if of}
    before = _per_class(records.pop(ORIGINAL))
    kept = [c for c in before if c not in forgotten]
    change = np.array([[100 * (_per_class(of)[c] - before[c]) for c in kept] for of in records.values()])
    if len(kept) > _MANY_CLASSES:
        most = np.sort(np.argsort(-np.abs(change).mean(0))[:_MANY_CLASSES])
        kept, change = [kept[i] for i in most], change[:, most]
    figure = Figure(figsize=(max(6.5, 0.42 * len(kept) + 3.2), 0.34 * len(records) + 1.6))
    axes = figure.subplots()
    image = axes.imshow(change, cmap="RdBu", vmin=-20, vmax=20, aspect="auto")
    axes.set_yticks(range(len(records)), [title(name) for name in records], fontsize=8)
    shown = [shorten(classes[c]) if c < len(classes) else str(c) for c in kept]
    axes.set_xticks(range(len(kept)), shown, rotation=40, ha="right", fontsize=8)
    if len(kept) <= 12:
        for i, row in enumerate(change):
            for j, number in enumerate(row):
                colour = "white" if abs(number) > 12 else "black"
                text = f"{round(number):+d}" if round(number) else "0"
                axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, label="points against the original", extend="both")
    return save(figure, path)


def _per_class(records: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    return {int(c): float(np.mean([record["per_class"][c] for record in records])) for c in records[0]["per_class"]}


def plot_depth(outcome: Mapping[str, Any], path: Path) -> Path:
    """Linear probe of every layer: what can still be read of the forgotten classes."""
    labels = "hidden state (0: embeddings)", "linear probe on the forgotten classes (%)"
    figure = _lines(_curves(outcome, "probe", None), 1, *labels)
    figure.axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    return save(figure, path)
