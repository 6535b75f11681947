"""Negative preference optimisation with a loss on retained rows (Zhang et al., arXiv 2404.05868, section 4)."""

from __future__ import annotations

from torch import Tensor

from .npo_forget import npo_forget
from .registry import objective
from .terms import Terms


@objective(needs=("retained",))
def npo(terms: Terms, *, beta: float = 0.1, forget_weight: float = 1.0, retain_weight: float = 1.0) -> Tensor:
    """Weighted sum of NPO's term on forget rows and the loss on retained rows, as in open-unlearning."""
    return forget_weight * npo_forget(terms, beta=beta) + retain_weight * terms.need("retain_loss")
