"""LoRA inside the null space: dW = s B A changes nothing on retained inputs x if A x = 0, whatever B is.

So A starts from the principal directions of the *forgotten* activations within the null space, stays there, and B is
free. The result is an ordinary PEFT adapter; the base weights are not touched.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..errors import UNSCError
from ..models.layers import ADAPTER, LayerSelection, ProtectedLayer, plain_name, row_geometry
from ..utils.distributed import cut_like, is_sharded, local, own_rows, whole
from ..utils.precision import full_float32
from .moments import Moment, SecondMoment
from .projection import NullSpaceProjection
from .sketch import MomentSketch
from .subspace import LayerSubspace, Subspace, descending_eigh

logger = logging.getLogger(__name__)


_LEAST_SHARE = 1e-7  # of the largest singular value: what is smaller is rounding


def null_space_start(
    subspace: LayerSubspace, forgotten: Moment, rank: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Rows for A, shape (rank, width), float64: the principal directions of the forgotten rows inside the null space.

    They are found on `device`. They are orthogonal, with norm sqrt(width / rank), so that a step of B moves the product as far as the same step of
    full fine-tuning would move W: one learning rate serves both. Rows beyond the capacity are zero, and stay zero.
    """
    start = torch.zeros(rank, subspace.width, dtype=torch.float64, device=device)
    basis, forgotten = subspace.basis[0].to(device), forgotten.to(device)
    if isinstance(forgotten, SecondMoment) and not subspace.thin:
        free = basis[:, subspace.ranks[0] :]
        _, vectors = descending_eigh(free.mT @ forgotten.matrix @ free)
        used = min(rank, free.shape[1])
        found = free @ vectors[0, :, :used]
    else:
        found = _sketched_start(basis[:, : subspace.ranks[0]], forgotten, rank)
    start[: found.shape[1]] = found.mT * math.sqrt(subspace.width / rank)
    return start


def _sketched_start(kept: Tensor, forgotten: Moment, rank: int) -> Tensor:
    """Principal directions, shape (width, at most rank), of forgotten rows outside the span of `kept`, where one of the two is
    known from a sketch: those of (I - S S^T) E with F^ = E E^T."""
    if isinstance(forgotten, MomentSketch):
        factor, _ = forgotten.factor()
    elif isinstance(forgotten, SecondMoment):
        values, vectors = descending_eigh(forgotten.matrix)
        factor = vectors[0] * values[0].sqrt()
    else:
        raise UNSCError("statistics: a sample of rows gives adapters no start; collect the forgotten rows' moments.")
    outside = factor - kept @ (kept.mT @ factor)
    vectors, values, _ = torch.linalg.svd(outside, full_matrices=False)
    above = int((values > _LEAST_SHARE * torch.linalg.matrix_norm(factor, 2)).sum())
    found = vectors[:, : min(rank, above, kept.shape[0] - kept.shape[1])]
    found, _ = torch.linalg.qr(
        found - kept @ (kept.mT @ found)
    )  # small values' directions are orthogonal to S up to rounding only
    return found


class LoraProjection(NullSpaceProjection):
    """The projection for adapters: A is started inside the null space and kept there, B is free.

    Leak and change are those of the product s B A against the base weight.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ProtectedLayer],
        subspace: Subspace,
        forgotten: Mapping[str, Moment],
        identity: bool = False,
    ) -> None:
        """
        Args:
            model: the PEFT model; its B factors are zero.
            layers: its `lora_A` factors.
            subspace: retained subspaces, by the names of the base layers.
            forgotten: second moments of the forgotten rows by key of `subspace`.
            identity: no projection, for controls: A keeps PEFT's own start.
        """
        self._lora = {
            plain_name(name): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        starts: dict[tuple[str, int], Tensor] = {}  # layers that read one input begin alike
        with torch.no_grad():
            for layer in layers:
                here, key = subspace[layer.name], subspace.module_keys[layer.name]
                if identity or not here.has_capacity:
                    continue
                rank = layer.weight.shape[0]
                if rank > here.capacity:
                    logger.warning("%s: rank %d is reduced to its capacity, %d.", layer.name, rank, int(here.capacity))
                if (key, rank) not in starts:
                    starts[key, rank] = null_space_start(here, forgotten[key], rank, layer.weight.device)
                start = layer.from_matrix(starts[key, rank][None])
                local(layer.weight).copy_(cut_like(start, layer.weight))
        super().__init__(layers, subspace, identity)

    def free_weights(self) -> dict[str, nn.Parameter]:
        """The B factors that are trained, by layer name."""
        return {layer.name: self._lora[layer.name].lora_B[ADAPTER].weight for layer in self.layers}

    @full_float32()
    def change(self, layer: ProtectedLayer) -> Tensor:
        lora = self._lora[layer.name]
        return self._share(layer, self._base(layer).as_matrix(whole(lora.get_delta_weight(ADAPTER).detach())))

    def measured(self, layer: ProtectedLayer) -> Tensor:
        """s R A with B = Q R: as many rows as the rank, not as many as there are outputs. Of sharded factors the product."""
        if is_sharded(layer.weight):
            return self.change(layer)
        lora, rows = self._lora[layer.name], layer.as_matrix(layer.weight.detach()).double()
        _, triangle = torch.linalg.qr(lora.lora_B[ADAPTER].weight.detach().double().reshape(-1, rows.shape[1]))
        return lora.scaling[ADAPTER] * (triangle @ rows)

    def original(self, layer: ProtectedLayer) -> Tensor:
        base = self._base(layer)
        return self._share(layer, base.as_matrix(whole(base.weight.detach())))

    @staticmethod
    def _share(layer: ProtectedLayer, matrix: Tensor) -> Tensor:
        """Where the factors are sharded, a product has to be put together; each process then counts its own rows of it."""
        return own_rows(matrix) if is_sharded(layer.weight) else matrix

    def _base(self, layer: ProtectedLayer) -> ProtectedLayer:
        module = self._lora[layer.name].get_base_layer()
        geometry = row_geometry(module)
        if geometry is None:
            raise UNSCError(
                f"peft_config: {layer.name!r} is a {type(module).__name__}, whose change cannot be measured."
            )
        return ProtectedLayer(layer.name, module, geometry)

    @torch.no_grad()
    def snapshot(self) -> dict[str, Tensor]:
        free = {f"{name} (B)": local(weight.detach()).clone() for name, weight in self.free_weights().items()}
        return {**super().snapshot(), **free}

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor] | None = None) -> None:
        super().restore(weights)
        for name, weight in self.free_weights().items():
            mine = local(weight)
            mine.copy_(torch.zeros_like(mine) if weights is None else weights[f"{name} (B)"])


def free_names(selection: LayerSelection) -> set[str]:
    """Parameter names of the B factors that belong to the selected layers."""
    return {layer.weight_name.replace(".lora_A.", ".lora_B.") for layer in selection.layers}
