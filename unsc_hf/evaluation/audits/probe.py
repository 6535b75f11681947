"""What features still say of the forgotten classes: linear probes of each layer, and the prototype attack."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from datasets import Dataset
from torch import Tensor

from ...models.hooks import evaluation_mode, model_inputs, pieces, pool
from ...models.outputs import head_weights
from ..probes import linear_probe, probe_head, prototype_attack
from .registry import Examination, Reading, audit
from .relearning import few_of_each, forgotten_rows

ROWS = 2000  # training rows of a probe of a hidden state, about
FEWEST = 5  # training rows of a class


@audit("linear probe", headline="head")
def probe(exam: Examination) -> Reading:
    """`head`: test accuracy on the forgotten classes of a new linear head on the head's inputs (arXiv 1610.01644).
    `layer_00`, ...: the same on each hidden state, averaged over tokens or positions."""
    per_class = max(FEWEST, ROWS // (len(exam.kept) + len(exam.forgotten)))
    train, train_labels = hidden_states(exam, few_of_each(exam, per_class))
    test, test_labels = hidden_states(exam, forgotten_rows(exam))
    layers = [
        linear_probe(before, train_labels, after, test_labels, exam.forgotten)
        for before, after in zip(train, test, strict=True)
    ]
    reading = {"head": probe_head(exam.outputs, exam.forgotten)}
    reading |= {f"layer_{i:02d}": value for i, value in enumerate(layers)}
    return {name: math.nan if value is None else value for name, value in reading.items()}


@audit("10-shot prototype attack", headline="shots_10")
def prototype(exam: Examination) -> Reading:
    """Examples of a forgotten class are written into the head, without training (Spotter, ICML 2026).

    `shots_1`, `shots_5`, `shots_10`: test accuracy on the forgotten classes afterwards.
    """
    head = head_weights(exam.model, len(exam.kept) + len(exam.forgotten))
    values = {f"shots_{shots}": prototype_attack(exam.outputs, head, exam.forgotten, shots) for shots in (1, 5, 10)}
    return {name: math.nan if value is None else value for name, value in values.items()}


def hidden_states(exam: Examination, rows: Dataset) -> tuple[list[Tensor], Tensor]:
    """Pooled hidden states of rows by layer, (rows, width) each, and the rows' labels, in one order."""
    layers: list[list[Tensor]] = []
    labels: list[Tensor] = []
    for batch in exam.batches(rows, 128, 0):  # endless: stop after one pass
        for chosen, piece in pieces(model_inputs(batch)):
            with evaluation_mode(exam.model):
                states: Sequence[Tensor] = exam.model(**piece, output_hidden_states=True).hidden_states or ()
            layers = layers or [[] for _ in states]
            for layer, state in zip(layers, states, strict=True):
                layer.append(pool(state, piece.get("attention_mask")).float().cpu())
            labels.append(batch["labels"].cpu()[chosen])
        if sum(map(len, labels)) >= len(rows):
            break
    return [torch.cat(layer) for layer in layers], torch.cat(labels)
