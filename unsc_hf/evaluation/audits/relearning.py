"""Relearning: how fast forgotten classes come back from a few examples (Golatkar et al., arXiv 1911.04933, section 5)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..accuracy import macro_accuracy
from .registry import Examination, Reading, audit
from .training import EVERY, STEPS, few_of_each, fit, fit_head, forgotten_rows, with_fresh_rows

SHOTS = 10
RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # above, ten examples make curves jump
ENOUGH = 0.5  # of the original's accuracy; from ten examples of a hard class not much more ever comes back
GOAL = 0.8
HEAD = 10  # the head alone learns at so many times the rate


def choose_rate(exam: Examination) -> dict[str, Any]:
    """`learning_rate`: the smallest at which the *original*, its rows of the head muted as everybody's are, is back at half of its accuracy
    after 40 steps. An attack that is too weak for a model that knows everything says nothing about others; `told` then says so."""
    test = exam.original.test
    goal = ENOUGH * (macro_accuracy(test.logits, test.labels, exam.forgotten) or 0.0)
    reached: dict[str, float] = {}
    for rate in RATES:
        reached[f"{rate:g}"] = _curve(exam, rate)[-1]
        if reached[f"{rate:g}"] >= goal > 0:
            told = f"learning rate {rate:g}, the smallest that brings the original back to {goal:.0%} in {STEPS} steps"
            return {"learning_rate": rate, "goal": goal, "reached": reached, "told": told}
    best = max(reached.values())
    told = f"no evidence, in {STEPS} steps no learning rate up to {RATES[-1]:g} brings the original itself back to {goal:.0%} (best {best:.0%})"
    return {"learning_rate": None, "goal": goal, "reached": reached, "told": told}


@audit("relearning from 10 examples", headline="area", calibrate=choose_rate)
def relearning(exam: Examination) -> Reading:
    """Test accuracy on the forgotten classes while the model is trained on 10 examples of *every* class.

    `curve` every 5 steps of AdamW, `area` its mean, `steps_to_80` the first step with 80 % of the original's accuracy (NaN: not in
    40 steps); `head_area` where only the head is trained. The attacker starts the forgotten classes' rows of the head anew, from zero with the
    other rows' mean bias, for every model alike: a muted row would otherwise hold nobody up who has the weights. All numbers are NaN
    where the original does not come back either (see `choose_rate`).
    """
    rate = exam.calibration.get("relearning", {}).get("learning_rate")
    if rate is None:
        return dict.fromkeys(("area", "steps_to_80", "head_area"), math.nan)
    goal = GOAL * (macro_accuracy(exam.original.test.logits, exam.original.test.labels, exam.forgotten) or 0.0)
    curve, head = _curve(exam, rate), fit_head(exam, SHOTS, HEAD * rate)
    reached = next((float(i * EVERY) for i, value in enumerate(curve) if value >= goal), math.nan)
    return {"curve": curve, "area": float(np.mean(curve)), "steps_to_80": reached, "head_area": float(np.mean(head))}


def _curve(exam: Examination, rate: float) -> list[float]:
    model = with_fresh_rows(exam.model, exam.forgotten)
    return fit(exam, model, list(model.parameters()), few_of_each(exam, SHOTS), forgotten_rows(exam), rate)
