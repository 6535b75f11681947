"""Pictures of one run: accuracy of each class, the course of unlearning, rank and capacity of each layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure

from ..utils.files import write_beside

matplotlib.use("Agg")

GREY, BLUE, ORANGE, GREEN = "#9aa0a6", "#1f6fb4", "#d1642a", "#3a8f5c"

_MOST_CLASSES = 40  # bars of more classes would be too thin to read


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG without the upper and right frame, whole or not at all."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    write_beside(path, lambda scratch: figure.savefig(scratch, dpi=150, bbox_inches="tight"))
    return path


def shorten(name: str, width: int = 18) -> str:
    """A class name that fits an axis; `$` is escaped, because matplotlib reads it as mathematics."""
    plain = " ".join(str(name).split()).replace("$", r"\$")
    return plain if len(plain) <= width else plain[: width - 1] + "…"


def plot_per_class(
    accuracies: Mapping[str, Mapping[int, float]], names: Sequence[str], forgotten: Sequence[int], path: Path
) -> Path:
    """Test accuracy in [0, 1] of each class id, one bar for each model, in drawing order; `names` are by id.

    The classes to forget are drawn first and shaded.
    """
    shown = [*forgotten, *(c for c in range(len(names)) if c not in forgotten)]
    shown = [c for c in shown if any(c in by_class for by_class in accuracies.values())]
    if len(shown) > _MOST_CLASSES:  # keep some forgotten classes, and those that changed most
        series = list(accuracies.values())
        change = {c: abs(series[-1].get(c, 0.0) - series[0].get(c, 0.0)) for c in shown if c not in forgotten}
        half = _MOST_CLASSES // 2
        shown = [*forgotten[:half], *sorted(change, key=lambda c: -change[c])[:half]]
    figure = Figure(figsize=(max(6.5, 0.75 * len(shown)), 3.6))
    axes = figure.subplots()
    colours = [GREY, BLUE, ORANGE, GREEN]
    width = 0.8 / max(len(accuracies), 1)
    for i, (model, by_class) in enumerate(accuracies.items()):
        x = [j + (i - (len(accuracies) - 1) / 2) * width for j in range(len(shown))]
        axes.bar(x, [100 * by_class.get(c, 0.0) for c in shown], width, label=model, color=colours[i % len(colours)])
    shaded = sum(c in forgotten for c in shown)
    axes.axvspan(-0.5, shaded - 0.5, color="#f3d9c9", zorder=0, label="to be forgotten")
    axes.set_xticks(range(len(shown)), [shorten(names[c]) for c in shown], rotation=30, ha="right")
    axes.set(xlim=(-0.5, len(shown) - 0.5), ylim=(0, 100), ylabel="test accuracy (%)")
    axes.legend(ncols=len(accuracies) + 1, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False, fontsize=9)
    return save(figure, path)


def objective_title(method: str) -> str:
    """Name for readers of an objective, with or without projection."""
    return method.replace("unsc", "UNSC").replace(" unprojected", ", no projection").replace("_", " ")


def plot_answers(methods: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> Path:
    """ROUGE-L of every model's answers, a group of bars for each set that has it; `methods` by method and set."""
    sets = [name for name, metrics in next(iter(methods.values())).items() if "rouge_l" in metrics]
    figure = Figure(figsize=(min(11.0, max(6.5, 0.9 * len(sets) * len(methods) ** 0.5 + 2)), 4.2))
    axes = figure.subplots()
    width = 0.84 / len(methods)
    emphasised = {"original": GREY, "unsc": BLUE, "retrained": GREEN}
    others = iter([ORANGE, "#7a5195", "#bc5090", "#8c6d31", "#5b8c85"])
    colours: dict[str, Any] = {}
    for i, (method, of_sets) in enumerate(methods.items()):
        places = [x + (i - (len(methods) - 1) / 2) * width for x in range(len(sets))]
        objective = method.removesuffix(" unprojected")
        if objective not in colours:
            colours[objective] = emphasised.get(objective) or next(others, "black")
        alpha = 1.0 if objective == method else 0.35  # a paler bar for the run without projection
        heights = [100 * of_sets[s]["rouge_l"] for s in sets]
        axes.bar(places, heights, width * 0.92, label=objective_title(method), color=colours[objective], alpha=alpha)
    axes.set_xticks(range(len(sets)), [name.replace("_", " ") for name in sets])
    axes.set(ylim=(0, 103), ylabel="ROUGE-L of the answers (%)")
    figure.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 0.9), frameon=False, fontsize=8)
    return save(figure, path)


def plot_trade_off(methods: Mapping[str, Any], path: Path) -> Path:
    """Forget quality against model utility, as TOFU draws them: a point for each model, the best ones upper right.

    Args:
        methods: by name, with `forget_quality` and `model_utility`, and flips of kept tokens, which sizes the points.
    """
    figure = Figure(figsize=(6.5, 4.2))
    axes = figure.subplots()
    for name, method in methods.items():
        size = 30 + 600 * (method.flips or 0.0)
        axes.scatter(
            [method.model_utility], [max(method.forget_quality, 1e-30)], s=size, alpha=0.7, label=objective_title(name)
        )
    axes.set_yscale("log")
    axes.set_ylim(top=2.0)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("model utility")
    axes.set_ylabel("forget quality (p-value)")
    legend = axes.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    for handle in legend.legend_handles:
        if isinstance(handle, PathCollection):
            handle.set_sizes([30])
    return save(figure, path)


def plot_unlearning(history: Sequence[Mapping[str, Any]], max_leak: float | None, path: Path) -> Path:
    """Accuracy on held-out forget and retain rows, and the leak beside its budget `max_leak`, over optimiser steps.

    Entries of `history`, the trainer's `state.log_history`, that have no leak are ignored.
    """
    checks = [entry for entry in history if "leak" in entry]
    figure = Figure(figsize=(6.5, 4.4))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    steps, columns = [entry["step"] for entry in checks], ("retain_accuracy", "forget_accuracy", "leak")
    kept, known, leak = ([100 * entry[key] for entry in checks] for key in columns)
    above.plot(steps, kept, "o-", color=BLUE, label="held-out retain rows")
    above.plot(steps, known, "o-", color=ORANGE, label="checked forget rows")
    below.plot(steps, leak, "o-", color=GREEN, label="leak")
    above.set(ylim=(-3, 103), ylabel="accuracy (%)")
    if max_leak is not None:
        below.axhline(100 * max_leak, color=GREY, linestyle="--", label="leak budget")
    below.set_ylim(bottom=0)
    below.set(ylabel="held-out leak (%)", xlabel="optimiser steps")
    figure.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 0.88), frameon=False, fontsize=9)
    return save(figure, path)


def plot_capacity(report: Sequence[Any], path: Path) -> Path:
    """Rank kept and capacity left, as shares of the width of each layer's input, from `Subspace.report()`."""
    figure = Figure(figsize=(7.5, max(2.5, 0.22 * len(report) + 1.2)))
    axes = figure.subplots()
    y = list(range(len(report)))
    kept = [100 * row.rank / row.width for row in report]
    axes.barh(y, kept, color=BLUE, label="kept fixed (rank)")
    axes.barh(y, [100 - share for share in kept], left=kept, color="#d7e6f2", label="free (capacity)")
    measured = [i for i in y if report[i].forget_null_energy is not None]
    energies = [100 * report[i].forget_null_energy for i in measured]
    axes.plot(energies, measured, "D", color=ORANGE, ms=4, label="forgotten energy that is free")
    for i, row in enumerate(report):
        axes.text(101, i, f"{row.rank:.4g} / {row.width}", va="center", fontsize=7)
    axes.set_yticks(y, [shorten(row.layer, 44) for row in report], fontsize=7)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="share of the layer's input (%)")
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1.0), frameon=False, fontsize=8)
    return save(figure, path)
