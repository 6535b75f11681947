"""Second moments of activation rows x: sums of x x^T, which add up over batches, classes and processes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UNSCError

BLOCK = 256  # Columns of a moment that are summed at once. Blocks below the diagonal are copied, not multiplied.
_ROW_ELEMENTS = 2**23  # Numbers in the rows that are multiplied at once ...
_LEAST_ROWS = 512  # ... and the fewest such rows: with fewer, starting a product costs more than its arithmetic.


def rows_at_once(width: int) -> int:
    """Rows of this width that are multiplied at once: at most as large as their moment, and at most 64 MiB."""
    return max(_LEAST_ROWS, min(width, _ROW_ELEMENTS // width))


@dataclass
class SecondMoment:
    """Sum of x x^T over activation rows x, uncentred.

    Attributes:
        matrix: float64, shape (groups, width, width); groups is 1 except for grouped convolutions.
        rows: number of rows summed (per group).
    """

    matrix: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, groups: int, width: int, device: torch.device | str = "cpu") -> SecondMoment:
        return cls(torch.zeros(groups, width, width, dtype=torch.float64, device=device))

    @property
    def width(self) -> int:
        return self.matrix.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def update(self, rows: Tensor, dtype: torch.dtype = torch.float64) -> SecondMoment:
        """Add rows of shape (groups, n, width), multiplied in `dtype` and summed in float64; returns self.

        No temporary has the moment's size: float64 products are summed in place, float32 products block by block.
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
        """Add rows (n, width). Only blocks on and above the diagonal are multiplied: the matrix is symmetric."""
        matrix, width = self.matrix[0], self.width
        for first in range(0, width, BLOCK):
            last = min(first + BLOCK, width)
            block, left, right = matrix[first:last, first:], x[:, first:last].mT, x[:, first:]
            if x.dtype == torch.float64:
                block.addmm_(left, right)
            else:
                block += left @ right
            if last < width:
                matrix[last:, first:last] = matrix[first:last, last:].mT

    def same_as(self, other: SecondMoment) -> bool:
        """Whether both are of the same rows, to rounding."""
        if self.rows != other.rows or self.matrix.shape != other.matrix.shape:
            return False
        return bool((self.matrix - other.matrix).norm() <= 1e-6 * self.matrix.norm())

    def add_(self, other: SecondMoment, sign: int = 1) -> SecondMoment:
        """Add another moment in place (with `sign` -1 take it out); returns self.

        Raises:
            UNSCError: `other` has another width.
        """
        if other.matrix.shape != self.matrix.shape:
            raise UNSCError(
                f"statistics: a layer's input is {other.width} wide in one and {self.width} in the other; "
                "collect both on the same model."
            )
        self.matrix.add_(other.matrix, alpha=sign)
        self.rows += sign * other.rows
        return self

    def clone(self) -> SecondMoment:
        return SecondMoment(self.matrix.clone(), self.rows)

    def to(self, device: torch.device | str) -> SecondMoment:
        return SecondMoment(self.matrix.to(device), self.rows)

    def energy(self, matrix: Tensor) -> float:
        """tr(M C M^T): summed squared norm of the outputs `M x` over the rows; M has shape (groups, out, width)."""
        matrix = matrix.double()
        return float(((matrix @ self.matrix.to(matrix.device)) * matrix).sum().clamp_min(0))

    def all_reduce(self) -> None:
        """Sum over the processes of `torch.distributed`, in place."""
        dist.all_reduce(self.matrix)
        rows = torch.tensor(self.rows, device=self.device)
        dist.all_reduce(rows)
        self.rows = int(rows)

    def is_finite(self) -> bool:
        """False when a row held NaN or infinity: its square is then on the diagonal."""
        return bool(torch.isfinite(self.matrix.diagonal(dim1=-2, dim2=-1)).all())


def total_moment(moments: Iterable[SecondMoment]) -> SecondMoment:
    """Sum of moments, which stay as they are.

    Raises:
        UNSCError: there are none.
    """
    items = list(moments)
    if not items:
        raise UNSCError("moments: nothing to sum; keep at least one class.")
    total = items[0].clone()
    for item in items[1:]:
        total.add_(item)
    return total
