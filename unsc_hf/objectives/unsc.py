"""UNSC: descend on the forget rows towards their pseudo-labels (arXiv 2404.13588, algorithm 1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .registry import objective
from .terms import Terms


@objective()
def unsc(terms: Terms) -> Tensor:
    """Mean cross-entropy of the logits against the pseudo-labels, in float32."""
    return F.cross_entropy(terms.logits.float(), terms.targets)
