"""Quantisation: rounding the weights can bring forgotten knowledge back (Zhang et al., ICLR 2025, arXiv 2410.16454)."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor

from ...models.layers import row_geometry
from ..accuracy import macro_accuracy
from .registry import Examination, Reading, audit
from .training import forgotten_rows


@audit("AccDut at 4 bits", headline="int4")
def quantisation(exam: Examination) -> Reading:
    """`int8`, `int4`: test accuracy on the forgotten classes after rounding to that many bits. Every linear and
    convolution weight is rounded to the nearest value, symmetrically, with one scale for each output channel."""
    rows = forgotten_rows(exam)
    reading: Reading = {}
    for bits in (8, 4):
        model = deepcopy(exam.model)
        with torch.no_grad():
            for module in model.modules():
                if row_geometry(module) is not None:
                    module.weight.copy_(rounded(module.weight, bits))
        seen = exam.collect(model, rows)
        reading[f"int{bits}"] = macro_accuracy(seen.logits, seen.labels, exam.forgotten) or 0.0
    return reading


def rounded(weight: Tensor, bits: int) -> Tensor:
    """Nearest representable values of a weight whose first dimension is the output."""
    largest = 2 ** (bits - 1) - 1
    scale = weight.flatten(1).abs().amax(1).clamp_min(1e-12) / largest
    scale = scale.reshape(-1, *[1] * (weight.dim() - 1))
    return (weight / scale).round().clamp(-largest, largest) * scale
