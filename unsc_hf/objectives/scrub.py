"""SCRUB: obey the original model on retained rows, disobey it on forget rows (Kurmanji et al., "Towards Unbounded Machine
Unlearning", arXiv 2302.09880, equation 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .terms import Terms


def scrub(terms: Terms) -> Tensor:
    """alpha * KL on retained rows + their loss - KL on forget rows, KL(original || model), alpha = `retain_weight`.

    Both parts enter every step; the paper's code takes them in alternating epochs.
    """
    assert terms.retain_loss is not None
    assert terms.retain_logits is not None
    assert terms.teacher is not None
    assert terms.retain_teacher is not None
    kept = divergence(terms.retain_teacher, terms.retain_logits)
    return terms.retain_weight * kept + terms.retain_loss - divergence(terms.teacher, terms.logits)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of two sets of logits (rows, classes), mean over rows, in float32."""
    student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)
