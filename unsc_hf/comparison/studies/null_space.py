"""What the null space is worth: the same descent confined to it, to a random space of equal rank, and not at all."""

from __future__ import annotations

from matplotlib.figure import Figure

from ...reporting.plots import BLUE, GREY, ORANGE
from .study import Lab, Point, Points, Study, bars, panels, register

_SPACES = {"retained": "null space", "random": "random subspace", "none": "no projection"}
_OBJECTIVES = {"unsc": "pseudo-labels", "gradient_ascent": "true-label ascent"}


@register
class NullSpaceStudy(Study):
    """Each space, with pseudo-labels and with ascent on the true labels (UNSC, section 5.4: ablation)."""

    name = "null-space"
    title = "What is the null space worth?"
    tags = {"objective": "objective", "space": "space"}

    def measure(self, lab: Lab) -> list[Point]:
        return [
            lab.run({"space": space, "objective": objective}, seed, {"null_space": space, "objective": objective})
            for seed in lab.seeds
            for objective in _OBJECTIVES
            for space in _SPACES
        ]

    def plot(self, points: Points) -> Figure:
        figure, axes = panels(2)
        groups = {
            f"{words},\n{how}": points.where(space=space, objective=objective)
            for objective, how in _OBJECTIVES.items()
            for space, words in _SPACES.items()
        }
        colours = (BLUE, ORANGE, GREY)
        kept = bars(axes[0], groups, "AccDrt", colours, ylabel="AccDrt (%)")
        axes[0].set_ylim(max(0.0, min(kept) - 10), 100)
        bars(axes[1], groups, "leak", colours, ylabel="held-out leak (%)")
        return figure

    def paragraph(self, points: Points) -> str:
        words, gain = {}, {}
        for objective in _OBJECTIVES:
            runs = {space: points.where(space=space, objective=objective) for space in _SPACES}
            words[objective] = "; ".join(
                f"{of.percent('AccDrt')} with {_SPACES[space]} (AccDut {of.percent('AccDut')}, "
                f"leak {of.percent('leak')})"
                for space, of in runs.items()
            )
            kept = {space: of.mean("AccDrt") for space, of in runs.items()}
            gain[objective] = 100 * (kept["retained"] - max(kept["random"], kept["none"]))
        return (
            f"AccDrt by space, percent. With pseudo-labels: {words['unsc']}. With ascent on the true labels: "
            f"{words['gradient_ascent']}. Against the better of the two controls the null space changes AccDrt by "
            f"{gain['unsc']:+.1f} points with pseudo-labels and by {gain['gradient_ascent']:+.1f} with ascent."
        )
