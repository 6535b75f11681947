"""Prototype attack: k examples of a forgotten class are written into the head, without any training (Spotter, ICML 2026)."""

from __future__ import annotations

from ...models.head import head_weights
from ..probes import prototype_attack
from .registry import Examination, Reading, audit


@audit("10-shot prototype attack", headline="shots_10")
def prototype(exam: Examination) -> Reading:
    """`shots_1`, `shots_5`, `shots_10`: test accuracy on the forgotten classes afterwards."""
    forget, test = exam.outputs.forget, exam.outputs.test
    weight, bias = head_weights(exam.model, len(exam.kept) + len(exam.forgotten))
    unseen = exam.of_forgotten(test.labels)
    reading: Reading = {}
    for shots in (1, 5, 10):
        value = prototype_attack(
            weight, bias, forget.need_features(), forget.labels, test.need_features()[unseen], test.labels[unseen],
            exam.forgotten, shots=shots,
        )  # fmt: skip
        reading[f"shots_{shots}"] = float("nan") if value is None else value
    return reading
