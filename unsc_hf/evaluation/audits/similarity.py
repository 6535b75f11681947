"""What forgetting cost: closeness to retrained models, and the retained class that lost most."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...models.outputs import RowOutputs
from ..accuracy import macro_accuracy, per_class_accuracy
from .registry import Examination, Reading, audit


@audit("distance to retrained models")
def similarity(exam: Examination) -> Reading:
    """Means over the references. `cka_forgotten`, `cka_kept`: linear CKA of the head's inputs on test rows (Kornblith
    et al., arXiv 1905.00414). `js_forgotten`, `js_kept`: Jensen-Shannon divergence of predictions, in bits. `tow`: tug
    of war (Zhao et al., arXiv 2406.01257, equation 1)."""
    if not exam.references:
        return {}
    test = exam.outputs.test
    unseen = exam.of_forgotten(test.labels)
    reading: Reading = {}
    for name, rows in (("forgotten", unseen), ("kept", ~unseen)):
        theirs, features, logits = [one.test for one in exam.references], test.need_features()[rows], test.logits[rows]
        cka = [linear_cka(features, one.need_features()[rows]) for one in theirs]
        divergence = [jensen_shannon(logits, one.logits[rows]) for one in theirs]
        reading |= {f"cka_{name}": float(np.mean(cka)), f"js_{name}": float(np.mean(divergence))}
    reading["tow"] = float(np.mean([_tug_of_war(exam, one) for one in exam.references]))
    return reading


def _tug_of_war(exam: Examination, other: RowOutputs) -> float:
    product = 1.0
    for a, b, classes in (
        (exam.outputs.forget, other.forget, exam.forgotten),
        (exam.outputs.retain, other.retain, exam.kept),
        (exam.outputs.test, other.test, exam.kept),
    ):
        mine, theirs = (macro_accuracy(part.logits, part.labels, classes) or 0.0 for part in (a, b))
        product *= 1 - abs(mine - theirs)
    return product


@audit("worst retained class")
def collateral(exam: Examination) -> Reading:
    """`change`: test accuracy of the retained class that lost most, minus the original's; `worst_class`: its id."""
    now, before = (per_class_accuracy(part.test.logits, part.test.labels) for part in (exam.outputs, exam.original))
    change = {c: now[c] - before[c] for c in exam.kept if c in now}
    worst = min(change, key=lambda c: change[c])
    return {"change": change[worst], "worst_class": float(worst)}


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of features, (rows, width) each.

    It is 1 where they are equal up to rotation and scale.
    """
    x, y = (part.double() - part.double().mean(0) for part in (x, y))
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return float((x.T @ y).norm() ** 2 / scale) if float(scale) > 0 else 0.0


def jensen_shannon(a: Tensor, b: Tensor) -> float:
    """Mean Jensen-Shannon divergence of softmax(a) and softmax(b), (rows, classes) each, in bits: 0 to 1."""
    p, q = a.double().softmax(1), b.double().softmax(1)
    m = (p + q) / 2

    def kl(r: Tensor) -> Tensor:
        return (torch.special.xlogy(r, r) - torch.special.xlogy(r, m)).sum(1)

    return float(((kl(p) + kl(q)) / 2).mean() / np.log(2))
