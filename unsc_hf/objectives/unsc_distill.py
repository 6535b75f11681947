"""UNSC beside distillation: retained rows shall be answered as the original model answers them, the forgotten classes left out.
(Li and Hoiem, "Learning without Forgetting", arXiv 1606.09282, section 3; Hinton et al., arXiv 1503.02531.)"""

from __future__ import annotations

import torch
from torch import Tensor

from .scrub import divergence
from .terms import Terms
from .unsc import unsc


def unsc_distill(terms: Terms) -> Tensor:
    """UNSC's loss plus the weighted KL(original || model) on retained rows, which reads no label of theirs.

    Forgotten classes take no part in what the original says: with soft pseudo-labels of temperature 1 the forget rows are taught the same.
    """
    assert terms.retain_logits is not None
    assert terms.retain_teacher is not None
    teacher = terms.retain_teacher.float()
    if terms.forgotten is not None:
        gone = terms.forgotten.to(teacher.device)
        teacher = teacher.index_fill(-1, gone, torch.finfo(teacher.dtype).min / 2)
    return unsc(terms) + terms.retain_weight * divergence(teacher, terms.retain_logits)
