"""The forget term of SimNPO alone: NPO per token, without a reference (Fan et al., arXiv 2410.07163, equation 4)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .registry import objective
from .terms import Terms


@objective()
def simnpo_forget(terms: Terms, *, beta: float = 0.1, gamma: float = 0.0) -> Tensor:
    """-(2 / beta) * mean log sigmoid(-beta / length * log p - gamma) over samples."""
    reward = beta * terms.log_likelihood() / terms.lengths()
    return -(2 / beta) * F.logsigmoid(-reward - gamma).mean()
