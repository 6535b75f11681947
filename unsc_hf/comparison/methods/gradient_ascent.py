"""Gradient ascent on the forget rows (Thudi et al., "Unrolling SGD", arXiv 2109.13398; Graves et al., arXiv 2010.10981)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..workbench import Workbench
from .registry import LEARNING_RATES, method


@method("gradient ascent", LEARNING_RATES)
def gradient_ascent(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """Maximise the loss of the true labels on the forget rows, without projection."""
    return bench.unlearn(null_space="none", objective="gradient_ascent", **settings)
