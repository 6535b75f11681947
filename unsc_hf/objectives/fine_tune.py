"""Fine-tuning on retained rows alone, in the hope that what is not trained any more is forgotten.

Warnecke et al., arXiv 2108.11577; the "FT" baseline of Golatkar et al., arXiv 1911.04933.
"""

from __future__ import annotations

from torch import Tensor

from .registry import objective
from .terms import Terms


@objective(needs=("retained",))
def fine_tune(terms: Terms) -> Tensor:
    """The loss on retained rows; forget rows are not looked at."""
    return terms.need("retain_loss")
