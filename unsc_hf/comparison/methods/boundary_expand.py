"""Boundary expanding (Chen et al., "Boundary Unlearning", CVPR 2023, arXiv 2303.11570, section 3.4)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...models.outputs import find_head
from ..workbench import Workbench
from .registry import LEARNING_RATES, method


@method("boundary expand", LEARNING_RATES)
def boundary_expand(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """Teach the forget rows as a class that does not exist, in a head with one more output, and take that output away.

    It stops when the forget rows have gone to the new class. Without that class some of them may come back, which
    validation rows show.
    """
    classes = int(bench.original.config.num_labels)
    model = bench.fresh()
    _resize_head(model, classes, classes + 1)
    model = bench.unlearn(
        model=model,
        relabel=lambda _model, _batches, outputs: torch.full_like(outputs.labels, classes),
        null_space="none",
        **settings,
    )
    _resize_head(model, classes + 1, classes)
    return model


def _resize_head(model: PreTrainedModel, old: int, new: int) -> None:
    """Give the head `new` outputs: the first ones are the old ones, a new one starts at zero.

    The config keeps its labels.
    """
    name, head = find_head(model, old)
    resized = nn.Linear(head.in_features, new, head.bias is not None).to(head.weight)
    with torch.no_grad():
        for part in ("weight", "bias"):
            if getattr(head, part) is not None:
                target = getattr(resized, part).zero_()
                target[: min(old, new)] = getattr(head, part)[: min(old, new)]
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, resized)
