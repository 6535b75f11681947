"""SimNPO: negative preference optimisation without a reference, per token (Fan et al., arXiv 2410.07163, equation 4)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .terms import Terms


def simnpo(terms: Terms) -> Tensor:
    """-(2 / beta) * mean log sigmoid(-beta / length * log p - gamma) over samples."""
    reward = terms.beta * terms.log_likelihood() / terms.lengths()
    return -(2 / terms.beta) * F.logsigmoid(-reward - terms.gamma).mean()
