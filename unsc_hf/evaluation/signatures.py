"""Failure signatures: what the numbers of a run say went wrong, each with what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from .verdict import FORGOTTEN, LABELS

_LOST = 0.02  # of accuracy on what remains; also the standard deviation over seeds above which a method is unstable
_JUMP = 0.15  # of forgotten accuracy from one check to the next

OVER_UNLEARNING = (
    "over-unlearning: retained accuracy fell by more than 2 points; raise energy, lower the learning rate, or add "
    "rehearsal (unsc_retain)"
)
STALLED = (
    "stalled forgetting: more than 1 % is still recognised; lower energy (more capacity), use other pseudo-labels, or "
    "raise max_leak"
)
UNSTABLE = (
    "unstable: what is lost differs by more than 2 points between seeds; lower the learning rate or keep more "
    "directions"
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


def accuracy_signatures(before: Sequence[float], kept: Sequence[float], forgotten: Sequence[float]) -> list[str]:
    """Signatures in final test accuracies: `kept` on what remains, `forgotten` on the forgotten classes.

    `before` is the retained accuracy of the original, one value or one for each seed.
    """
    signs = []
    if kept and before and float(np.mean(kept)) < float(np.mean(before)) - _LOST:
        signs.append(OVER_UNLEARNING)
    if forgotten and float(np.mean(forgotten)) > FORGOTTEN:
        signs.append(STALLED)
    # Originals of different seeds differ by themselves, so a method is compared with the one that it began with.
    changes = np.asarray(kept) - np.asarray(before) if len(before) in (1, len(kept)) else np.asarray(kept)
    if len(kept) > 1 and float(np.std(changes, ddof=1)) > _LOST:
        signs.append(UNSTABLE)
    return signs


def run_signatures(results: Mapping[str, Any]) -> list[str]:
    """Signatures of one run, from `results.json`: final accuracies, how it ended, and the checks on the way."""
    methods, certificate = results.get("methods") or {}, results.get("certificate") or {}

    def known(method: str, name: str) -> list[float]:
        number = (methods.get(method) or {}).get(name)
        return [] if number is None else [float(number)]

    kept = known("unsc", "AccDrt")
    signs = accuracy_signatures(known("original", "AccDrt"), kept, known("unsc", "AccDut"))
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
        if kept and theirs and forgets and forgets[0] <= FORGOTTEN and theirs[0] >= kept[0]:
            signs.append(_NO_HELP.format(control=LABELS[control], theirs=theirs[0], ours=kept[0]))
    return signs
