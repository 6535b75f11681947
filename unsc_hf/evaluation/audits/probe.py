"""Linear probes: what a new linear head reads of the forgotten classes in each layer (arXiv 1610.01644)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from datasets import Dataset
from torch import Tensor

from ...models.hooks import NOT_INPUTS, evaluation_mode, pieces
from ..probes import linear_probe, probe_head
from .registry import Examination, Reading, audit
from .training import few_of_each, forgotten_rows

ROWS = 2000  # training rows of a probe of a hidden state, about
FEWEST = 5  # training rows of a class


@audit("linear probe", headline="head")
def probe(exam: Examination) -> Reading:
    """`head`: test accuracy on the forgotten classes of a probe on the head's inputs. `layer_00`, ...: the same on each
    hidden state, averaged over tokens or positions."""
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


def hidden_states(exam: Examination, rows: Dataset) -> tuple[list[Tensor], Tensor]:
    """Pooled hidden states of rows by layer, (rows, width) each, and the rows' labels, in one order."""
    layers: list[list[Tensor]] = []
    labels: list[Tensor] = []
    for batch in exam.batches(rows, 128, 0):  # endless: stop after one pass
        inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
        for chosen, piece in pieces(inputs):
            with evaluation_mode(exam.model):
                states: Sequence[Tensor] = exam.model(**piece, output_hidden_states=True).hidden_states or ()
            layers = layers or [[] for _ in states]
            for layer, state in zip(layers, states, strict=True):
                layer.append(pool(state, piece.get("attention_mask")).float().cpu())
            labels.append(batch["labels"].cpu()[chosen])
        if sum(map(len, labels)) >= len(rows):
            break
    return [torch.cat(layer) for layer in layers], torch.cat(labels)


def pool(state: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens (batch, tokens, width) or positions (batch, width, height, breadth)."""
    if state.dim() == 4:
        return state.mean((2, 3))
    if mask is None or mask.shape != state.shape[:2]:
        return state.mean(1)
    return (state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
