"""SCRUB: agree with the original model on retained rows, disagree with it on forget rows.

Kurmanji et al., "Towards Unbounded Machine Unlearning", arXiv 2302.09880, equation 3.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .registry import objective
from .terms import Terms


@objective(needs=("retained", "teacher", "retain_teacher"))
def scrub(terms: Terms, *, retain_weight: float = 1.0) -> Tensor:
    """alpha * KL on retained rows + their loss - KL on forget rows, KL(original || model), alpha = `retain_weight`.

    Both parts enter every step; the paper's code takes them in alternating epochs.
    """
    kept = divergence(terms.need("retain_teacher"), terms.need("retain_logits"))
    return retain_weight * kept + terms.need("retain_loss") - divergence(terms.need("teacher"), terms.logits)


def divergence(teacher: Tensor, student: Tensor) -> Tensor:
    """KL(teacher || student) of two sets of logits (rows, classes), mean over rows, in float32."""
    student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)
