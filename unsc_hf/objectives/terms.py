"""What an objective may look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class HiddenStates:
    """Hidden states of labelled tokens after one decoder block, (tokens, width), and the sample of each, (tokens,).

    Attributes:
        forget, forget_samples: of the forget rows.
        retain, retain_samples: of a batch of retained rows.
        original_retain: the original model's at the same tokens.
    """

    forget: Tensor
    forget_samples: Tensor
    retain: Tensor
    retain_samples: Tensor
    original_retain: Tensor


@dataclass(frozen=True)
class Terms:
    """A batch of forget rows, flattened to labelled positions: one per image or text, one per answer token.

    Attributes:
        logits: (positions, classes); classes are labels or the vocabulary.
        labels: true ids, (positions,).
        targets: pseudo-labels, ids (positions,) or distributions (positions, classes).
        samples: which sample each position belongs to, (positions,), from 0.
        reference: log-likelihood of each sample's labels under the original model, summed over positions, (samples,).
        retain_loss: mean loss on a batch of retained rows.
        retain_logits: logits at their labelled positions, (positions, classes).
        teacher, retain_teacher: the original model's logits at the same positions.
        hidden: hidden states of answer tokens.
        refusal, refusal_reference: log-likelihood of a refusal in place of each sample's answer, summed over its
            tokens, under the model and under the original one, (samples,).

    The optional fields are there for objectives that name them as needed; read them with `need`.
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
    hidden: HiddenStates | None = None
    refusal: Tensor | None = None
    refusal_reference: Tensor | None = None

    def need(self, field: str) -> Tensor:
        """An optional field.

        Raises:
            TypeError: the objective did not name it when it was registered.
        """
        value = getattr(self, field)
        if value is None:
            raise TypeError(f"the objective reads {field!r}: register it with the matching name in needs.")
        return value

    def need_hidden(self) -> HiddenStates:
        """The hidden states; TypeError as for `need`."""
        if self.hidden is None:
            raise TypeError("the objective reads hidden states: register it with 'hidden' in needs.")
        return self.hidden

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
