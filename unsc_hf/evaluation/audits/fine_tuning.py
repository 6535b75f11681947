"""Fine-tuning on retained rows alone may bring back what was only muted (Łucki et al., arXiv 2409.18025)."""

from __future__ import annotations

from copy import deepcopy

from .registry import Examination, Reading, audit
from .training import fit, forgotten_rows


@audit("after fine-tuning on retained rows", headline="AccDut")
def fine_tuning(exam: Examination) -> Reading:
    """`AccDut`: the highest test accuracy on the forgotten classes seen within 40 steps."""
    model = deepcopy(exam.model).requires_grad_(True)
    curve = fit(exam, model, exam.retain, forgotten_rows(exam))
    return {"AccDut": max(curve), "curve": curve}
