"""What the null space is worth: the same descent confined to it, to a random space of equal rank, and not at all."""

from __future__ import annotations

from collections.abc import Iterator

from .study import Lab, Panel, Point, Points, study

_SPACES = {"null space": "retained", "random subspace": "random", "no projection": "none"}
_OBJECTIVES = {"pseudo-labels": "unsc", "true-label ascent": "gradient_ascent"}


def _conclude(points: Points) -> str:
    parts, gains = [], []
    for objective, runs in points.by("objective").items():
        kept = {space: of.mean("AccDrt") for space, of in runs.by("space").items()}
        gains.append(f"{100 * (kept.pop('null space') - max(kept.values())):+.1f} with {objective}")
        parts.append(f"with {objective}, {runs.listed('space', 'AccDrt')}")
    return (
        f"AccDrt in percent: {'; '.join(parts)}. "
        f"Against the better of the two controls the null space changes it by so many points: {', '.join(gains)}."
    )


@study(
    "What is the null space worth?",
    tags={"objective": "objective", "space": "space"},
    panels=[Panel("AccDrt", "space", by="objective"), Panel("leak", "space", by="objective")],
    conclude=_conclude,
)
def null_space(lab: Lab) -> Iterator[Point]:
    """Each space, with pseudo-labels and with ascent on the true labels (UNSC, section 5.4: ablation)."""
    for seed in lab.seeds:
        for objective, loss in _OBJECTIVES.items():
            for words, space in _SPACES.items():
                tags = {"space": words, "objective": objective}
                yield lab.run(tags, seed, null_space=space, objective=loss)
