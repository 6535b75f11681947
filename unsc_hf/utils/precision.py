"""Full float32 where something is measured or projected, whatever precision is set elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 or bfloat16 in float32 products and convolutions: their rounding would fill the null space.

    On a GPU convolutions use TF32 by default, and products do so after `tf32=True` or
    `torch.set_float32_matmul_precision`. All settings are restored after the block.
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
            operator.fp32_precision = "none"  # follow the general setting
            if operator.fp32_precision != precision:
                operator.fp32_precision = precision


def _operators() -> list[Any]:
    """Operators with a precision setting of their own; none before torch 2.9, which had only the old switches."""
    if not hasattr(torch.backends, "fp32_precision"):
        return []
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return [backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


def _old_switches() -> tuple[str | None, bool | None]:
    """The old switches of products and convolutions; None where an operator's own setting makes them unreadable."""
    try:
        products: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        products = None
    try:
        convolutions: bool | None = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        convolutions = None
    return products, convolutions
