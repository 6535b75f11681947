"""Pictures of one run. They fit a phone, and their grey ink on no ground can be read on white and on black."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from ..utils.files import write_beside

_ACRONYMS = ("UNSC", "NPO", "SimNPO", "RMU", "UNDIAL", "SCRUB", "Idk DPO")  # in names of objectives
_UNPROJECTED = " unprojected"  # how names of methods end that were trained without projection
GREY, BLUE, ORANGE, GREEN = "#9aa0a6", "#1f6fb4", "#d1642a", "#3a8f5c"

_INK = "#76808a"
STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "figure.figsize": (5.0, 3.6), "font.size": 10, "axes.labelsize": 10, "legend.frameon": False, "legend.fontsize": 9,
}  # fmt: skip
_styled = rc_context(STYLE)  # draws a function's figure in this style

_MOST_CLASSES = 16  # bars of more classes would be too thin to read


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG without the upper and right frame, whole or not at all."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    write_beside(path, lambda scratch: figure.savefig(scratch, dpi=180, bbox_inches="tight"))
    return path


def shorten(name: str, width: int = 18) -> str:
    """A class name that fits an axis; `$` is escaped, because matplotlib reads it as mathematics."""
    plain = " ".join(str(name).split()).replace("$", r"\$")
    return plain if len(plain) <= width else plain[: width - 1] + "…"


def objective_title(method: str) -> str:
    """Name for readers of an objective, with or without projection."""
    words = method.replace(_UNPROJECTED, ", no projection").replace("_", " ")
    for name in _ACRONYMS:
        words = re.sub(rf"\b{name}\b", name.replace(" ", ""), words, flags=re.IGNORECASE)
    return words


def _legend(figure: Figure, columns: int = 3) -> None:
    """Above the axes."""
    figure.legend(ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 0.89))


def _bars(labels: Sequence[str], series: Mapping[str, Sequence[float]], colours: Sequence[Any], x_label: str) -> Figure:
    """A group of bars for each label, one of each series, of shares in [0, 1]; colours may have an alpha."""
    figure = Figure(figsize=(5.0, 0.8 + 0.1 * len(labels) * (len(series) + 1)))
    axes = figure.subplots()
    height = 0.84 / max(len(series), 1)
    for i, (name, shares) in enumerate(series.items()):
        y = np.arange(len(labels)) + (i - (len(series) - 1) / 2) * height
        axes.barh(y, [100 * share for share in shares], 0.92 * height, label=name, color=colours[i])
    axes.set_yticks(range(len(labels)), labels)
    axes.set(ylim=(len(labels) - 0.5, -0.5), xlim=(0, 100), xlabel=x_label)
    return figure


@_styled
def plot_per_class(
    accuracies: Mapping[str, Mapping[int, float]], names: Sequence[str], forgotten: Sequence[int], path: Path
) -> Path:
    """Test accuracy in [0, 1] of each class id, one bar for each model, in drawing order; `names` are by id.

    The classes to forget come first and are shaded. Of many classes those that changed most are drawn.
    """
    by_model = list(accuracies.values())
    known = [c for c in range(len(names)) if any(c in by_class for by_class in by_model)]
    gone = [c for c in known if c in forgotten][: _MOST_CLASSES // 2]
    kept = [c for c in known if c not in forgotten]
    kept.sort(key=lambda c: -abs(by_model[-1].get(c, 0.0) - by_model[0].get(c, 0.0)))
    shown = [*gone, *sorted(kept[: _MOST_CLASSES - len(gone)])]
    series = {model: [by_class.get(c, 0.0) for c in shown] for model, by_class in accuracies.items()}
    figure = _bars([shorten(names[c]) for c in shown], series, (GREY, BLUE, GREEN, ORANGE), "test accuracy (%)")
    figure.axes[0].axhspan(-0.5, len(gone) - 0.5, color=ORANGE, alpha=0.15, lw=0, zorder=0, label="to forget")
    _legend(figure, 4)
    return save(figure, path)


@_styled
def plot_answered(answers: Mapping[str, Mapping[int, Mapping[int, float]]], names: Sequence[str], path: Path) -> Path:
    """What forgotten test rows are called: a row for each forgotten class and model, a column for each answer.

    Args:
        answers: by model, the share of each answer by forgotten class id.
        names: of the classes, by id.
        path: the PNG file.
    """
    rows = [(c, model) for c in next(iter(answers.values())) for model in answers][:12]
    shares = np.array([[answers[model][c].get(n, 0.0) for n in range(len(names))] for c, model in rows])
    common = np.sort(np.argsort(-shares.max(0))[:8])  # answers that are given most
    table = 100 * np.column_stack([shares[:, common], 1 - shares[:, common].sum(1)])
    titles = [*(shorten(names[n], 10) for n in common), "others"]
    figure = Figure(figsize=(5.0, 1.2 + 0.42 * len(rows)))
    axes = figure.subplots()
    axes.imshow(table, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for i, row in enumerate(table):
        for j, share in enumerate(row):
            axes.text(j, i, f"{share:.0f}", ha="center", va="center", color="white" if share > 55 else "#39424b")
    axes.set_xticks(range(len(titles)), titles, rotation=0 if max(map(len, titles)) < 7 else 35, ha="center")
    axes.set_yticks(range(len(rows)), [f"{shorten(names[c], 12)}, {model}" for c, model in rows])
    axes.set_xlabel("test rows that are called so (%)")
    return save(figure, path)


@_styled
def plot_methods(points: Mapping[str, tuple[float, float]], path: Path) -> Path:
    """What each model changes and what it still shows, each point named; low and left is best.

    `points`: by name, the shares of kept decisions that changed, and of forgotten rows that a probe reads.
    """
    figure = Figure()
    axes = figure.subplots(gridspec_kw={"right": 0.68})
    x, y = (100 * np.array(values) for values in zip(*points.values(), strict=True))
    most = max(x.max(), 1.0)
    axes.set(xlim=(-0.05 * most, 1.05 * most), ylim=(-4, 108))
    below = 200.0
    for i in np.argsort(-y, kind="stable"):  # the names stand beside the axes, under each other
        name, below = list(points)[i], min(y[i], below - 9)
        colour, size = {"UNSC": (BLUE, 80), "retrained": (GREEN, 60)}.get(name, (GREY, 45))
        axes.scatter(x[i], y[i], s=size, color=colour, zorder=3)
        axes.annotate(
            name, (x[i], y[i]), (1.1 * most, below), va="center", weight="bold" if name == "UNSC" else "normal",
            color=_INK if colour == GREY else colour, arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6},
            annotation_clip=False,
        )  # fmt: skip
    axes.set(xlabel="decisions changed on kept test rows (%)", ylabel="still readable by a probe (%)")
    return save(figure, path)


@_styled
def plot_answers(methods: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> Path:
    """ROUGE-L of every model's answers, a group of bars for each set that has it; `methods` by method and set."""
    sets = [name for name, metrics in next(iter(methods.values())).items() if "rouge_l" in metrics]
    fixed = {"original": GREY, "unsc": BLUE, "retrained": GREEN}
    objectives = list(dict.fromkeys(method.removesuffix(" unprojected") for method in methods))
    others = cycle([ORANGE, "#7a5195", "#bc5090", "#8c6d31", "#5b8c85"])
    colours = {objective: fixed.get(objective) or next(others) for objective in objectives}
    # A paler bar is the run without projection.
    shades = [to_rgba(colours[method.split(" unprojected")[0]], 0.4 if " " in method else 1.0) for method in methods]
    series = {objective_title(method): [of[name]["rouge_l"] for name in sets] for method, of in methods.items()}
    figure = _bars([name.replace("_", " ") for name in sets], series, shades, "ROUGE-L of the answers (%)")
    _legend(figure)
    return save(figure, path)


@_styled
def plot_trade_off(methods: Mapping[str, Any], path: Path) -> Path:
    """Forget quality against model utility, as TOFU draws them, and beside it against tokens changed in kept answers.

    A point for each model, hollow where it was trained without projection: best is the upper right on the left, and the
    upper left on the right.

    `methods`: by name, with `forget_quality`, `model_utility` and `flips`.
    """
    figure = Figure(figsize=(7.6, 3.6))
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.12})
    kinds = list(dict.fromkeys(name.removesuffix(_UNPROJECTED) for name in methods))
    own = {"original": GREY, "retrained": GREEN, "unsc": BLUE, "unsc_retain": BLUE}
    for name, method in methods.items():
        kind, hollow = name.removesuffix(_UNPROJECTED), name.endswith(_UNPROJECTED)
        colour, marker = own.get(kind, f"C{kinds.index(kind)}"), "oDsv^PX*<>"[kinds.index(kind) % 10]
        label = objective_title(name) if not hollow or kind not in methods else None
        style = {"facecolors": "none" if hollow else colour, "edgecolors": colour, "marker": marker, "s": 45}
        style["label"] = label
        height = max(method.forget_quality, 1e-30)
        left.scatter(method.model_utility, height, **style)
        right.scatter(100 * (method.flips or 0.0), height, **style)
    left.set_yscale("log")
    left.set(ylim=(None, 4.0), xlim=(-0.02, 1.02), xlabel="model utility", ylabel="forget quality (p-value)")
    right.set(xlim=(-1.0, None), xlabel="tokens changed in kept answers (%)")
    if any(name.endswith(_UNPROJECTED) for name in methods):
        left.scatter([], [], facecolors="none", edgecolors=GREY, s=45, label="hollow: no projection")
    figure.legend(*left.get_legend_handles_labels(), ncols=3, loc="lower center", bbox_to_anchor=(0.5, 0.89))
    return save(figure, path)


@_styled
def plot_unlearning(history: Sequence[Mapping[str, Any]], max_leak: float | None, path: Path) -> Path:
    """Accuracy on held-out forget and retain rows, and the leak beside its budget `max_leak`, over optimiser steps.

    Entries of `history`, the trainer's `state.log_history`, that have no leak are ignored.
    """
    checks = [entry for entry in history if "leak" in entry]
    figure = Figure(figsize=(5.0, 4.2))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    steps, columns = [entry["step"] for entry in checks], ("retain_accuracy", "forget_accuracy", "leak")
    kept, known, leak = ([100 * entry[key] for entry in checks] for key in columns)
    above.plot(steps, kept, "o-", color=BLUE, label="rows to keep")
    above.plot(steps, known, "o-", color=ORANGE, label="rows to forget")
    below.plot(steps, leak, "o-", color=GREEN, label="leak")
    above.set(ylim=(-3, 103), ylabel="accuracy (%)")
    if max_leak is not None:
        below.axhline(100 * max_leak, color=GREY, linestyle="--", label="its budget")
    below.set_ylim(bottom=0)
    below.set(ylabel="leak (%)", xlabel="optimiser steps")
    _legend(figure, 4)
    return save(figure, path)
