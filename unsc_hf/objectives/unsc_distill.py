"""UNSC with distillation: retained rows are answered as the original model answers them.

Li and Hoiem, "Learning without Forgetting", arXiv 1606.09282, section 3; Hinton et al., arXiv 1503.02531.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import objective
from .scrub import divergence
from .terms import Terms
from .unsc import unsc


@objective(needs=("retained", "retain_teacher"), mixed=True)
def unsc_distill(terms: Terms, *, retain_weight: float = 1.0) -> Tensor:
    """UNSC's loss plus the weighted KL(original || model) on retained rows, which reads none of their labels.

    The original's logits of forgotten classes are masked first, so that both parts teach the same.
    """
    teacher = terms.need("retain_teacher").float()
    if terms.forgotten is not None:
        teacher = teacher.index_fill(-1, terms.forgotten.to(teacher.device), torch.finfo(teacher.dtype).min / 2)
    return unsc(terms) + retain_weight * divergence(teacher, terms.need("retain_logits"))
