"""Prototype attack: examples of a forgotten class are written into the head, without training (Spotter, ICML 2026)."""

from __future__ import annotations

import math

from ...models.head import head_weights
from ..probes import attack_head
from .registry import Examination, Reading, audit


@audit("10-shot prototype attack", headline="shots_10")
def prototype(exam: Examination) -> Reading:
    """`shots_1`, `shots_5`, `shots_10`: test accuracy on the forgotten classes afterwards."""
    head = head_weights(exam.model, len(exam.kept) + len(exam.forgotten))
    reading: Reading = {}
    for shots in (1, 5, 10):
        value = attack_head(exam.outputs, head, exam.forgotten, shots)
        reading[f"shots_{shots}"] = math.nan if value is None else value
    return reading
