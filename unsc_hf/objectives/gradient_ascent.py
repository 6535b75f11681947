"""Gradient ascent on the loss of the forget rows.

Thudi et al., "Unrolling SGD", arXiv 2109.13398; Jang et al., arXiv 2210.01504, equation 1.
"""

from __future__ import annotations

from torch import Tensor

from .registry import objective
from .terms import Terms


@objective()
def gradient_ascent(terms: Terms) -> Tensor:
    """Minus the mean cross-entropy of the true labels. It has no lower bound; the leak budget and the target end it."""
    return -terms.loss()
