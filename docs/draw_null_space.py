"""Draw what the null space is, with numbers that are really computed: the picture of `docs/concepts/how_it_works.md`.

    python docs/draw_null_space.py

A layer with two inputs and one output. Its kept rows use one direction of the inputs, so the other one is free.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREY = "#2563eb", "#ea580c", "#6b7280"
KEPT_DIRECTION = np.array([0.94, 0.34]) / np.hypot(0.94, 0.34)
FREE_DIRECTION = np.array([-KEPT_DIRECTION[1], KEPT_DIRECTION[0]])
STEP = np.array([-0.35, -1.05])  # what an optimiser would like to add to the weights
WEIGHTS = np.array([0.9, 1.1])


def rows(generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of the layer: rows to keep, and rows to forget, (rows, 2) each."""
    along = generator.uniform(0.6, 2.6, 14)
    kept = np.outer(along, KEPT_DIRECTION) + 0.02 * generator.standard_normal((14, 2))
    forget = np.outer(generator.uniform(0.5, 1.2, 6), KEPT_DIRECTION)
    forget += np.outer(generator.uniform(1.0, 1.7, 6), FREE_DIRECTION)
    return kept, forget


def arrow(axes: Axes, end: np.ndarray, colour: str, style: str = "-", width: float = 2.0) -> None:
    look = {"arrowstyle": "-|>", "color": colour, "linestyle": style, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=(end[0], end[1]), xytext=(0.0, 0.0), arrowprops=look)


def plane(axes: Axes, title: str) -> None:
    """Axes through the origin, without numbers."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_aspect("equal")
    axes.axhline(0, color="#d1d5db", linewidth=0.8, zorder=0)
    axes.axvline(0, color="#d1d5db", linewidth=0.8, zorder=0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def inputs(axes: Axes, kept: np.ndarray, forget: np.ndarray) -> None:
    plane(axes, "1  Inputs of a layer")
    axes.scatter(*kept.T, color=BLUE, s=26, label="rows to keep")
    axes.scatter(*forget.T, color=ORANGE, s=26, marker="s", label="rows to forget")
    arrow(axes, 3.1 * KEPT_DIRECTION, BLUE)
    arrow(axes, 2.1 * FREE_DIRECTION, GREY)
    axes.text(1.05, 0.05, "used by kept rows", color=BLUE, fontsize=9.5, va="top")
    axes.text(-0.75, 2.08, "free: the null space", color=GREY, fontsize=9.5)
    axes.set_xlim(-1.1, 3.3)
    axes.set_ylim(-0.6, 3.3)
    axes.legend(loc="upper right", fontsize=9, frameon=False)


def change(axes: Axes, projected: np.ndarray) -> None:
    plane(axes, "2  Change of its weights")
    arrow(axes, STEP, GREY, "--")
    arrow(axes, projected, ORANGE, width=2.5)
    axes.plot(*np.stack([STEP, projected]).T, color=GREY, linewidth=0.9, linestyle=":")
    for sign in (-1.6, 1.6):
        axes.plot(*np.stack([np.zeros(2), sign * FREE_DIRECTION]).T, color="#d1d5db", linewidth=1, zorder=0)
    axes.text(-0.35, -1.34, "wanted by the optimiser", color=GREY, fontsize=9.5, ha="center")
    axes.text(0.48, -0.78, "projected onto\nthe null space", color=ORANGE, fontsize=9.5)
    axes.set_xlim(-1.5, 1.7)
    axes.set_ylim(-1.5, 1.2)


def outputs(axes: Axes, kept: np.ndarray, forget: np.ndarray, projected: np.ndarray) -> None:
    """Outputs before (hollow) and after (filled), a row of dots for each kind of rows."""
    axes.set_title("3  Outputs of the layer", fontsize=11, loc="left")
    for height, (points, colour, marker) in enumerate(((forget, ORANGE, "s"), (kept, BLUE, "o"))):
        before, after = points @ WEIGHTS, points @ (WEIGHTS + projected)
        heights = height + np.linspace(-0.22, 0.22, len(points))
        for x, y, z in zip(before, after, heights, strict=True):
            if abs(x - y) > 0.1:
                axes.annotate("", xy=(y, z), xytext=(x, z), arrowprops={"arrowstyle": "->", "color": colour, "lw": 0.8})
        axes.scatter(before, heights, s=34, facecolors="none", edgecolors=colour, marker=marker, linewidths=1.1)
        axes.scatter(after, heights, s=15, color=colour, marker=marker)
    axes.set_yticks([0, 1], ["forget", "keep"])
    axes.set_ylim(-0.5, 1.5)
    axes.set_xticks([])
    axes.set_xlabel("hollow: before    filled: after", fontsize=9.5, color=GREY)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)


def draw() -> Figure:
    kept, forget = rows(np.random.default_rng(4))
    projected = FREE_DIRECTION * (FREE_DIRECTION @ STEP)
    figure = Figure(figsize=(5.8, 5.0), layout="constrained", facecolor="white")
    axes = figure.subplot_mosaic([["inputs", "change"], ["outputs", "outputs"]], width_ratios=(1.25, 1.0))
    inputs(axes["inputs"], kept, forget)
    change(axes["change"], projected)
    outputs(axes["outputs"], kept, forget, projected)
    return figure


if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "null space"  # the same file from the same numbers
    place = Path(__file__).with_name("null_space.svg")
    draw().savefig(place, metadata={"Date": None})
    place.write_text("\n".join(line.rstrip() for line in place.read_text().splitlines()) + "\n")
