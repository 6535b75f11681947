"""Relearning: how fast forgotten classes come back from a few examples (Golatkar et al., arXiv 1911.04933, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ...outputs import find_head
from ..accuracy import macro_accuracy
from .registry import Examination, Reading, audit
from .training import EVERY, LEARNING_RATE, STEPS, few_of_each, fit, forgotten_rows

SHOTS = 10


@audit("relearning from 10 examples", headline="area")
def relearning(exam: Examination) -> Reading:
    """Test accuracy on the forgotten classes while the model is trained on 10 examples of *every* class.

    `curve` every 5 steps of AdamW, `area` its mean, `steps_to_80` the first step with 80 % of the original's accuracy (NaN: not in
    40 steps); `head_area` where only the head is trained. The attacker starts the forgotten classes' rows of the head anew, from zero with the
    other rows' mean bias, for every model alike: a muted row would otherwise hold nobody up who has the weights.
    """
    goal = 0.8 * (macro_accuracy(exam.original.test.logits, exam.original.test.labels, exam.forgotten) or 0.0)
    few = few_of_each(exam, SHOTS)
    unseen = forgotten_rows(exam)
    model = with_fresh_rows(exam.model, exam.forgotten)
    curve = fit(exam, model, list(model.parameters()), few, unseen)
    reached = next((i * EVERY for i, value in enumerate(curve) if value >= goal), None)
    return {
        "curve": curve,
        "area": float(np.mean(curve)),
        "steps_to_80": float("nan") if reached is None else float(reached),
        "head_area": float(np.mean(_head_only(exam))),
    }


def with_fresh_rows(model: PreTrainedModel, forgotten: Sequence[int]) -> PreTrainedModel:
    """A copy whose head knows nothing of the forgotten classes."""
    copy = deepcopy(model).requires_grad_(True)
    _, head = find_head(copy, int(copy.config.num_labels))
    rows = torch.tensor(list(forgotten))
    kept = torch.ones(head.out_features, dtype=torch.bool).index_fill(0, rows, False)
    with torch.no_grad():
        head.weight[rows] = 0.0
        if head.bias is not None:
            head.bias[rows] = head.bias[kept].mean()
    return copy


def _head_only(exam: Examination) -> list[float]:
    """The curve when features stay as they are."""
    _, head = find_head(with_fresh_rows(exam.model, exam.forgotten), len(exam.kept) + len(exam.forgotten))
    head = head.float().cpu()
    parts = (exam.outputs.forget, exam.outputs.retain)
    features = torch.cat([part.need_features() for part in parts])
    labels = torch.cat([part.labels for part in parts])
    rng = np.random.default_rng(0)
    few = np.concatenate([rng.permutation(np.flatnonzero(labels == c))[:SHOTS] for c in torch.unique(labels)])
    test = exam.outputs.test
    unseen = exam.of_forgotten(test.labels)
    optimizer = torch.optim.AdamW(head.parameters(), lr=10 * LEARNING_RATE, weight_decay=0.0)
    curve = []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                logits = head(test.need_features()[unseen])
            curve.append(macro_accuracy(logits, test.labels[unseen], exam.forgotten) or 0.0)
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features[few]), labels[few]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return curve
