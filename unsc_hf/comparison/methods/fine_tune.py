"""Fine-tuning on retained rows only (Warnecke et al., arXiv 2108.11577; "FT" in Golatkar et al., arXiv 1911.04933)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..workbench import Workbench
from .registry import method

STEPS = 100


@method("fine-tune on retained", [{"learning_rate": rate} for rate in (1e-4, 3e-4, 1e-3)])
def fine_tune(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """Minimise the loss on retained rows for 100 steps, or until the forget rows are no longer recognised."""
    return bench.unlearn(null_space="none", objective="fine_tune", lr_doubling_steps=None, max_steps=STEPS, **settings)
