"""What differs between classifiers and causal language models: labels, targets, and what forgetting is measured by.

For a language model every answer token is a position of its own, with the next token as its label: pseudo-labels,
accuracy and loss are then those of a classifier over the vocabulary.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from ..config import UNSCConfig
from .base import is_causal_lm
from .causal_lm import CausalLMTask
from .classification import ClassificationTask

Task = ClassificationTask | CausalLMTask


def make_task(
    model: PreTrainedModel, args: UNSCConfig, forget: Dataset, retain: Dataset, processing_class: Any
) -> Task:
    """The task of a model, after checking that the data fit it."""
    kind = CausalLMTask if is_causal_lm(model) else ClassificationTask
    return kind(model, args, forget, retain, processing_class)
