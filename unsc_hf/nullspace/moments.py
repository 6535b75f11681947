"""Sums over activation rows x: the second moment C = sum of x x^T, and the interface it shares with what stands for it
where (width, width) numbers do not fit (see `sketch`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UNSCError

BLOCK = 256  # columns of a moment that are summed at once; the blocks below the diagonal are copied, not multiplied


_ROW_ELEMENTS = 2**23  # numbers in the rows that are multiplied at once ...


_LEAST_ROWS = 512  # ... and the fewest such rows: below, a product costs more than its arithmetic


AnyMoment = TypeVar("AnyMoment", bound="Moment")


def rows_at_once(width: int) -> int:
    """Rows of this width that are multiplied at once: they take no more memory than their moment, and at most 64 MiB."""
    return max(_LEAST_ROWS, min(width, _ROW_ELEMENTS // width))


class Measurable(Protocol):
    """Sums over rows that tell what a matrix does to them; all that a leak needs."""

    rows: int

    def energy(self, matrix: Tensor) -> float:
        """tr(M C M^T): summed squared norm of the outputs `M x` over the rows; M has shape (groups, out, width)."""
        ...


class Moment(ABC):
    """What is summed over activation rows: grows by `update`, adds up over classes and processes, and can be taken out again.

    Attributes:
        rows: number of rows summed (per group).
    """

    rows: int

    @abstractmethod
    def update(self: AnyMoment, rows: Tensor, dtype: torch.dtype = torch.float64) -> AnyMoment:
        """Add rows of shape (groups, n, width); returns self."""

    @abstractmethod
    def clone(self: AnyMoment) -> AnyMoment:
        """A copy that shares no memory."""

    @abstractmethod
    def add_(self: AnyMoment, other: Moment, sign: int = 1) -> AnyMoment:
        """Add (or take out, with `sign` -1) in place; returns self."""

    @abstractmethod
    def energy(self, matrix: Tensor) -> float:
        """tr(M C M^T): summed squared norm of the outputs `M x` over the rows; M has shape (groups, out, width)."""

    @abstractmethod
    def all_reduce(self) -> None:
        """Sum over the processes of `torch.distributed`, in place."""

    @abstractmethod
    def is_finite(self) -> bool:
        """False when a row held NaN or infinity."""

    @abstractmethod
    def to(self: AnyMoment, device: torch.device | str) -> AnyMoment:
        """The same sums on a device."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the sums are."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Numbers in a row."""

    def __add__(self: AnyMoment, other: Moment) -> AnyMoment:
        return self.clone().add_(other)

    def __sub__(self: AnyMoment, other: Moment) -> AnyMoment:
        return self.clone().add_(other, -1)


def all_reduce_count(count: int, device: torch.device) -> int:
    """Sum of a number over processes."""
    total = torch.tensor(count, device=device)
    dist.all_reduce(total)
    return int(total)


@dataclass
class SecondMoment(Moment):
    """Sum of x x^T over activation rows x.

    Attributes:
        matrix: float64, shape (groups, width, width); groups is 1 except for grouped convolutions.
        rows: number of rows summed (per group).
    """

    matrix: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, groups: int, width: int, device: torch.device | str = "cpu") -> SecondMoment:
        return cls(torch.zeros(groups, width, width, dtype=torch.float64, device=device))

    def update(self, rows: Tensor, dtype: torch.dtype = torch.float64) -> SecondMoment:
        """Add rows of shape (groups, n, width), multiplied in `dtype` and summed in float64; returns self.

        Nothing of the moment's size is made on the way: float64 products are summed where they belong, float32 ones by blocks.
        """
        groups, count, width = rows.shape
        for part in torch.split(rows, rows_at_once(groups * width), dim=1):
            x = part.to(dtype)
            if groups == 1:
                self._add_blocks(x[0])
            elif dtype == torch.float64:
                self.matrix.baddbmm_(x.mT, x)
            else:
                self.matrix += x.mT @ x
        self.rows += count
        return self

    def _add_blocks(self, x: Tensor) -> None:
        """Rows (n, width), multiplied for the blocks on and above the diagonal only: the matrix is symmetric."""
        matrix, width = self.matrix[0], self.matrix.shape[-1]
        for first in range(0, width, BLOCK):
            last = min(first + BLOCK, width)
            block, left, right = matrix[first:last, first:], x[:, first:last].mT, x[:, first:]
            if x.dtype == torch.float64:
                block.addmm_(left, right)
            else:
                block += left @ right
            if last < width:
                matrix[last:, first:last] = matrix[first:last, last:].mT

    @property
    def width(self) -> int:
        return self.matrix.shape[-1]

    def clone(self) -> SecondMoment:
        return SecondMoment(self.matrix.clone(), self.rows)

    def add_(self, other: Moment, sign: int = 1) -> SecondMoment:
        """Raises UNSCError: `other` is a sketch, or of another width."""
        if not isinstance(other, SecondMoment) or other.matrix.shape != self.matrix.shape:
            raise UNSCError(
                "statistics: a layer's moments are whole in one and sketched or of another width in the other; collect both with the "
                "same max_statistics_memory and sketch_size."
            )
        self.matrix.add_(other.matrix, alpha=sign)
        self.rows += sign * other.rows
        return self

    def energy(self, matrix: Tensor) -> float:
        matrix = matrix.double()
        return float(((matrix @ self.matrix.to(matrix.device)) * matrix).sum().clamp_min(0))

    def all_reduce(self) -> None:
        dist.all_reduce(self.matrix)
        self.rows = all_reduce_count(self.rows, self.matrix.device)

    def is_finite(self) -> bool:
        """A square that is not finite shows on the diagonal."""
        return bool(torch.isfinite(self.matrix.diagonal(dim1=-2, dim2=-1)).all())

    def to(self, device: torch.device | str) -> SecondMoment:
        return SecondMoment(self.matrix.to(device), self.rows)

    @property
    def device(self) -> torch.device:
        return self.matrix.device


def total_moment(moments: Iterable[AnyMoment]) -> AnyMoment:
    """Sum of several moments of one kind (at least one), without touching them."""
    items = list(moments)
    if not items:
        raise UNSCError("moments: nothing to sum; keep at least one class.")
    total = items[0].clone()
    for item in items[1:]:
        total.add_(item)
    return total
