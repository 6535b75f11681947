"""UNSC beside rehearsal of retained rows, for models in which single classes have few rows to calibrate the null space on
(the retained term of gradient difference: Liu et al., arXiv 2203.12817; TOFU, arXiv 2401.06121, section 3.4)."""

from __future__ import annotations

from torch import Tensor

from .terms import Terms
from .unsc import unsc


def unsc_retain(terms: Terms) -> Tensor:
    """UNSC's loss plus the weighted loss on retained rows."""
    assert terms.retain_loss is not None
    return unsc(terms) + terms.retain_weight * terms.retain_loss
