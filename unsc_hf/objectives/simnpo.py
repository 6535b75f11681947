"""SimNPO with a loss on retained rows (Fan et al., arXiv 2410.07163, section 5)."""

from __future__ import annotations

from torch import Tensor

from .registry import objective
from .simnpo_forget import simnpo_forget
from .terms import Terms


@objective(needs=("retained",))
def simnpo(
    terms: Terms, *, beta: float = 4.5, delta: float = 0.0, forget_weight: float = 0.125, retain_weight: float = 1.0
) -> Tensor:
    """Weighted sum of SimNPO's term on forget rows and the loss on retained rows; defaults of open-unlearning.

    `delta` is the loss per token beyond which a sample counts as forgotten.
    """
    forget = simnpo_forget(terms, beta=beta, gamma=beta * delta)
    return forget_weight * forget + retain_weight * terms.need("retain_loss")
