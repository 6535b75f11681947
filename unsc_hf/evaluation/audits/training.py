"""Short training runs of attackers, the same for every model: AdamW, a constant learning rate, 40 steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...data.selection import at_most_per_class
from ...models.hooks import NOT_INPUTS, evaluation_mode
from ...models.outputs import Outputs, classify, find_head, join_outputs
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
    exam: Examination, model: PreTrainedModel, rows: Dataset, unseen: Dataset, learning_rate: float = LEARNING_RATE
) -> list[float]:
    """Train a model in place for 40 steps; macro accuracy on the forgotten rows `unseen`, before and every 5 steps."""
    batches = exam.batches(rows, BATCH, 0)

    def loss() -> Tensor:
        batch = next(batches)
        with evaluation_mode(model, gradients=True):  # without dropout every model is attacked alike
            logits, _ = classify(model, {name: value for name, value in batch.items() if name not in NOT_INPUTS})
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
