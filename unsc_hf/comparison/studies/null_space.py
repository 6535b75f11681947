"""What the null space is worth: the same descent confined to it, to a random space of equal rank, and not at all."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from ...reporting.plots import BLUE, GREY, ORANGE
from .lab import Lab, bars, matching, mean, panels, percent
from .registry import Points, Study, register

_SPACES = {"retained": "null space", "random": "random subspace", "none": "no projection"}


_OBJECTIVES = {"unsc": "pseudo-labels", "gradient_ascent": "true-label ascent"}


def measure(lab: Lab) -> list[dict[str, Any]]:
    """Each space, with pseudo-labels and with ascent on the true labels (UNSC, section 5.4: ablation)."""
    return [
        lab.run({"space": space, "objective": objective}, seed, {"null_space": space, "objective": objective})
        for seed in lab.seeds
        for objective in _OBJECTIVES
        for space in _SPACES
    ]


def plot(points: Points) -> Figure:
    figure, axes = panels(2)
    groups = [
        (f"{words},\n{how}", {"space": space, "objective": objective})
        for objective, how in _OBJECTIVES.items()
        for space, words in _SPACES.items()
    ]
    for one, key, label in zip(axes, ("AccDrt", "leak"), ("AccDrt (%)", "held-out leak (%)"), strict=True):
        bars(one, points, groups, key, (BLUE, ORANGE, GREY))
        one.set_ylabel(label)
    lowest = min((100 * mean(matching(points, **tags), "AccDrt") for _, tags in groups), default=0)
    axes[0].set_ylim(max(0.0, lowest - 10), 100)
    return figure


def paragraph(points: Points) -> str:
    def in_words(objective: str) -> str:
        parts = []
        for space, words in _SPACES.items():
            runs = matching(points, space=space, objective=objective)
            price = f"AccDut {percent(runs, 'AccDut')}, leak {percent(runs, 'leak')}"
            parts.append(f"{percent(runs, 'AccDrt')} with {words} ({price})")
        return "; ".join(parts)

    gain = {
        name: 100
        * (
            mean(matching(points, space="retained", objective=name), "AccDrt")
            - max(mean(matching(points, space=space, objective=name), "AccDrt") for space in ("random", "none"))
        )
        for name in _OBJECTIVES
    }
    return (
        f"AccDrt by space, percent. With pseudo-labels: {in_words('unsc')}. With ascent on the true labels: "
        f"{in_words('gradient_ascent')}. Against the better of the two controls the null space changes AccDrt by "
        f"{gain['unsc']:+.1f} points with pseudo-labels and by {gain['gradient_ascent']:+.1f} with ascent."
    )


register(
    Study(
        "null-space",
        "What is the null space worth?",
        measure,
        {"objective": "objective", "space": "space"},
        {"AccDut": "AccDut", "AccDrt": "AccDrt", "leak": "leak", "steps": "steps", "seconds": "seconds"},
        plot,
        paragraph,
    )
)
