"""The forget term of negative preference optimisation alone (Zhang et al., arXiv 2404.05868, equation 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .registry import objective
from .terms import Terms


@objective()
def npo_forget(terms: Terms, *, beta: float = 0.1) -> Tensor:
    """(2 / beta) * mean log(1 + (p / p_ref)^beta) over samples; with beta towards 0 it tends to gradient ascent."""
    ratio = terms.log_likelihood() - terms.reference
    return -(2 / beta) * F.logsigmoid(-beta * ratio).mean()
