"""UNSC with a loss on retained rows, for classes with too few rows to estimate the null space well.

The retained term is that of gradient difference (Liu et al., arXiv 2203.12817; TOFU, arXiv 2401.06121, section 3.4).
"""

from __future__ import annotations

from torch import Tensor

from .registry import objective
from .terms import Terms
from .unsc import unsc


@objective(needs=("retained",))
def unsc_retain(terms: Terms, *, retain_weight: float = 1.0) -> Tensor:
    """UNSC's loss plus the weighted loss on retained rows."""
    return unsc(terms) + retain_weight * terms.need("retain_loss")
