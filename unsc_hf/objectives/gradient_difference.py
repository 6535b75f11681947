"""Gradient difference: ascent on the forget rows, descent on retained ones (Liu et al., "Continual Learning and Private
Unlearning", arXiv 2203.12817; TOFU, arXiv 2401.06121, section 3.4)."""

from __future__ import annotations

from torch import Tensor

from .terms import Terms


def gradient_difference(terms: Terms) -> Tensor:
    """Weighted loss on retained rows minus the loss on forget rows."""
    assert terms.retain_loss is not None
    return terms.retain_weight * terms.retain_loss - terms.loss()
