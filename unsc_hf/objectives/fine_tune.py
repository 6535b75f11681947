"""Fine-tuning on retained rows alone: the hope that what is not rehearsed is forgotten (Warnecke et al., arXiv 2108.11577;
the "FT" baseline of Golatkar et al., arXiv 1911.04933)."""

from __future__ import annotations

from torch import Tensor

from .terms import Terms


def fine_tune(terms: Terms) -> Tensor:
    """The loss on retained rows; forget rows are not looked at."""
    assert terms.retain_loss is not None
    return terms.retain_loss
