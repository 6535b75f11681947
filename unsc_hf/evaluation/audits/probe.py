"""Linear probes: what a new linear head can still read of the forgotten classes in each layer (Alain and Bengio, arXiv 1610.01644)."""

from __future__ import annotations

import torch
from datasets import Dataset
from torch import Tensor

from ...models.hooks import NOT_INPUTS, evaluation_mode, pieces
from ..probes import linear_probe
from .registry import Examination, Reading, audit

TRAIN_ROWS = 2000
TEST_ROWS = 2000


@audit("linear probe", headline="head")
def probe(exam: Examination) -> Reading:
    """`head`: test accuracy on the forgotten classes of a probe on the head's inputs; `layer_00`, ...: on each hidden state,
    averaged over tokens or positions."""
    forget, retain, test = exam.outputs.forget, exam.outputs.retain, exam.outputs.test
    per_class = max(5, TRAIN_ROWS // (len(exam.kept) + len(exam.forgotten)))
    features = torch.cat([forget.need_features(), retain.need_features()])
    labels = torch.cat([forget.labels, retain.labels])
    reading: Reading = {
        "head": _or_nan(
            linear_probe(features, labels, test.need_features(), test.labels, exam.forgotten, per_class=per_class)
        )
    }
    taught, taught_labels = _hidden_states(exam, [exam.forget, exam.retain], TRAIN_ROWS)
    asked, asked_labels = _hidden_states(exam, [exam.test], TEST_ROWS)
    for i, (train_layer, test_layer) in enumerate(zip(taught, asked, strict=True)):
        value = linear_probe(train_layer, taught_labels, test_layer, asked_labels, exam.forgotten, per_class=per_class)
        reading[f"layer_{i:02d}"] = _or_nan(value)
    return reading


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _hidden_states(exam: Examination, parts: list[Dataset], rows: int) -> tuple[list[Tensor], Tensor]:
    """Pooled hidden states of some rows of each part, by layer, and the rows' labels."""
    layers: list[list[Tensor]] = []
    labels: list[Tensor] = []
    for part in parts:
        seen, wanted = 0, min(rows // len(parts), len(part))
        for batch in exam.batches(part, 128, 0):
            known = batch["labels"].cpu()
            for chosen, piece in pieces({name: value for name, value in batch.items() if name not in NOT_INPUTS}):
                with evaluation_mode(exam.model):
                    states = exam.model(**piece, output_hidden_states=True).hidden_states or ()
                layers = layers or [[] for _ in states]
                for kept, state in zip(layers, states, strict=True):
                    kept.append(_pool(state, piece.get("attention_mask")).float().cpu())
                labels.append(known[chosen])
            seen += len(known)
            if seen >= wanted:
                break
    return [torch.cat(kept) for kept in layers], torch.cat(labels)


def _pool(state: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens (batch, tokens, width) or positions (batch, width, height, breadth)."""
    if state.dim() == 4:
        return state.mean((2, 3))
    if mask is None or mask.shape != state.shape[:2]:
        return state.mean(1)
    return (state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
