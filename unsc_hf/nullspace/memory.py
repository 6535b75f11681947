"""What fits into a memory limit: which layers' moments are summed whole, which are sketched, and in how many passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import UNSCError
from ..models.layers import ProtectedLayer
from ..utils.sizes import _NUMBER, _UNITS, format_size
from .moments import BLOCK, rows_at_once

_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


_LEAST_COLUMNS = 16  # of a sketch that is worth the name


_MATRICES = 6  # of the sketch's size that its decomposition holds at once


_COPIES = (
    3  # of activation rows in float64, at most: the chosen ones, their float64, and a sketch's transform of a part
)


def whole_bytes(groups: int, width: int) -> int:
    """Bytes of a second moment."""
    return _NUMBER * groups * width * width


def scratch_bytes(groups: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that come and go while rows are summed: the rows themselves, and blocks of float32 products."""
    full = groups * width
    products = 0 if dtype == torch.float64 else 2 * _NUMBER * full * min(BLOCK if groups == 1 else width, width)
    return _COPIES * _NUMBER * rows_at_once(full) * full + products


@dataclass(frozen=True)
class MemoryPlan:
    """How moments are collected under a limit.

    Attributes:
        columns: of the sketch, by name of each layer whose moment is sketched.
        passes: layers that are read in each pass over the data; every layer is in one.
        results: bytes of what one group's moments take when all passes are done.
        scratch: bytes that come and go while rows are added.
        peak: bytes of the largest pass, what comes and goes included.
    """

    columns: dict[str, int]
    passes: tuple[tuple[ProtectedLayer, ...], ...]
    results: int
    scratch: int
    peak: int


def sketch_columns(limit: int, width: int, scratch: int) -> int:
    """Columns of a sketch under a limit: as many as fit beside the rows in work and leave the sketch's decomposition, which holds
    six matrices of its size, within the limit; at most half the width, and at least 16."""
    fitting = min(limit // (_MATRICES * _NUMBER * width), (limit - scratch) // (_NUMBER * width))
    return max(_LEAST_COLUMNS, min(width // 2, fitting))


def plan_memory(
    layers: Sequence[ProtectedLayer],
    limit: int | None,
    sketch_size: int | None = None,
    layout: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float64,
) -> MemoryPlan:
    """Sketched are the layers whose whole moment alone, with the rows in work, exceeds the limit; see `sketch_columns` for
    how many columns a sketch has. What does not fit together is read in several passes, the largest layers first.

    Args:
        layers: with inputs of their own.
        limit: bytes, or None for one pass of whole moments.
        sketch_size: columns of every sketch, instead.
        layout: columns by name of exactly the layers that are sketched, instead; sums of another run are met so.
        dtype: in which rows are multiplied.

    Raises:
        UNSCError: a limit below what the neediest layer needs, which is named.
    """
    columns: dict[str, int] = dict(layout or {})
    needs: dict[str, int] = {}
    too_much: dict[int, str] = {}
    for layer in layers:
        groups, width = layer.geometry.groups, layer.geometry.width
        scratch = scratch_bytes(groups, width, dtype)
        too_large = limit is not None and whole_bytes(groups, width) + scratch > limit
        if layout is None and limit is not None and too_large and groups == 1:
            columns[layer.name] = min(sketch_size or sketch_columns(limit, width, scratch), width)
        size = columns.get(layer.name)
        needs[layer.name] = whole_bytes(groups, width) if size is None else _NUMBER * width * size
        if limit is not None and needs[layer.name] + scratch > limit:
            what = "its moment" if size is None else f"a sketch of {size} columns"
            too_much[needs[layer.name] + scratch] = f"layer {layer.name!r}, {width} wide: {what}"
    if limit is not None and too_much:
        most = max(too_much)
        raise UNSCError(
            f"max_statistics_memory: {format_size(limit)} cannot hold {too_much[most]} needs {format_size(most)}; raise it."
        )

    def work(members: Sequence[ProtectedLayer]) -> int:
        return max(scratch_bytes(layer.geometry.groups, layer.geometry.width, dtype) for layer in members)

    def peak(members: Sequence[ProtectedLayer]) -> int:
        return sum(needs[layer.name] for layer in members) + work(members)

    passes: list[list[ProtectedLayer]] = []
    for layer in sorted(layers, key=lambda layer: -needs[layer.name]):
        room = (members for members in passes if limit is None or peak([*members, layer]) <= limit)
        found = next(room, None)
        if found is None:
            passes.append([layer])
        else:
            found.append(layer)
    return MemoryPlan(
        columns, tuple(map(tuple, passes)), sum(needs.values()), work(layers), max(peak(members) for members in passes)
    )
