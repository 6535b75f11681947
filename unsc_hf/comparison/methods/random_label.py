"""Random labels: train on the forget rows with labels drawn at random (Graves et al., "Amnesiac Machine Learning", arXiv
2010.10981, section 4.1; Golatkar et al., arXiv 1911.04933)."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..workbench import Workbench
from .registry import LEARNING_RATES, method


@method("random label", LEARNING_RATES)
def random_label(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """Minimise the loss of random other labels on the forget rows, without projection."""
    return bench.unlearn(null_space="none", pseudo_labels="random", **settings)
