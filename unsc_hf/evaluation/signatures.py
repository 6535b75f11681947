"""Failure signatures: what the numbers of a run say went wrong, each with what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from .verdict import FORGOTTEN, LABELS

_LOST = 0.02  # of accuracy on what remains
_JUMP = 0.15  # of forgotten accuracy from one check to the next

_OVER_UNLEARNING = (
    "over-unlearning: retained accuracy fell by more than 2 points; raise energy, lower the learning rate, or add "
    "rehearsal (unsc_retain)"
)
_STALLED = (
    "stalled forgetting: more than 1 % is still recognised; lower energy (more capacity), use other pseudo-labels, or "
    "raise max_leak"
)
_ENDED = {
    "leak_budget": (
        "ended by the leak budget before the target: raise energy (steps then leak less), lower the learning rate, or "
        "raise max_leak"
    ),
    "max_steps": (
        "ended by the step limit before the target: raise max_steps or the learning rate, or lower energy (more "
        "capacity)"
    ),
}
_RETURNED = (
    "unstable training: forgotten accuracy came back by more than 15 points between two checks; lower the learning rate"
)
_NOT_FINITE = "unstable training: the loss on the forgotten rows was not finite; lower the learning rate"
_NO_HELP = (
    "the null space did not help: the control '{control}' keeps as much ({theirs:.1%} against {ours:.1%} AccDrt); the "
    "request is easy, or the subspace keeps the wrong directions (try another energy)"
)


def run_signatures(results: Mapping[str, Any]) -> list[str]:
    """Signatures of one run, from `results.json`: final accuracies, how it ended, and the checks on the way."""
    methods, certificate = results.get("methods") or {}, results.get("certificate") or {}

    def known(method: str, name: str) -> float | None:
        number: float | None = (methods.get(method) or {}).get(name)
        return number

    before, kept, left, signs = known("original", "AccDrt"), known("unsc", "AccDrt"), known("unsc", "AccDut"), []
    if kept is not None and before is not None and kept < before - _LOST:
        signs.append(_OVER_UNLEARNING)
    if left is not None and left > FORGOTTEN:
        signs.append(_STALLED)
    if certificate.get("stop_reason") in _ENDED:
        signs.append(_ENDED[certificate["stop_reason"]])
    course = [entry["forget_accuracy"] for entry in results.get("history") or () if "forget_accuracy" in entry]
    if any(after - before > _JUMP for before, after in pairwise(course)):
        signs.append(_RETURNED)
    losses = [entry.get("forget_loss") for entry in results.get("history") or ()]
    if any(loss is None or not math.isfinite(loss) for loss in losses):
        signs.append(_NOT_FINITE)
    for control in ("random_projector", "unprojected"):
        theirs, forgets = known(control, "AccDrt"), known(control, "AccDut")
        if kept is None or theirs is None or forgets is None:
            continue
        if forgets <= FORGOTTEN and theirs >= kept:
            signs.append(_NO_HELP.format(control=LABELS[control], theirs=theirs, ours=kept))
    return signs
