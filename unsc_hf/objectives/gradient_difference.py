"""Gradient difference: ascent on the forget rows, descent on retained ones.

Liu et al., "Continual Learning and Private Unlearning", arXiv 2203.12817; TOFU, arXiv 2401.06121, section 3.4.
"""

from __future__ import annotations

from torch import Tensor

from .registry import objective
from .terms import Terms


@objective(needs=("retained",))
def gradient_difference(terms: Terms, *, retain_weight: float = 1.0) -> Tensor:
    """Weighted loss on retained rows minus the loss on forget rows."""
    return retain_weight * terms.need("retain_loss") - terms.loss()
