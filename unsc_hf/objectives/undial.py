"""UNDIAL: learn the original's distribution with the true token made less likely (Dong et al., arXiv 2402.10052)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .registry import objective
from .terms import Terms


@objective(needs=("teacher", "retained"))
def undial(terms: Terms, *, beta: float = 10.0, forget_weight: float = 1.0, retain_weight: float = 0.0) -> Tensor:
    """Cross-entropy with softmax(z_0 - beta * [true token]) on forget rows, plus a weighted loss on retained rows.

    Only labelled positions count. open-unlearning takes the mean over prompts and padding too.
    """
    softened = terms.need("teacher").float().clone()
    softened.scatter_add_(1, terms.labels[:, None], softened.new_full((len(softened), 1), -beta))
    forget = F.cross_entropy(terms.logits.float(), softened.softmax(-1))
    return forget_weight * forget + retain_weight * terms.need("retain_loss")
