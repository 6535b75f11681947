"""What stands for a second moment C that does not fit: a linear sketch with an exact error bound, or a sample of the rows.

The sketch is Y = C Omega for a random orthonormal Omega of few columns. Y is linear in C, so sketches add, subtract and merge
as moments do. The Nystroem approximation C^ = Y (Omega^T Y)^+ Y^T lies between 0 and C, so that what it misses is known
exactly from the trace of C, which is kept beside: the nuclear norm of C - C^ is tr(C) - tr(C^), and u^T C u is at most that
much above u^T C^ u for any unit vector u.

Sources: Tropp, Yurtsever, Udell and Cevher, "Fixed-rank approximation of a positive-semidefinite matrix from streaming data",
NeurIPS 2017 (algorithm 3); Halko, Martinsson and Tropp, "Finding structure with randomness", SIAM Review 2011 (sections 4.6 and
11: test matrices from subsampled trigonometric transforms, and what to expect of the error beforehand).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UNSCError
from .moments import Moment, all_reduce_count, rows_at_once

SEED = 0


_TRANSFORMED = 64  # rows transformed at once: a transform needs four times their memory


_SHIFTS = 12  # attempts, each with a ten times larger shift, to make a sketch positive definite


@dataclass(frozen=True)
class RandomTransform:
    """Omega = D H R, shape (width, size): random signs D, the Hartley transform H, and a random choice R of its columns.

    Its columns are orthonormal, multiplying by it costs a fast Fourier transform, and it is made again from (seed, width, size)
    on any machine: the random bits are those of numpy's PCG64, whose stream is fixed for good.

    Attributes:
        signs: (width,), 1 or -1.
        frequencies: (size,), chosen columns of H.
    """

    signs: Tensor
    frequencies: Tensor

    @classmethod
    def make(cls, width: int, size: int, seed: int, device: torch.device | str = "cpu") -> RandomTransform:
        bits = np.random.PCG64(seed).random_raw(2 * width)
        signs = 1.0 - 2.0 * (bits[:width] >> np.uint64(63)).astype(np.float64)
        chosen = np.argsort(bits[width:], kind="stable")[:size].astype(np.int64)
        return cls(torch.from_numpy(signs).to(device), torch.from_numpy(chosen).to(device))

    def __call__(self, rows: Tensor) -> Tensor:
        """`rows @ Omega` for float64 rows (n, width), shape (n, size)."""
        width = len(self.signs)
        upper = self.frequencies > width // 2
        index = torch.where(upper, width - self.frequencies, self.frequencies)
        sign = torch.where(upper, 1.0, -1.0).to(rows.dtype)
        found = []
        for part in torch.split(rows, _TRANSFORMED):
            spectrum = torch.fft.rfft(part * self.signs, norm="ortho")[:, index]
            found.append(spectrum.real + sign * spectrum.imag)
        return torch.cat(found)

    def matrix(self) -> Tensor:
        """Omega itself, float64."""
        width = len(self.signs)
        angle = torch.arange(width, dtype=torch.float64, device=self.signs.device) * (2 * math.pi / width)
        values = (angle.cos() + angle.sin()) / math.sqrt(width)
        found = torch.empty(width, len(self.frequencies), dtype=torch.float64, device=self.signs.device)
        for first in range(0, width, _TRANSFORMED):
            places = torch.arange(first, min(first + _TRANSFORMED, width), device=self.signs.device)
            turns = (places[:, None] * self.frequencies[None, :]) % width
            found[places] = values[turns] * self.signs[places, None]
        return found


@dataclass
class MomentSketch(Moment):
    """C Omega and tr(C) for the sum C of x x^T over activation rows x.

    Attributes:
        products: C Omega, float64, shape (1, width, size).
        trace: tr(C), float64, shape (1,).
        rows: number of rows summed.
        seed: of Omega.
    """

    products: Tensor
    trace: Tensor
    rows: int = 0
    seed: int = SEED

    def __post_init__(self) -> None:
        self._transform = RandomTransform.make(self.width, self.size, self.seed, self.products.device)

    @classmethod
    def zeros(cls, width: int, size: int, device: torch.device | str = "cpu", seed: int = SEED) -> MomentSketch:
        products = torch.zeros(1, width, size, dtype=torch.float64, device=device)
        return cls(products, torch.zeros(1, dtype=torch.float64, device=device), 0, seed)

    @property
    def width(self) -> int:
        return self.products.shape[1]

    @property
    def size(self) -> int:
        return self.products.shape[2]

    def update(self, rows: Tensor, dtype: torch.dtype = torch.float64) -> MomentSketch:
        """Add rows of shape (1, n, width); returns self. Products are float64 whatever `dtype` says: rounded ones would void the
        bound, and they are few."""
        for part in torch.split(rows[0], rows_at_once(self.width)):
            x = part.double()
            self.products[0].addmm_(x.mT, self._transform(x))
            self.trace += torch.linalg.vector_norm(x).square()
        self.rows += rows.shape[1]
        return self

    def clone(self) -> MomentSketch:
        return MomentSketch(self.products.clone(), self.trace.clone(), self.rows, self.seed)

    def add_(self, other: Moment, sign: int = 1) -> MomentSketch:
        """Raises UNSCError: `other` is no sketch of this size and seed."""
        if (
            not isinstance(other, MomentSketch)
            or other.products.shape != self.products.shape
            or other.seed != self.seed
        ):
            raise UNSCError(
                f"statistics: a layer's moments are a sketch of {self.size} columns in one and something else in the other; collect "
                "both with the same max_statistics_memory and sketch_size."
            )
        self.products.add_(other.products, alpha=sign)
        self.trace.add_(other.trace, alpha=sign)
        self.rows += sign * other.rows
        return self

    def energy(self, matrix: Tensor) -> float:
        """Raises UNSCError: the null space is just what a sketch misses, so it cannot say what leaks there."""
        raise UNSCError(
            "statistics: a sketch cannot measure a leak; collect the held-out rows with wide_rows=True, which keeps a sample of rows."
        )

    def all_reduce(self) -> None:
        dist.all_reduce(self.products)
        dist.all_reduce(self.trace)
        self.rows = all_reduce_count(self.rows, self.products.device)

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.trace).all())

    def to(self, device: torch.device | str) -> MomentSketch:
        return MomentSketch(self.products.to(device), self.trace.to(device), self.rows, self.seed)

    @property
    def device(self) -> torch.device:
        return self.products.device

    def factor(self) -> tuple[Tensor, float]:
        """E, shape (width, size), and a shift s >= 0 of the order of rounding, with C^ = E E^T - s I on the range of E.

        The shift makes Omega^T Y positive definite (algorithm 3 of the paper). Whatever it is, E E^T is the Nystroem approximation
        of C + s I, so its eigenvalues less s are below C's own, and the bound holds.
        """
        omega, products = self._transform.matrix(), self.products[0]
        shift = math.sqrt(self.width) * torch.finfo(torch.float64).eps * float(products.norm())
        if not shift > 0:
            return torch.zeros_like(products), 0.0
        core = omega.mT @ products
        core = (core + core.mT) / 2
        eye = torch.eye(self.size, dtype=core.dtype, device=core.device)
        for _ in range(_SHIFTS):
            lower, failed = torch.linalg.cholesky_ex(core + shift * eye)
            if not int(failed):
                shifted = omega.mul_(shift).add_(products)
                return torch.linalg.solve_triangular(lower.mT, shifted, upper=True, left=False), shift
            shift *= 10  # the difference of two sketches carries the rounding of both
        raise UNSCError(
            "statistics: a sketch is not one of a second moment (more was taken out of it than was in it); collect it again."
        )

    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (size,) of C^, largest first, and its eigenvectors (width, size)."""
        factor, shift = self.factor()
        vectors, values, _ = torch.linalg.svd(factor, full_matrices=False)
        return (values.square() - shift).clamp_min(0), vectors


@dataclass
class RowSample(Moment):
    """An evenly spread sample of the rows themselves, for what a sketch cannot say: the leak, exact on these rows.

    Attributes:
        sample: float32, shape (capacity, width); the first `kept` rows are filled.
        kept: rows in the sample.
        rows: number of rows that the sample stands for.
    """

    sample: Tensor
    kept: int = 0
    rows: int = 0

    @classmethod
    def zeros(cls, width: int, capacity: int, device: torch.device | str = "cpu") -> RowSample:
        return cls(torch.zeros(capacity, width, dtype=torch.float32, device=device))

    def update(self, rows: Tensor, dtype: torch.dtype = torch.float64) -> RowSample:
        """Keep these rows, of shape (1, n, width), as far as there is room; returns self. Which rows are offered is the caller's
        choice (see `stand_for`)."""
        new = rows[0, : len(self.sample) - self.kept]
        self.sample[self.kept : self.kept + len(new)] = new
        self.kept += len(new)
        self.rows += rows.shape[1]
        return self

    def stand_for(self, passed_over: int) -> None:
        """Say how many rows were passed over where the last ones were chosen."""
        self.rows += passed_over

    @property
    def width(self) -> int:
        return self.sample.shape[-1]

    @property
    def filled(self) -> Tensor:
        return self.sample[: self.kept]

    def clone(self) -> RowSample:
        return RowSample(self.sample.clone(), self.kept, self.rows)

    def add_(self, other: Moment, sign: int = 1) -> RowSample:
        """Raises UNSCError: `other` is no sample, or rows are to be taken out."""
        if not isinstance(other, RowSample) or sign < 0:
            raise UNSCError(
                "statistics: samples of rows can be joined with each other, and nothing can be taken out of them."
            )
        self.sample = torch.cat([self.filled, other.filled])
        self.kept, self.rows = len(self.sample), self.rows + other.rows
        return self

    def energy(self, matrix: Tensor) -> float:
        """Summed squared norm of the outputs over the sample, scaled to the rows that it stands for."""
        matrix = matrix[0].double()
        total = 0.0
        for part in torch.split(self.filled, rows_at_once(matrix.shape[1])):
            total += float((part.to(matrix.device).double() @ matrix.mT).square().sum())
        return total * self.rows / max(self.kept, 1)

    def all_reduce(self) -> None:
        """Every process gets the rows of all."""
        device, world = self.sample.device, dist.get_world_size()
        counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world)]
        dist.all_gather(counts, torch.tensor([self.kept], device=device))
        longest = max(int(count) for count in counts)
        mine = torch.zeros(longest, self.sample.shape[1], dtype=torch.float32, device=device)
        mine[: self.kept] = self.filled
        parts = [torch.zeros_like(mine) for _ in range(world)]
        dist.all_gather(parts, mine)
        self.sample = torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])
        self.kept, self.rows = len(self.sample), all_reduce_count(self.rows, device)

    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.filled).all())

    def to(self, device: torch.device | str) -> RowSample:
        return RowSample(self.filled.to(device), self.kept, self.rows)

    @property
    def device(self) -> torch.device:
        return self.sample.device
