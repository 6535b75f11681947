"""Masked logits: the trivial control. It changes nothing inside the model."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from ...models.outputs import find_head
from ..workbench import Workbench
from .registry import method

LOW = -1e4  # far below any logit, and still a number in half precision


@method("masked logits")
def masked(bench: Workbench) -> PreTrainedModel:
    """The head's biases of the forgotten classes become -10000."""
    model = bench.fresh()
    _, head = find_head(model, int(model.config.num_labels))
    with torch.no_grad():
        if head.bias is None:
            head.bias = nn.Parameter(torch.zeros_like(head.weight[:, 0]))
        head.bias[bench.forgotten] = LOW
    return model
