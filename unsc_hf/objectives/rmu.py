"""RMU: steer hidden states of forget rows to a random vector, and keep those of retained rows.

Li et al., "The WMDP Benchmark", arXiv 2403.03218, equations 1 and 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import objective
from .terms import Terms


@objective(needs=("retained", "hidden"))
def rmu(
    terms: Terms, *, steering: float = 2.0, layer: int = 7, forget_weight: float = 1.0, retain_weight: float = 1.0
) -> Tensor:
    """Weighted sum of squared distances of hidden states: to a fixed random direction, and to the original model's.

    Hidden states are those of answer tokens after decoder block `layer`, counted from 0, or the last one. Distances are
    means over dimensions, then tokens, then samples. The direction has length `steering`.
    """
    states = terms.need_hidden()
    direction = torch.rand(states.forget.shape[1], generator=torch.Generator().manual_seed(0)).to(states.forget)
    direction = direction / direction.norm() * steering
    return forget_weight * distance(states.forget, direction, states.forget_samples) + retain_weight * distance(
        states.retain, states.original_retain, states.retain_samples
    )


def distance(hidden: Tensor, goal: Tensor, samples: Tensor) -> Tensor:
    """Mean squared difference of hidden states (tokens, width) and a goal: over tokens, then over samples (tokens,)."""
    each = (hidden.float() - goal.float()).square().mean(-1)
    count = int(samples.max()) + 1
    totals = each.new_zeros(count).index_add(0, samples, each)
    return (totals / samples.bincount(minlength=count)).mean()
