"""NegGrad+: ascent on the forget rows and descent on retained ones (Kurmanji et al., arXiv 2302.09880, section 5)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..workbench import Workbench
from .registry import LEARNING_RATES, method


@method("NegGrad+", LEARNING_RATES)
def neggrad_plus(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """Minimise the loss on retained rows minus the loss on forget rows, without projection."""
    return bench.unlearn(null_space="none", objective="gradient_difference", **settings)
