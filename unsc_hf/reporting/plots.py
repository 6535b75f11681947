"""Pictures of one run. They fit a phone, and their grey ink on no ground can be read on white and on black."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from ..utils.files import write_beside

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
    return method.replace("unsc", "UNSC").replace(" unprojected", ", no projection").replace("_", " ")


def _legend(figure: Figure, columns: int = 3) -> None:
    """Above the axes."""
    figure.legend(ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 0.89))


@_styled
def plot_per_class(
    accuracies: Mapping[str, Mapping[int, float]], names: Sequence[str], forgotten: Sequence[int], path: Path
) -> Path:
    """Test accuracy in [0, 1] of each class id, one bar for each model, in drawing order; `names` are by id.

    The classes to forget come first and are shaded. Of many classes those that changed most are drawn.
    """
    series = list(accuracies.values())
    kept = [c for c in range(len(names)) if c not in forgotten]
    kept.sort(key=lambda c: -abs(series[-1].get(c, 0.0) - series[0].get(c, 0.0)))
    shown = [c for c in forgotten if any(c in by_class for by_class in series)][: _MOST_CLASSES // 2]
    kept = [c for c in kept if any(c in by_class for by_class in series)][: _MOST_CLASSES - len(shown)]
    shown, shaded = [*shown, *sorted(kept)], len(shown)
    figure = Figure(figsize=(5.0, 0.8 + 0.36 * len(shown)))
    axes = figure.subplots()
    height = 0.8 / max(len(series), 1)
    for i, (model, by_class) in enumerate(accuracies.items()):
        y = [j + (i - (len(series) - 1) / 2) * height for j in range(len(shown))]
        colour = (GREY, BLUE, GREEN, ORANGE)[i % 4]
        axes.barh(y, [100 * by_class.get(c, 0.0) for c in shown], height, label=model, color=colour)
    axes.axhspan(-0.5, shaded - 0.5, color=ORANGE, alpha=0.15, lw=0, zorder=0, label="to forget")
    axes.set_yticks(range(len(shown)), [shorten(names[c]) for c in shown])
    axes.set(ylim=(len(shown) - 0.5, -0.5), xlim=(0, 100), xlabel="test accuracy (%)")
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
    figure = Figure(figsize=(5.0, 1.0 + 0.17 * len(sets) * (len(methods) + 1)))
    axes = figure.subplots()
    height = 0.84 / len(methods)
    emphasised = {"original": GREY, "unsc": BLUE, "retrained": GREEN}
    others = iter([ORANGE, "#7a5195", "#bc5090", "#8c6d31", "#5b8c85"])
    colours: dict[str, Any] = {}
    for i, (method, of_sets) in enumerate(methods.items()):
        places = [y + (i - (len(methods) - 1) / 2) * height for y in range(len(sets))]
        objective = method.removesuffix(" unprojected")
        if objective not in colours:
            colours[objective] = emphasised.get(objective) or next(others, _INK)
        alpha = 1.0 if objective == method else 0.4  # a paler bar for the run without projection
        lengths = [100 * of_sets[s]["rouge_l"] for s in sets]
        axes.barh(places, lengths, height * 0.92, label=objective_title(method), color=colours[objective], alpha=alpha)
    axes.set_yticks(range(len(sets)), [name.replace("_", " ") for name in sets])
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="ROUGE-L of the answers (%)")
    _legend(figure)
    return save(figure, path)


@_styled
def plot_trade_off(methods: Mapping[str, Any], path: Path) -> Path:
    """Forget quality against model utility, as TOFU draws them: a named point for each model, the best upper right.

    `methods`: by name, with `forget_quality` and `model_utility`.
    """
    figure = Figure()
    axes = figure.subplots()
    for name, method in methods.items():
        place = (method.model_utility, max(method.forget_quality, 1e-30))
        axes.scatter(*place, color=BLUE if name == "unsc" else GREY)
        axes.annotate(objective_title(name), place, (5, 4), textcoords="offset points", fontsize=9)
    axes.set_yscale("log")
    axes.set_ylim(top=4.0)
    axes.set(xlim=(-0.02, 1.02), xlabel="model utility", ylabel="forget quality (p-value)")
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
