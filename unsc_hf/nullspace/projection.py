"""Keeps weight changes inside the null space of the retained rows, and measures how far outside they are.

No dense (width, width) projector is ever formed: P = I - S S^T = N N^T is applied by the thinner of the two factors.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..models.layers import ProtectedLayer
from ..utils.distributed import add_up, cut_like, gather_like, is_sharded, local, own_rows, summed
from ..utils.precision import full_float32
from .moments import SecondMoment
from .storage import mapped_if_large
from .subspace import LayerSubspace, Subspace

# Longest displacement of a layer, as a share of the norm of its original weights. A change as large as the weights
# themselves is another layer, and what lies behind it amplifies even the rounding of float32.
MOST_CHANGE = 1.0


@dataclass(frozen=True)
class Projector:
    """Right-multiplication by P, for matrices of shape (groups, out, width).

    Attributes:
        factor: orthonormal columns, shape (groups, width, k); zero columns pad groups of smaller rank.
        complement: False when `factor` spans the null space (P = N N^T), True when it spans the retained subspace
            (P = I - S S^T).
    """

    factor: Tensor
    complement: bool

    @classmethod
    def from_subspace(cls, subspace: LayerSubspace) -> Projector:
        """The thinner factor of the two, in float64 as the subspace has it."""
        least, most = min(subspace.ranks), max(subspace.ranks)
        complement = most <= subspace.width - least
        kept = torch.arange(subspace.width) < torch.tensor(subspace.ranks)[:, None, None]
        part = slice(most) if complement else slice(least, None)
        return cls(subspace.basis[..., part].mul(kept[..., part] == complement).contiguous(), complement)

    def to(self, dtype: torch.dtype, device: torch.device) -> Projector:
        return Projector(self.factor.to(dtype=dtype, device=device), self.complement)

    def __call__(self, matrix: Tensor) -> Tensor:
        """`matrix @ P`, shape (groups, out, width), in the cheap order."""
        inside = (matrix @ self.factor) @ self.factor.mT
        return matrix - inside if self.complement else inside


class NullSpaceProjection:
    """Projectors and starting weights of all layers that are trained.

    The starting weights W_0 are copied when the object is made: make it from the original model, before the first step.
    Of weights that are sharded then (FSDP2), each process keeps and projects its own rows.

    Attributes:
        layers: the layers that have capacity; the others are left out.
        identity: whether projection is switched off.
    """

    def __init__(self, layers: Sequence[ProtectedLayer], subspace: Subspace, identity: bool = False) -> None:
        """`identity` switches projection off, for controls; displacement and leak are measured all the same."""
        self.layers = [layer for layer in layers if subspace[layer.name].has_capacity]
        self.identity = identity
        self._keys = {layer.name: subspace.module_keys[layer.name] for layer in self.layers}
        self._exact: dict[str, Projector] = {}  # in float64, by key of the layer's input
        self._projectors: dict[str, Projector] = {}
        self._start: dict[str, Tensor] = {}
        self._start_energy: dict[str, tuple[SecondMoment, float]] = {}
        shared: dict[tuple[str, torch.dtype, torch.device], Projector] = {}
        for layer in self.layers:
            weight, key = local(layer.weight.detach()), self._keys[layer.name]
            if key not in self._exact:
                self._exact[key] = Projector.from_subspace(subspace[layer.name])
            kind = (key, weight.dtype, weight.device)
            if kind not in shared:
                shared[kind] = self._exact[key].to(weight.dtype, weight.device)
            self._projectors[layer.name] = shared[kind]
            self._start[layer.name] = weight.clone()
        norms = {layer.name: self._norm(self.original(layer), layer) for layer in self.layers}
        # A layer of zeros has no scale of its own, so it has no limit.
        self._longest = {name: MOST_CHANGE * norm.where(norm > 0, math.inf) for name, norm in norms.items()}

    def trained_names(self) -> set[str]:
        """Names of the parameters that are trained."""
        return {layer.weight_name for layer in self.layers}

    def keep_on_disk(self, folder: str | os.PathLike[str]) -> None:
        """Keep the large float64 projectors in files in `folder`: a step uses those in the weights' precision."""
        for key, projector in self._exact.items():
            self._exact[key] = replace(projector, factor=mapped_if_large(projector.factor, folder))

    @torch.no_grad()
    @full_float32()
    def project_gradients(self) -> None:
        """g <- g P in place, for every layer that has a gradient."""
        if self.identity:
            return
        for layer in self.layers:
            if layer.weight.grad is not None:
                gradient = local(layer.weight.grad)
                gradient.copy_(_projected(layer, gradient, self._projectors[layer.name]))

    @torch.no_grad()
    @full_float32()
    def project_displacements(self, dtype: torch.dtype | None = None, decay: float = 0.0) -> None:
        """W <- W_0 + (1 - decay) (W - W_0) P in place: exact for any optimiser, and it absorbs rounding.

        A displacement that is then longer than `MOST_CHANGE` times `|W_0|` (Frobenius, for each layer) is shortened to
        that. Scaling keeps it in the null space.

        Args:
            dtype: precision of the product, the weights' own when None (float64 is slow on many devices). Once in
                float64 at the end leaves only the rounding of the stored weights.
            decay: share of the displacement that fades, in [0, 1). What forgetting does not renew disappears.
        """
        for layer in self.layers:
            weight, start = local(layer.weight), self._start[layer.name]
            projector = self._projectors[layer.name]
            if dtype is not None and dtype != weight.dtype:
                projector = self._exact[self._keys[layer.name]].to(dtype, weight.device)
            change = weight.to(projector.factor.dtype) - start
            if not self.identity:
                change = _projected(layer, change, projector)
            weight.copy_(torch.addcmul(start.to(change.dtype), change, self._kept(layer, change, decay)))

    def _kept(self, layer: ProtectedLayer, change: Tensor, decay: float) -> Tensor:
        """Share of a layer's change that stays, a scalar."""
        return self._shortened(layer, (1 - decay) * self._norm(change, layer), decay).to(change.dtype)

    def _shortened(self, layer: ProtectedLayer, norm: Tensor, decay: float) -> Tensor:
        """`1 - decay`, or less where the displacement's `norm` is over its limit."""
        return (self._longest[layer.name] / norm.clamp(min=torch.finfo(norm.dtype).tiny)).clamp(max=1.0) * (1 - decay)

    def _norm(self, part: Tensor, layer: ProtectedLayer) -> Tensor:
        """Frobenius norm of a matrix of which this process may hold a share, in its own precision."""
        norm = torch.linalg.vector_norm(part, dtype=torch.float64 if part.dtype == torch.float64 else torch.float32)
        return add_up(norm.square()).sqrt() if is_sharded(layer.weight) else norm

    def change(self, layer: ProtectedLayer) -> Tensor:
        """dW as (groups, out, width); of sharded weights this process's share of the rows."""
        return _rows(layer, local(layer.weight.detach()) - self._start[layer.name])

    def measured(self, layer: ProtectedLayer) -> Tensor:
        """A matrix whose outputs are as large as those of dW on any input; it may have fewer rows."""
        return self.change(layer)

    def original(self, layer: ProtectedLayer) -> Tensor:
        """W_0 as (groups, out, width); of sharded weights this process's share of the rows."""
        return _rows(layer, self._start[layer.name])

    def _summed(self, values: Sequence[float]) -> list[float]:
        """Sums over the weight rows of all processes, from sums over the rows of this one."""
        sharded = [layer.weight.device for layer in self.layers if is_sharded(layer.weight)]
        return summed(values, sharded[0]) if sharded else list(values)

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write `weights` (a `snapshot`), or W_0 when None, into the layers."""
        source = self._start if weights is None else weights
        for layer in self.layers:
            local(layer.weight).copy_(source[layer.name])

    @torch.no_grad()
    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the current weights by layer name."""
        return {layer.name: local(layer.weight.detach()).clone() for layer in self.layers}

    @torch.no_grad()
    def relative_change(self) -> float:
        """Norm of W - W_0 as a share of that of W_0, over all layers (Frobenius)."""
        matrices = (self.measured, self.original)
        norms = [sum(float(matrix(x).double().square().sum()) for x in self.layers) for matrix in matrices]
        moved, start = self._summed(norms)
        return math.sqrt(moved / start) if start > 0 else 0.0

    @torch.no_grad()
    def leak(self, moments: Mapping[str, SecondMoment], module_keys: Mapping[str, str]) -> Leak:
        """Leak of the current displacement on rows with these moments (usually held-out retained rows).

        Args:
            moments: second moment of the rows by key.
            module_keys: key by module name.
        """
        energies = []
        for layer in self.layers:
            moment = moments[module_keys[layer.name]]
            known = self._start_energy.get(layer.name)
            if known is None or known[0] is not moment:  # W_0 does not change: measured once for the same rows
                known = self._start_energy[layer.name] = (moment, moment.energy(self.original(layer)))
            energies += [moment.energy(self.measured(layer)), known[1]]
        energies = self._summed(energies)
        changed, original = energies[::2], energies[1::2]
        per_layer = {x.name: _share(*both) for x, *both in zip(self.layers, changed, original, strict=True)}
        return Leak(_share(sum(changed), sum(original)), per_layer)


def _projected(layer: ProtectedLayer, part: Tensor, projector: Projector) -> Tensor:
    """`part` of a gradient or displacement times P, in the parameter's own shape.

    Where a shard does not hold whole rows of the matrix (`Conv1D` is stored transposed), the processes put the parts
    together first.
    """
    weight = layer.weight
    if layer.stored_by_rows or not is_sharded(weight):
        return layer.from_matrix(projector(layer.as_matrix(part)))
    return cut_like(layer.from_matrix(projector(layer.as_matrix(gather_like(part, weight)))), weight)


def _rows(layer: ProtectedLayer, part: Tensor) -> Tensor:
    """`part` of a weight as a matrix of the rows that are this process's to count."""
    weight = layer.weight
    if layer.stored_by_rows or not is_sharded(weight):
        return layer.as_matrix(part)
    return own_rows(layer.as_matrix(gather_like(part, weight)))


@dataclass(frozen=True)
class Leak:
    """Relative change of layer outputs on some rows: sqrt(tr(dW C dW^T) / tr(W_0 C W_0^T)).

    Attributes:
        total: over all layers that were trained.
        per_layer: by module name.
    """

    total: float
    per_layer: dict[str, float]


def _share(changed: float, original: float) -> float:
    """sqrt(changed / original); infinite when outputs appear where there were none."""
    if original > 0:
        return math.sqrt(changed / original)
    return math.inf if changed > 0 else 0.0
