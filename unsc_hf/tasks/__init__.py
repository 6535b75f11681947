"""What differs between classifiers and causal language models: labels, targets, and what forgetting is measured by.

Every module in this folder is imported, and a task registers itself with `@register`.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from ..config import UNSCConfig
from ..utils.modules import import_modules
from .base import TASKS, Measure, Task, register

import_modules(__name__, __path__)


def make_task(
    model: PreTrainedModel, args: UNSCConfig, forget: Dataset, retain: Dataset, processing_class: Any
) -> Task:
    """The task of a model, after checking that the data fit it."""
    kind = max((task for task in TASKS if task.accepts(model)), key=lambda task: task.specificity)
    return kind(model, args, forget, retain, processing_class)


__all__ = ["TASKS", "Measure", "Task", "make_task", "register"]
