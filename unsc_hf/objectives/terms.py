"""What an objective may look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Terms:
    """A batch of forget rows, flattened to labelled positions: one per image or text, one per answer token.

    Attributes:
        logits: (positions, classes); classes are labels or the vocabulary.
        labels: true ids, (positions,).
        targets: pseudo-labels, ids (positions,) or distributions (positions, classes).
        samples: which sample each position belongs to, (positions,), from 0.
        reference: log-likelihood of each sample's labels under the original model, summed over positions, (samples,).
        retain_loss: mean loss on a batch of retained rows, for objectives that ask for them.
        retain_logits: logits at their labelled positions.
        teacher, retain_teacher: the original model's logits at the same positions, for objectives that ask for it.
        beta: inverse temperature of NPO and SimNPO.
        gamma: reward margin of SimNPO.
        retain_weight: weight of `retain_loss`, or of what stands in its place.
        forgotten: ids of the classes of which no row remains, (classes forgotten,), where there are any.
    """

    logits: Tensor
    labels: Tensor
    targets: Tensor
    samples: Tensor
    reference: Tensor
    retain_loss: Tensor | None = None
    retain_logits: Tensor | None = None
    teacher: Tensor | None = None
    retain_teacher: Tensor | None = None
    beta: float = 0.1
    gamma: float = 0.0
    retain_weight: float = 1.0
    forgotten: Tensor | None = None

    def loss(self) -> Tensor:
        """Mean cross-entropy of the true labels, in float32."""
        return F.cross_entropy(self.logits.float(), self.labels)

    def log_likelihood(self) -> Tensor:
        """Log-likelihood of each sample's true labels, summed over its positions, (samples,)."""
        each = -F.cross_entropy(self.logits.float(), self.labels, reduction="none")
        return torch.zeros_like(self.reference).index_add(0, self.samples, each)

    def lengths(self) -> Tensor:
        """Positions of each sample, (samples,), as float."""
        ones = torch.ones_like(self.samples, dtype=self.reference.dtype)
        return torch.zeros_like(self.reference).index_add(0, self.samples, ones)
