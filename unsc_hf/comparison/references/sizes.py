"""Models with random weights, in named sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from ...errors import UNSCError


@dataclass(frozen=True)
class ModelSize:
    """Depth, width and attention heads of a transformer whose MLPs are four times as wide."""

    layers: int
    width: int
    heads: int


SIZES: dict[Any, dict[str, ModelSize]] = {
    ViTConfig: {
        "nano": ModelSize(3, 64, 4), "tiny": ModelSize(4, 128, 4), "small": ModelSize(6, 192, 6),
        "medium": ModelSize(12, 384, 6), "base": ModelSize(12, 768, 12),
    },
    BertConfig: {
        "nano": ModelSize(2, 64, 2), "tiny": ModelSize(2, 128, 2), "mini": ModelSize(4, 256, 4),
        "small": ModelSize(4, 512, 8), "medium": ModelSize(8, 512, 8), "base": ModelSize(12, 768, 12),
    },
    LlamaConfig: {
        "nano": ModelSize(2, 128, 4), "tiny": ModelSize(4, 256, 4), "small": ModelSize(6, 384, 6),
        "medium": ModelSize(12, 768, 12),
    },
}  # fmt: skip

_MODELS: dict[Any, Any] = {
    ViTConfig: ViTForImageClassification,
    BertConfig: BertForSequenceClassification,
    LlamaConfig: LlamaForCausalLM,
}


def from_scratch(config_class: Any, size: str | None, labels: Sequence[str] = (), **settings: Any) -> PreTrainedModel:
    """A model with random weights.

    Args:
        config_class: one of `SIZES`.
        size: name of one of its sizes.
        labels: names of all classes by id, for a classifier.
        settings: further fields of the config.

    Raises:
        UNSCError: unknown size.
    """
    sizes = SIZES[config_class]
    if size not in sizes:
        raise UNSCError(f"model_size: {size!r} does not exist; choose from {', '.join(sizes)}.")
    shape = sizes[size]
    if labels:
        settings |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {label: i for i, label in enumerate(labels)},
        }
    config = config_class(
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        **settings,
    )
    model: PreTrainedModel = _MODELS[config_class](config)
    return model
