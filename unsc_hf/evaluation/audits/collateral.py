"""Collateral damage: the retained class that lost most."""

from __future__ import annotations

from ..accuracy import per_class_accuracy
from .registry import Examination, Reading, audit


@audit("worst retained class")
def collateral(exam: Examination) -> Reading:
    """`change`: test accuracy of the retained class that lost most, minus the original's; `worst_class`: its id."""
    now, before = (per_class_accuracy(part.test.logits, part.test.labels) for part in (exam.outputs, exam.original))
    change = {c: now[c] - before[c] for c in exam.kept if c in now}
    worst = min(change, key=lambda c: change[c])
    return {"change": change[worst], "worst_class": float(worst)}
