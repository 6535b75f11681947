"""SalUn (Fan et al., ICLR 2024, arXiv 2310.12508, equations 3 to 5): random labels on the weights that are salient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from ..workbench import Workbench
from .registry import LEARNING_RATES, PUBLISHED, method

ROWS = 1024
SHARE = 0.5  # of the weights are salient, as in the paper


class GradientMask(TrainerCallback):
    """Zeroes the gradients of weights outside a mask before every optimiser step."""

    def __init__(self, masks: dict[str, Tensor]) -> None:
        self.masks = masks

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and name in self.masks:
                parameter.grad.mul_(self.masks[name])


@method("SalUn", LEARNING_RATES)
def salun(bench: Workbench, **settings: Any) -> PreTrainedModel:
    """Train the half of the weights that matter most for forgetting: random labels, and the loss on retained rows."""
    gradient = bench.gradients(bench.fresh(), bench.forget, ROWS, batch_size=128)
    saliency = {name: value.abs() for name, value in gradient.items()}
    values = torch.cat([value.flatten() for value in saliency.values()])
    threshold = values.kthvalue(max(1, int((1 - SHARE) * len(values)))).values
    mask = GradientMask({name: value > threshold for name, value in saliency.items()})
    return bench.unlearn(pseudo_labels="random", objective="unsc_retain", callbacks=[mask], **PUBLISHED, **settings)
