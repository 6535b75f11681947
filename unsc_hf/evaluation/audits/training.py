"""Short training runs of attackers, the same for every model: AdamW, a constant learning rate, 40 steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers import PreTrainedModel

from ...data.selection import at_most_per_class
from ...models.head import classify, find_head
from ...models.hooks import NOT_INPUTS, evaluation_mode
from ...models.outputs import join_outputs
from ..accuracy import macro_accuracy
from .registry import Examination

STEPS = 40
EVERY = 5
LEARNING_RATE = 3e-4  # where nothing is calibrated
BATCH = 64
TEST_ROWS = 400


def few_rows(exam: Examination, shots: int) -> np.ndarray:
    """Numbers of at most `shots` training rows of every class; rows to forget come first, then rows to keep."""
    labels = torch.cat([exam.outputs.forget.labels, exam.outputs.retain.labels])
    return at_most_per_class(labels, shots, np.random.default_rng(0))


def few_of_each(exam: Examination, shots: int) -> Dataset:
    """At most `shots` training rows of every class."""
    return concatenate_datasets([exam.forget, exam.retain]).select(few_rows(exam, shots))


def forgotten_rows(exam: Examination) -> Dataset:
    """Up to 400 test rows of the forgotten classes."""
    rows = np.flatnonzero(exam.of_forgotten(exam.outputs.test.labels).numpy())
    return exam.test.select(rows[:: max(1, len(rows) // TEST_ROWS)][:TEST_ROWS])


def fit(
    exam: Examination,
    model: PreTrainedModel,
    parameters: list[nn.Parameter],
    rows: Dataset,
    unseen: Dataset,
    learning_rate: float = LEARNING_RATE,
) -> list[float]:
    """Train in place; accuracy on `unseen` (macro over the forgotten classes) before, and after every 5 of 40 steps."""
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    batches: Iterator[dict[str, Any]] = exam.batches(rows, BATCH, 0)
    curve = []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            seen = exam.collect(model, unseen)
            curve.append(macro_accuracy(seen.logits, seen.labels, exam.forgotten) or 0.0)
        if step == STEPS:
            break
        batch = next(batches)
        with evaluation_mode(model, gradients=True):  # without dropout every model is attacked alike
            logits, _ = classify(model, {name: value for name, value in batch.items() if name not in NOT_INPUTS})
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits.float(), batch["labels"]).backward()  # type: ignore[no-untyped-call]
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


def fit_head(exam: Examination, shots: int, learning_rate: float) -> list[float]:
    """As `fit`, but only the head learns: `shots` examples of every class, and its forgotten rows start anew."""
    _, head = find_head(with_fresh_rows(exam.model, exam.forgotten), len(exam.kept) + len(exam.forgotten))
    head = head.float().cpu()
    train, test = join_outputs([exam.outputs.forget, exam.outputs.retain]), exam.outputs.test
    few = few_rows(exam, shots)
    features, labels = train.need_features()[few], train.labels[few]
    unseen = exam.of_forgotten(test.labels)
    optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=0.0)
    curve = []
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            with torch.no_grad():
                logits = head(test.need_features()[unseen])
            curve.append(macro_accuracy(logits, test.labels[unseen], exam.forgotten) or 0.0)
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(features), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return curve
