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
from ..models.layers import ADAPTER, ProtectedLayer, plain_name, row_geometry
from ..utils.distributed import cut_like, is_sharded, local, own_rows, whole
from ..utils.precision import full_float32
from .moments import SecondMoment
from .projection import NullSpaceProjection, Projector
from .rules import descending_eigh
from .subspace import LayerSubspace, Subspace

logger = logging.getLogger(__name__)


def null_space_start(
    subspace: LayerSubspace, forgotten: SecondMoment, rank: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Rows for A, shape (rank, width), float64: the principal directions of the forgotten rows inside the null space.

    They are found on `device`. They are orthogonal, with norm sqrt(width / rank): a step of B then moves the product as
    far as the same step of full fine-tuning would move W, so one learning rate serves both. Rows beyond the capacity
    are zero, and stay zero.
    """
    start = torch.zeros(rank, subspace.width, dtype=torch.float64, device=device)
    free = subspace.basis[0].to(device)[:, subspace.ranks[0] :]
    _, vectors = descending_eigh(free.mT @ forgotten.to(device).matrix @ free)
    used = min(rank, free.shape[1])
    start[:used] = (free @ vectors[0, :, :used]).mT * math.sqrt(subspace.width / rank)
    return start


class LoraProjection(NullSpaceProjection):
    """The projection for adapters: A is started inside the null space and kept there, B is free.

    Leak and change are those of the product s B A against the base weight.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ProtectedLayer],
        subspace: Subspace,
        forgotten: Mapping[str, SecondMoment] | None,
        identity: bool = False,
    ) -> None:
        """Start the A factors (`layers`) of a PEFT model inside the null space. The B factors are zero.

        `forgotten` are moments of the forgotten rows by key of `subspace`; None projects PEFT's own start. With
        `identity` (for controls) nothing is projected, and A keeps PEFT's own start.
        """
        self._lora = {
            plain_name(name): module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        if not identity:
            self._start_inside([layer for layer in layers if subspace[layer.name].has_capacity], subspace, forgotten)
        super().__init__(layers, subspace, identity)

    @torch.no_grad()
    def _start_inside(
        self, layers: Sequence[ProtectedLayer], subspace: Subspace, forgotten: Mapping[str, SecondMoment] | None
    ) -> None:
        starts: dict[tuple[str, int], Tensor] = {}  # layers that read one input begin alike
        for layer in layers:
            here, key, rank = subspace[layer.name], subspace.module_keys[layer.name], layer.weight.shape[0]
            if rank > here.capacity:
                logger.warning("%s: rank %d is reduced to its capacity, %d.", layer.name, rank, int(here.capacity))
            if forgotten is None:
                own = layer.as_matrix(whole(layer.weight.detach())).double()
                start = Projector.from_subspace(here).to(torch.float64, own.device)(own)
            else:
                if (key, rank) not in starts:
                    starts[key, rank] = null_space_start(here, forgotten[key], rank, layer.weight.device)
                start = starts[key, rank][None]
            local(layer.weight).copy_(cut_like(layer.from_matrix(start), layer.weight))

    def trained_names(self) -> set[str]:
        projected = super().trained_names()
        return projected | {name.replace(".lora_A.", ".lora_B.") for name in projected}

    def free_weights(self) -> dict[str, nn.Parameter]:
        """The B factors that are trained, by layer name."""
        return {layer.name: self._lora[layer.name].lora_B[ADAPTER].weight for layer in self.layers}

    @torch.no_grad()
    @full_float32()
    def project_displacements(self, dtype: torch.dtype | None = None, decay: float = 0.0) -> None:
        """A is projected, B decays, and B is shortened until the product s B A is within `MOST_CHANGE` of `|W_0|`."""
        if not self.identity:
            super().project_displacements(dtype)
        for layer in self.layers:
            lora = self._lora[layer.name]
            rows, columns = (whole(part[ADAPTER].weight).detach().float() for part in (lora.lora_A, lora.lora_B))
            rows, columns = rows.reshape(len(rows), -1), columns.reshape(-1, len(rows))
            norm = ((columns.mT @ columns) * (rows @ rows.mT)).sum().clamp(min=0).sqrt() * lora.scaling[ADAPTER]
            local(lora.lora_B[ADAPTER].weight).mul_(self._shortened(layer, (1 - decay) * norm, decay))

    def _kept(self, layer: ProtectedLayer, change: Tensor, decay: float) -> Tensor:
        """A is not shortened: its length alone changes no output."""
        return change.new_ones(())

    @full_float32()
    def change(self, layer: ProtectedLayer) -> Tensor:
        lora = self._lora[layer.name]
        return self._share(layer, self._base(layer).as_matrix(whole(lora.get_delta_weight(ADAPTER).detach())))

    def measured(self, layer: ProtectedLayer) -> Tensor:
        """s R A with B = Q R, which has as many rows as the rank, not as many as outputs; of sharded factors s B A."""
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
        """Of a product of sharded factors, which every process then holds whole, the rows that this process counts."""
        return own_rows(matrix) if is_sharded(layer.weight) else matrix

    def _base(self, layer: ProtectedLayer) -> ProtectedLayer:
        module = self._lora[layer.name].get_base_layer()
        geometry = row_geometry(module)
        if geometry is None:
            kind = type(module).__name__
            raise UNSCError(f"peft_config: {layer.name!r} is a {kind}, whose change cannot be measured.")
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
