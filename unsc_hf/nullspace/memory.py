"""What fits into a memory limit: which layers' moments are summed in which pass over the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..errors import UNSCError
from ..models.layers import ProtectedLayer
from ..utils.sizes import format_size
from .moments import BLOCK, rows_at_once

_NUMBER = 8  # Bytes of a float64.
_COPIES = 3  # Of the rows at work, each counted as float64: as they come, those that are chosen, and these in float64.


def moment_bytes(layer: ProtectedLayer) -> int:
    """Bytes of the second moment of a layer's input."""
    return _NUMBER * layer.geometry.groups * layer.geometry.width**2


def scratch_bytes(layer: ProtectedLayer, dtype: torch.dtype) -> int:
    """Bytes that are used for a while when rows are added: the rows themselves, and blocks of float32 products."""
    groups, width = layer.geometry.groups, layer.geometry.width
    full = groups * width
    products = 0 if dtype == torch.float64 else 2 * _NUMBER * full * min(BLOCK if groups == 1 else width, width)
    return _COPIES * _NUMBER * rows_at_once(full) * full + products


class MemoryPlan(NamedTuple):
    """How moments are collected under a limit.

    Attributes:
        passes: layers that are read in each pass over the data; every layer is in one.
        results: bytes of one group's moments when all passes are done.
        peak: bytes of the largest pass, with those that are used for a while when rows are added.
    """

    passes: list[list[ProtectedLayer]]
    results: int
    peak: int


def plan_memory(layers: Sequence[ProtectedLayer], limit: int | None, dtype: torch.dtype = torch.float64) -> MemoryPlan:
    """Put each layer into the first pass that has space left, the largest layers first.

    Args:
        layers: with inputs of their own.
        limit: bytes, or None for one pass.
        dtype: in which rows are multiplied.

    Raises:
        UNSCError: one layer's moment alone exceeds the limit; the layer that needs most is named.
    """

    def peak(members: Sequence[ProtectedLayer]) -> int:
        return sum(map(moment_bytes, members)) + max(scratch_bytes(layer, dtype) for layer in members)

    neediest = max(layers, key=lambda layer: peak([layer]))
    if limit is not None and peak([neediest]) > limit:
        raise UNSCError(
            f"max_statistics_memory: {format_size(limit)} is too small: the moment of layer {neediest.name!r}, "
            f"{neediest.geometry.width} wide, needs {format_size(peak([neediest]))}; raise it, or leave the layer out "
            "with target_modules."
        )
    passes: list[list[ProtectedLayer]] = []
    for layer in sorted(layers, key=lambda layer: -moment_bytes(layer)):
        for members in passes:
            if limit is None or peak([*members, layer]) <= limit:
                members.append(layer)
                break
        else:
            passes.append([layer])
    return MemoryPlan(passes, sum(map(moment_bytes, layers)), max(map(peak, passes)))
