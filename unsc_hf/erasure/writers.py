"""Low-rank changes folded into weights: into a layer's own weight, or into its adapter, which grows by their rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..models.layers import ADAPTER, ProtectedLayer, plain_name, row_geometry
from .closed_form import LowRank


def folding_sites(model: nn.Module, layers: Sequence[ProtectedLayer]) -> list[ProtectedLayer]:
    """The modules whose outputs these layers make: the layers themselves, or the LoRA layers of their factors."""
    adapted = {plain_name(name): module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    sites = []
    for layer in layers:
        lora = adapted.get(layer.name)
        geometry = layer.geometry if lora is None else row_geometry(lora.get_base_layer())
        if geometry is not None:
            sites.append(layer if lora is None else ProtectedLayer(layer.name, lora, geometry))
    return sites


@dataclass
class _Site:
    """A layer that was changed: its weights at the start, and each change with how much of it is written."""

    layer: ProtectedLayer
    start: tuple[Tensor, ...]
    folds: list[tuple[LowRank, float]] = field(default_factory=list)


class Folds:
    """Changes of several layers, each of which can be taken back or scaled.

    An adapter takes a change as further rows of A and columns of B. Its rank and scale are noted in the PEFT config, so
    that the saved adapter loads as any other.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sites: dict[str, _Site] = {}

    def fold(self, layer: ProtectedLayer, change: LowRank) -> None:
        """Add a change (out, in) to a layer."""
        if layer.name not in self._sites:
            lora = layer.module if isinstance(layer.module, LoraLayer) else None
            weights = [lora.lora_A[ADAPTER].weight, lora.lora_B[ADAPTER].weight] if lora else [layer.weight]
            self._sites[layer.name] = _Site(layer, tuple(weight.detach().clone() for weight in weights))
        site = self._sites[layer.name]
        site.folds.append((change, 1.0))
        self._write(site)

    def unfold(self, layer: ProtectedLayer) -> None:
        """Take the last change of a layer back."""
        site = self._sites[layer.name]
        site.folds.pop()
        self._write(site)

    def scale(self, factor: float) -> None:
        """Write every change so far times a factor; 1 is what was folded. Later changes are written whole."""
        for site in self._sites.values():
            site.folds = [(change, factor) for change, _ in site.folds]
            self._write(site)

    def settle(self) -> None:
        """Count what is written now as what was folded."""
        for site in self._sites.values():
            site.folds = [(change.scaled(factor), 1.0) for change, factor in site.folds]

    def clear(self) -> None:
        """Take every change back."""
        for site in self._sites.values():
            site.folds.clear()
            self._write(site)

    @torch.no_grad()
    def _write(self, site: _Site) -> None:
        layer = site.layer
        if isinstance(layer.module, LoraLayer):
            self._grow(layer.name, layer.module, site)
            return
        total = layer.as_matrix(site.start[0]).double()
        for change, factor in site.folds:
            total = total + factor * change.dense()[None].to(total.device)
        layer.weight.copy_(layer.from_matrix(total))

    def _grow(self, name: str, lora: LoraLayer, site: _Site) -> None:
        """A and B with further rows and columns; the trained ones stay as they are."""
        scale = lora.scaling[ADAPTER]
        a, b = site.start
        rows, columns = [a], [b]
        for change, factor in site.folds:
            left, right = factor / scale * change.left, change.right
            rows.append(right.T.reshape(-1, *a.shape[1:]).to(a))
            columns.append(left.reshape(-1, left.shape[1], *b.shape[2:]).to(b))
        down, up = lora.lora_A[ADAPTER], lora.lora_B[ADAPTER]
        down.weight = nn.Parameter(torch.cat(rows), requires_grad=down.weight.requires_grad)
        up.weight = nn.Parameter(torch.cat(columns, 1), requires_grad=up.weight.requires_grad)
        rank = down.weight.shape[0]
        for module, attribute in ((down, "out"), (up, "in")):
            setattr(module, f"{attribute}_{'features' if isinstance(module, nn.Linear) else 'channels'}", rank)
        model: Any = self._model
        config: LoraConfig = model.peft_config[ADAPTER]
        alpha = scale * (rank**0.5 if config.use_rslora else rank)
        lora.r[ADAPTER], lora.lora_alpha[ADAPTER] = rank, alpha
        config.rank_pattern = {**config.rank_pattern, name: rank}
        config.alpha_pattern = {**config.alpha_pattern, name: alpha}
