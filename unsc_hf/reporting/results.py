"""What `results.json` holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..config import UNSCConfig

_OPTIONS_IN_CARD = (
    "subspace_rule", "energy", "subspace_rank", "subspace_ratio", "subspace_merge", "target_modules", "pseudo_labels",
    "pseudo_label_temperature", "objective", "retain_weight", "retain_dropout", "retain_mixing",
    "feature_erasure", "target_forget_accuracy", "max_leak", "check_steps", "max_rows_per_class",
    "max_samples_per_class", "max_statistics_memory", "optim", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "seed",
)  # fmt: skip


def options_of(config: UNSCConfig, more: Sequence[str] = ()) -> dict[str, Any]:
    """Options that belong in a card; enum members as their values."""
    values = {name: getattr(config, name) for name in (*_OPTIONS_IN_CARD, *more)}
    return {name: getattr(value, "value", value) for name, value in values.items()}


def finite(value: Any) -> Any:
    """The same structure with NaN and infinity as null: JSON has neither."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
