"""Selective synaptic dampening (Foster et al., AAAI 2024, arXiv 2308.07707, equations 6 and 7)."""

from __future__ import annotations

import torch
from datasets import concatenate_datasets
from transformers import PreTrainedModel

from ..workbench import Workbench
from .registry import method

ROWS = 1024  # of each side


@method("SSD", [{"alpha": alpha} for alpha in (3.0, 10.0, 30.0)])
def ssd(bench: Workbench, alpha: float) -> PreTrainedModel:
    """Shrink weights that matter more than alpha times as much for forget rows as for all, in that proportion."""
    model = bench.fresh()
    every = concatenate_datasets([bench.forget, bench.retain])
    forget, everything = (
        bench.gradients(model, rows, ROWS, batch_size=8, squared=True) for rows in (bench.forget, every)
    )
    with torch.no_grad():
        for layer in bench.layers(model):
            theirs, all_rows = forget[layer.weight_name], everything[layer.weight_name]
            factor = (all_rows / theirs.clamp_min(1e-30)).clamp(max=1.0)
            layer.weight.copy_(torch.where(theirs > alpha * all_rows, layer.weight * factor, layer.weight))
    return model
