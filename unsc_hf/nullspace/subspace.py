"""What is kept of each layer input and what is left free; `rules.build_subspace` makes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerSubspace:
    """Retained subspace and null space of one layer input.

    Attributes:
        basis: orthonormal eigenvectors of the retained moment, float64, shape (groups, width, width), descending. For
            group g the first `ranks[g]` columns span what is kept; the others are free.
        ranks: columns kept, one number per group.
        null_energy: share of the retained energy that lies in the null space (0 at energy 1.0, up to rounding).
        forget_null_energy: share of the forgotten rows' energy that lies in the null space, or None if unknown.
        next_energy: energy at which one direction would become free, when there is no capacity.
    """

    basis: Tensor
    ranks: tuple[int, ...]
    null_energy: float
    forget_null_energy: float | None
    next_energy: float

    @property
    def width(self) -> int:
        """Numbers in a row of the input."""
        return self.basis.shape[-2]

    @property
    def rank(self) -> float:
        """Mean rank over groups (an integer except for grouped convolutions)."""
        return sum(self.ranks) / len(self.ranks)

    @property
    def capacity(self) -> float:
        """Mean number of free directions over groups."""
        return self.width - self.rank

    @property
    def has_capacity(self) -> bool:
        """Whether any direction is free."""
        return any(rank < self.width for rank in self.ranks)


@dataclass(frozen=True)
class LayerReport:
    """One row of the report: layer, width, rank, capacity, and the shares of energy that lie in the null space."""

    layer: str
    width: int
    rank: float
    capacity: float
    retain_null_energy: float
    forget_null_energy: float | None


@dataclass(frozen=True)
class Subspace:
    """Subspaces of all layers: `layers[key]`, with `module_keys` from module name to key."""

    layers: dict[str, LayerSubspace]
    module_keys: dict[str, str]

    def __getitem__(self, module_name: str) -> LayerSubspace:
        return self.layers[self.module_keys[module_name]]

    def without_bases(self) -> Subspace:
        """The same ranks and energies without the matrices, for reports after projectors have been made."""
        layers = {key: replace(layer, basis=layer.basis[..., :0].clone()) for key, layer in self.layers.items()}
        return replace(self, layers=layers)

    def randomised(self, seed: int) -> Subspace:
        """Control: random subspaces of the same ranks (Haar measure), with the energies of a random direction."""
        generator = torch.Generator().manual_seed(seed)
        layers = {}
        for key, layer in self.layers.items():
            basis, _ = torch.linalg.qr(torch.randn(layer.basis.shape, generator=generator, dtype=layer.basis.dtype))
            share = layer.capacity / layer.width
            layers[key] = replace(layer, basis=basis, null_energy=share, forget_null_energy=share)
        return replace(self, layers=layers)

    def report(self) -> list[LayerReport]:
        """Rank, capacity and energies in the null space, for each module."""
        return [
            LayerReport(name, space.width, space.rank, space.capacity, space.null_energy, space.forget_null_energy)
            for name, space in ((name, self.layers[key]) for name, key in self.module_keys.items())
        ]

    def __str__(self) -> str:
        lines = [
            f"{'layer':<48} {'width':>6} {'rank':>7} {'free':>7} "
            f"{'retained energy free':>21} {'forgotten energy free':>22}"
        ]
        for row in self.report():
            forgotten = "" if row.forget_null_energy is None else f"{row.forget_null_energy:.4f}"
            lines.append(
                f"{row.layer:<48} {row.width:>6} {row.rank:>7.4g} {row.capacity:>7.4g} "
                f"{row.retain_null_energy:>21.2e} {forgotten:>22}"
            )
        return "\n".join(lines)
