"""Erase features within limits: what `UNSCTrainer` calls after unlearning when `feature_erasure` says so.

Erased features leave the null space. What that costs is in the held-out leak, and the leak budget bounds it. The
answers bound it too: forgotten rows that lie nearer to what they resemble may be recognised again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.layers import ProtectedLayer, plain_name
from .closed_form import least_leak
from .eraser import Choose, Erased, FeatureEraser
from .readings import FeatureRows, erasure_rows
from .writers import Folds

logger = logging.getLogger(__name__)

_BROUGHT_BACK = 0.005  # how much more of the held-out forget rows may be known after erasure, at least one row
_LOWERED = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # logits, in the mean over the rows of a class
_HIDDEN_SHARES = 1 / 8  # how finely the share of hidden states is sought where the budget does not hold all
_SCALES = 0.01  # how finely the scale of all changes is sought


def erase_features(
    model: nn.Module,
    layers: Sequence[ProtectedLayer],
    rows: FeatureRows,
    pseudo_labels: Tensor | None,
    leak: Callable[[], float],
    known: Callable[[], float],
    target: float,
    choose: Choose | None = None,
) -> list[Erased]:
    """Erase the features of an unlearned model in place, within the leak budget and without bringing answers back.

    Args:
        layers: the trained layers of its projection.
        rows: of the request; their `args` say how much to erase, where, and within which budget.
        pseudo_labels: new labels of the training rows to forget, None for a language model.
        leak, known: held-out leak of the model, and how much it knows of the held-out forget rows, as it is now;
            the same on every process.
        target: how much of the held-out forget rows may be known in any case.
        choose: chooses the strength for each reading instead of `args.erasure_strength`.

    Raises:
        UNSCError: hidden states that the model does not return, no layer that may be changed, or too few rows.
    """
    args = rows.args
    most_known = max(known(), target) + max(_BROUGHT_BACK, 1 / len(rows.held_out))
    limits = _Limits(leak, known, args.max_leak, most_known)
    eraser = FeatureEraser(model, layers, args.feature_erasure, erasure_rows(rows, pseudo_labels))
    eraser.erase(choose or (lambda reading, attempt: args.erasure_strength))
    return _keep_limits(eraser, limits, choose)


@dataclass(frozen=True)
class _Limits:
    leak: Callable[[], float]
    known: Callable[[], float]
    max_leak: float | None
    most_known: float

    def affordable(self) -> bool:
        return self.max_leak is None or self.leak() <= self.max_leak

    def forgotten(self) -> bool:
        return self.known() <= self.most_known

    def hold(self) -> bool:
        return self.affordable() and self.forgotten()


def _keep_limits(eraser: FeatureEraser, limits: _Limits, choose: Choose | None) -> list[Erased]:
    """Scale what was erased until it keeps the limits.

    One strength for all readings is scaled as a whole. Chosen strengths depend on each other: the head's was chosen
    with all changes of hidden states in place. So there the hidden states are scaled alone, and the head's input, which
    most attacks read, is served first. Answers that came back are lowered in the head, which changes no feature. Where
    the head may not be changed, less is erased.
    """
    over_budget = f"exceeds the leak budget (max_leak {limits.max_leak})"
    hidden, factor, reasons = 1.0, 1.0, []
    if not limits.affordable():
        reasons.append(over_budget)
        if choose is not None and len(eraser.done) > 1 and eraser.done[-1].reading == eraser.head.name:
            hidden = _serve_head_first(eraser, limits, choose)
        if not limits.affordable():
            factor = _scale_down(eraser.folds, limits.affordable)
    back = limits.known()
    if back > limits.most_known:
        lowered = _lower_answers(eraser, limits)
        if lowered is not None:
            logger.warning(
                f"Erasure brought {back:.3g} of the held-out forget rows back: the logits of the forgotten classes "
                f"were lowered in the head, on their rows by {lowered:g} in the mean."
            )
        if not limits.hold():
            known = f"{back:.3g} known on held-out ones, {limits.most_known:.3g} at most"
            reasons.append(f"brings forgotten rows back ({known})" if lowered is None else over_budget)
            eraser.folds.settle()
            factor *= _scale_down(eraser.folds, limits.hold)
    if not reasons:
        return eraser.done
    logger.warning(
        "Erasure was scaled to %.0f %%%s: all of it %s.",
        100 * factor * hidden,
        "" if hidden == 1 else f" in hidden states, {100 * factor:.0f} % at the head's input",
        " and ".join(dict.fromkeys(reasons)),
    )
    return eraser.scaled(hidden, factor)


def _serve_head_first(eraser: FeatureEraser, limits: _Limits, choose: Choose) -> float:
    """The largest share of the hidden states' changes, to an eighth, that leaves enough budget for the head's input.

    On return the head's input is erased with that share in place. Where the share is zero it may exceed the budget.
    """
    eraser.take_back_last()
    low, high, served = 0.0, 1.0, False
    while high - low > _HIDDEN_SHARES:
        middle = (low + high) / 2
        if served:
            eraser.take_back_last()
        eraser.folds.scale(middle)
        served = limits.affordable()
        if served:
            eraser.erase_last(choose)
        low, high = (middle, high) if served and limits.affordable() else (low, middle)
    if served and low == middle:
        return low
    if served:
        eraser.take_back_last()
    if low > 0:
        eraser.folds.scale(low)
    else:
        eraser.folds.clear()
    eraser.erase_last(choose)
    return low


def _scale_down(folds: Folds, fits: Callable[[], bool]) -> float:
    """The largest scale of all changes, to 1 %, that keeps the limits. The changes are left at that scale."""
    low, high = 0.0, 1.0
    while high - low > _SCALES:
        middle = (low + high) / 2
        folds.scale(middle)
        low, high = (middle, high) if fits() else (low, middle)
    folds.scale(low)
    return low


def _lower_answers(eraser: FeatureEraser, limits: _Limits) -> float | None:
    """Lower the logits of the forgotten classes on their rows, in the head, until the rows are forgotten again.

    Returns how far, in the mean over the rows of a class; None where it is not possible and nothing has changed.
    """
    name = plain_name(eraser.head.head.name.removesuffix(".base_layer"))
    site = next((one for one in eraser.sites if one.name == name), None)
    if site is None or eraser.head_rows is None:
        return None
    forgotten, retained = eraser.read_heads()
    own = eraser.rows.own
    classes = torch.unique(own)
    means = torch.stack([forgotten[own == c].mean(0) for c in classes.tolist()], 1)
    lower = torch.zeros(len(eraser.head_rows), len(classes), dtype=torch.float64)
    lower[classes, torch.arange(len(classes))] = -1.0
    change = least_leak(means, lower, retained.T @ retained / len(retained))
    for logits in _LOWERED:
        eraser.folds.fold(site, change.scaled(logits))
        if limits.forgotten():
            return logits
        eraser.folds.unfold(site)
    return None
