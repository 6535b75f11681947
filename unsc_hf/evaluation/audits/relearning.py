"""How forgotten classes come back: from a few examples of them, from training on retained rows, or from rounding.

Attackers' training runs are short and the same for every model: AdamW, a constant learning rate, 40 steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...data.selection import at_most_per_class
from ...models.hooks import evaluation_mode, model_inputs
from ...models.layers import row_geometry
from ...models.outputs import Outputs, classify, find_head, join_outputs
from ..accuracy import macro_accuracy
from .registry import Examination, Reading, audit

STEPS = 40
EVERY = 5
LEARNING_RATE = 3e-4  # where nothing is calibrated
BATCH = 64
TEST_ROWS = 400
SHOTS = 10
RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # larger ones make the curves of ten examples jump
ENOUGH = 0.5  # of the original's accuracy; ten examples of a hard class rarely bring back more
GOAL = 0.8
HEAD = 10  # times the learning rate where only the head is trained


def choose_rate(exam: Examination) -> dict[str, Any]:
    """`learning_rate`: the smallest that brings the *original* back to half of its accuracy in 40 steps.

    The forgotten rows of the original's head start anew, as in every model that is attacked. An attack that fails on a
    model that knows everything is no evidence about others: `learning_rate` is None then, and `summary` says so.
    """
    goal = ENOUGH * _original_accuracy(exam)
    reached: dict[str, float] = {}
    for rate in RATES:
        reached[f"{rate:g}"] = _relearned(exam, rate)[-1]
        if reached[f"{rate:g}"] >= goal > 0:
            summary = (
                f"learning rate {rate:g}, the smallest that brings the original back to {goal:.0%} in {STEPS} steps"
            )
            return {"learning_rate": rate, "goal": goal, "reached": reached, "summary": summary}
    summary = (
        f"no evidence, in {STEPS} steps no learning rate up to {RATES[-1]:g} brings the original itself back to "
        f"{goal:.0%} (best {max(reached.values()):.0%})"
    )
    return {"learning_rate": None, "goal": goal, "reached": reached, "summary": summary}


@audit("relearning from 10 examples", headline="area", calibrate=choose_rate)
def relearning(exam: Examination) -> Reading:
    """Test accuracy on the forgotten classes while the model is trained on 10 examples of *every* class (Golatkar et
    al., arXiv 1911.04933).

    `curve`: every 5 steps of AdamW. `area`: its mean. `steps_to_80`: the first step with 80 % of the original's
    accuracy, NaN when 40 steps do not reach it. `head_area`: the area where only the head is trained. All numbers are
    NaN where the original does not come back either (see `choose_rate`).

    In every model the forgotten classes' rows of the head start from zero, with the other rows' mean bias. A muted row
    would not stop an attacker who has the weights.
    """
    rate = exam.calibration.get("relearning", {}).get("learning_rate")
    if rate is None:
        return dict.fromkeys(("area", "steps_to_80", "head_area"), math.nan)
    goal = GOAL * _original_accuracy(exam)
    curve, head = _relearned(exam, rate), fit_head(exam, SHOTS, HEAD * rate)
    reached = next((float(i * EVERY) for i, value in enumerate(curve) if value >= goal), math.nan)
    return {"curve": curve, "area": float(np.mean(curve)), "steps_to_80": reached, "head_area": float(np.mean(head))}


@audit("after fine-tuning on retained rows", headline="AccDut")
def fine_tuning(exam: Examination) -> Reading:
    """`AccDut`: the highest test accuracy on the forgotten classes within 40 steps on retained rows, which may bring
    back what was only muted (Łucki et al., arXiv 2409.18025)."""
    curve = fit(exam, deepcopy(exam.model).requires_grad_(True), exam.retain, forgotten_rows(exam))
    return {"AccDut": max(curve), "curve": curve}


@audit("AccDut at 4 bits", headline="int4")
def quantisation(exam: Examination) -> Reading:
    """`int8`, `int4`: test accuracy on the forgotten classes after rounding to that many bits, which can bring them
    back (Zhang et al., ICLR 2025, arXiv 2410.16454). Every linear and convolution weight is rounded to the nearest
    value, symmetrically, with one scale for each output channel."""
    rows = forgotten_rows(exam)
    reading: Reading = {}
    for bits in (8, 4):
        model = deepcopy(exam.model)
        with torch.no_grad():
            for module in model.modules():
                if row_geometry(module) is not None:
                    module.weight.copy_(rounded(module.weight, bits))
        seen = exam.collect(model, rows)
        reading[f"int{bits}"] = macro_accuracy(seen.logits, seen.labels, exam.forgotten) or 0.0
    return reading


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Nearest representable values of a weight whose first dimension is the output."""
    largest = 2 ** (bits - 1) - 1
    scale = weight.flatten(1).abs().amax(1).clamp_min(1e-12) / largest
    scale = scale.reshape(-1, *[1] * (weight.dim() - 1))
    return (weight / scale).round().clamp(-largest, largest) * scale


def _original_accuracy(exam: Examination) -> float:
    test = exam.original.test
    return macro_accuracy(test.logits, test.labels, exam.forgotten) or 0.0


def _relearned(exam: Examination, rate: float) -> list[float]:
    model = with_fresh_rows(exam.model, exam.forgotten)
    return fit(exam, model, few_of_each(exam, SHOTS), forgotten_rows(exam), rate)


def few_rows(exam: Examination, shots: int) -> np.ndarray:
    """Numbers of at most `shots` training rows of every class; rows to forget come first, then rows to keep."""
    labels = torch.cat([exam.outputs.forget.labels, exam.outputs.retain.labels])
    return at_most_per_class(labels, shots)


def few_of_each(exam: Examination, shots: int) -> Dataset:
    """At most `shots` training rows of every class."""
    return concatenate_datasets([exam.forget, exam.retain]).select(few_rows(exam, shots))


def forgotten_rows(exam: Examination) -> Dataset:
    """Up to 400 test rows of the forgotten classes."""
    rows = np.flatnonzero(exam.of_forgotten(exam.outputs.test.labels).numpy())
    return exam.test.select(rows[:: max(1, len(rows) // TEST_ROWS)][:TEST_ROWS])


def fit(
    exam: Examination, model: PreTrainedModel, rows: Dataset, unseen: Dataset, learning_rate: float = LEARNING_RATE
) -> list[float]:
    """Train a model in place for 40 steps; macro accuracy on the forgotten rows `unseen`, before and every 5 steps."""
    batches = exam.batches(rows, BATCH, 0)

    def loss() -> Tensor:
        batch = next(batches)
        with evaluation_mode(model, gradients=True):  # without dropout every model is attacked alike
            logits, _ = classify(model, model_inputs(batch))
            return nn.functional.cross_entropy(logits.float(), batch["labels"])

    return _curve(model, loss, lambda: exam.collect(model, unseen), exam.forgotten, learning_rate)


def fit_head(exam: Examination, shots: int, learning_rate: float) -> list[float]:
    """As `fit`, but only the head learns: `shots` examples of every class, and its forgotten rows start anew."""
    _, head = find_head(with_fresh_rows(exam.model, exam.forgotten), len(exam.kept) + len(exam.forgotten))
    head = head.float().cpu()
    train, test = join_outputs([exam.outputs.forget, exam.outputs.retain]), exam.outputs.test
    few, unseen = few_rows(exam, shots), exam.of_forgotten(test.labels)

    def loss() -> Tensor:
        return nn.functional.cross_entropy(head(train.need_features()[few]), train.labels[few])

    def evaluate() -> Outputs:
        with torch.no_grad():
            return Outputs(head(test.need_features()[unseen]), None, test.labels[unseen])

    return _curve(head, loss, evaluate, exam.forgotten, learning_rate)


def _curve(
    model: nn.Module,
    loss: Callable[[], Tensor],
    evaluate: Callable[[], Outputs],
    forgotten: Sequence[int],
    learning_rate: float,
) -> list[float]:
    """Accuracy on the forgotten classes before, and after every 5 of 40 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    curve = []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            seen = evaluate()
            curve.append(macro_accuracy(seen.logits, seen.labels, forgotten) or 0.0)
        if step < STEPS:
            optimizer.zero_grad()
            loss().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return curve


def with_fresh_rows(model: PreTrainedModel, forgotten: Sequence[int]) -> PreTrainedModel:
    """A copy whose head knows nothing of the forgotten classes: zero weights, and the mean bias of the others."""
    copy = deepcopy(model).requires_grad_(True)
    _, head = find_head(copy, int(copy.config.num_labels))
    rows = torch.tensor(list(forgotten))
    kept = torch.ones(head.out_features, dtype=torch.bool).index_fill(0, rows, False)
    with torch.no_grad():
        head.weight[rows] = 0.0
        if head.bias is not None:
            head.bias[rows] = head.bias[kept].mean()
    return copy
