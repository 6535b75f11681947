"""Fisher forgetting (Golatkar et al., "Eternal Sunshine of the Spotless Net", CVPR 2020, arXiv 1911.04933, eq. 9)."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..workbench import Workbench
from .registry import method

ROWS = 512  # retained rows that the Fisher information is measured on
LEAST = 1e-4  # of the mean: below it the information of a weight is no more than rounding


@method("Fisher forgetting", [{"scale": scale} for scale in (0.4, 0.8, 1.6)])
def fisher(bench: Workbench, scale: float) -> PreTrainedModel:
    """Add noise of standard deviation proportional to F^(-1/4), F the Fisher information of retained rows.

    It is largest where retained rows do not depend on a weight. `scale` is (lambda sigma^2)^(1/4) of the paper in units
    that fit any model: with F at its mean in a layer, the noise has `scale` times the root mean square of its weights.
    """
    model = bench.fresh()
    information = bench.gradients(model, bench.retain, ROWS, batch_size=8, squared=True)
    generator = torch.Generator().manual_seed(int(bench.config.seed))
    with torch.no_grad():
        for layer in bench.layers(model):
            of_layer = information[layer.weight_name]
            size = float(layer.weight.square().mean().sqrt())
            spread = scale * size * (of_layer / of_layer.mean()).clamp_min(LEAST) ** -0.25
            noise = torch.randn(layer.weight.shape, generator=generator).to(layer.weight)
            layer.weight.add_(spread * noise)
    return model
