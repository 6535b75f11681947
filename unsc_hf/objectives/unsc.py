"""UNSC: descend on the forget rows towards their pseudo-labels (arXiv 2404.13588, algorithm 1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pseudo_label_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (batch, labels) against ids (batch,) or distributions (batch, labels), in float32."""
    return F.cross_entropy(logits.float(), targets)
