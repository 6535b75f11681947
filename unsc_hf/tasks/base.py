"""What every task measures."""

from __future__ import annotations

from dataclasses import dataclass, replace

from peft import PeftModel
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the model predicts next tokens."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return type(base).__name__ in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


@dataclass(frozen=True)
class Measure:
    """Forgetting or keeping on some rows, against the true labels.

    Attributes:
        accuracy, loss: means.
        losses: of each row of a classifier, (rows,).
    """

    accuracy: float
    loss: float
    losses: Tensor | None = None

    def in_order(self) -> Measure:
        """With its losses sorted."""
        return self if self.losses is None else replace(self, losses=self.losses.sort().values)
