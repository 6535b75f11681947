"""Full precision where something is measured or projected, whatever the process computes in otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 or bfloat16 in float32 products and convolutions inside the block: their rounding would fill the null space.

    Convolutions on a GPU are in TF32 unless told otherwise; products where `tf32=True` or
    `torch.set_float32_matmul_precision` asked for it. Everything is restored afterwards.
    """
    operators = _operators()
    before = [operator.fp32_precision for operator in operators]
    products, convolutions = _old_switches()
    try:
        if products is not None:
            torch.set_float32_matmul_precision("highest")
        if convolutions is not None:
            torch.backends.cudnn.allow_tf32 = False
        for operator in operators:
            operator.fp32_precision = "ieee"
        yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        if convolutions is not None:
            torch.backends.cudnn.allow_tf32 = convolutions
        for operator, precision in zip(operators, before, strict=True):
            operator.fp32_precision = "none"  # as the general setting says
            if operator.fp32_precision != precision:
                operator.fp32_precision = precision


def _operators() -> list[Any]:
    """What has a precision of its own; none before torch 2.9, which knew the old switches alone."""
    if not hasattr(torch.backends, "fp32_precision"):
        return []
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return [backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


def _old_switches() -> tuple[str | None, bool | None]:
    """Those of products and convolutions; None where they cannot be read, since the operators' own were set to something else."""
    try:
        products: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        products = None
    try:
        convolutions: bool | None = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        convolutions = None
    return products, convolutions
