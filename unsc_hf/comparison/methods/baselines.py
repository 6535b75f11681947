"""Baselines that are one objective of the trainer, without projection."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..workbench import Workbench
from .registry import LEARNING_RATES, method

FINE_TUNE_STEPS = 100


@method("fine-tune on retained", [{"learning_rate": rate} for rate in (1e-4, 3e-4, 1e-3)])
def fine_tune(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """Minimise the loss on retained rows for 100 steps, or until the forget rows are no longer recognised.

    Source: Warnecke et al., arXiv 2108.11577; "FT" in Golatkar et al., arXiv 1911.04933.
    """
    return bench.unlearn(
        null_space="none", objective="fine_tune", lr_doubling_steps=None, max_steps=FINE_TUNE_STEPS, **settings
    )


@method("random label", LEARNING_RATES)
def random_label(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """Minimise the loss of random other labels on the forget rows.

    Source: Graves et al., "Amnesiac Machine Learning", arXiv 2010.10981, section 4.1; Golatkar et al., 1911.04933.
    """
    return bench.unlearn(null_space="none", pseudo_labels="random", **settings)


@method("gradient ascent", LEARNING_RATES)
def gradient_ascent(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """Maximise the loss of the true labels on the forget rows.

    Source: Thudi et al., "Unrolling SGD", arXiv 2109.13398; Graves et al., arXiv 2010.10981.
    """
    return bench.unlearn(null_space="none", objective="gradient_ascent", **settings)


@method("NegGrad+", LEARNING_RATES)
def neggrad_plus(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """Minimise the loss on retained rows minus the loss on forget rows.

    Source: Kurmanji et al., arXiv 2302.09880, section 5.
    """
    return bench.unlearn(null_space="none", objective="gradient_difference", **settings)


@method("SCRUB", LEARNING_RATES)
def scrub(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """Stay near the original's outputs on retained rows and far from them on forget rows; see `objectives.scrub`.

    Source: Kurmanji et al., "Towards Unbounded Machine Unlearning", arXiv 2302.09880, equation 3.
    """
    return bench.unlearn(null_space="none", objective="scrub", **settings)
