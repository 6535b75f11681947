"""SCRUB (Kurmanji et al., "Towards Unbounded Machine Unlearning", arXiv 2302.09880, equation 3)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..workbench import Workbench
from .registry import LEARNING_RATES, method


@method("SCRUB", LEARNING_RATES)
def scrub(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """Stay near the original's outputs on retained rows and far from them on forget rows; see `objectives.scrub`."""
    return bench.unlearn(null_space="none", objective="scrub", **settings)
