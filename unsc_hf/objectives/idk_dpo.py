"""IdkDPO: prefer a refusal to the answer that is to be forgotten (TOFU, arXiv 2401.06121, section 3.4).

The loss is that of direct preference optimisation (Rafailov et al., arXiv 2305.18290, equation 7), times 2 / beta.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .registry import objective
from .terms import Terms


@objective(needs=("retained", "refusal"))
def idk_dpo(terms: Terms, *, beta: float = 0.1, forget_weight: float = 1.0, retain_weight: float = 1.0) -> Tensor:
    """Weighted sum of -(2 / beta) * mean log sigmoid(beta * margin) and the loss on retained rows.

    The margin of a sample is the log-likelihood ratio to the original model of a refusal, less that of the answer.
    """
    margin = terms.need("refusal") - terms.need("refusal_reference") - terms.log_likelihood() + terms.reference
    return -(2 / beta) * forget_weight * F.logsigmoid(beta * margin).mean() + retain_weight * terms.need("retain_loss")
