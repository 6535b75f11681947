"""Low-rank changes folded into weights: into a layer's own weight, or into its adapter, which grows by their rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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


class _Fold(NamedTuple):
    """A change and how much of it is written."""

    change: LowRank
    factor: float = 1.0


class Folds:
    """Changes of several layers, each of which can be taken back or scaled.

    An adapter takes a change as further rows of A and columns of B. Its rank and scale are noted in the PEFT config, so
    that the saved adapter loads as any other.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sites: dict[str, ProtectedLayer] = {}
        self._start: dict[str, tuple[Tensor, ...]] = {}
        self._folds: dict[str, list[_Fold]] = {}

    def fold(self, site: ProtectedLayer, change: LowRank) -> None:
        """Add a change (out, in) to a site."""
        if site.name not in self._sites:
            lora = site.module if isinstance(site.module, LoraLayer) else None
            weights = [lora.lora_A[ADAPTER].weight, lora.lora_B[ADAPTER].weight] if lora else [site.weight]
            self._sites[site.name], self._folds[site.name] = site, []
            self._start[site.name] = tuple(weight.detach().clone() for weight in weights)
        self._folds[site.name].append(_Fold(change))
        self._write(site)

    def unfold(self, site: ProtectedLayer) -> None:
        """Take the last change of a site back."""
        self._folds[site.name].pop()
        self._write(site)

    def scale(self, factor: float) -> None:
        """Write every change so far times a factor; 1 is what was folded. Later changes are written whole."""
        for name, site in self._sites.items():
            self._folds[name] = [_Fold(fold.change, factor) for fold in self._folds[name]]
            self._write(site)

    def settle(self) -> None:
        """Count what is written now as what was folded."""
        for folds in self._folds.values():
            folds[:] = [_Fold(fold.change.scaled(fold.factor)) for fold in folds]

    def clear(self) -> None:
        """Take every change back."""
        for name, site in self._sites.items():
            self._folds[name].clear()
            self._write(site)

    @torch.no_grad()
    def _write(self, site: ProtectedLayer) -> None:
        start, folds = self._start[site.name], self._folds[site.name]
        if isinstance(site.module, LoraLayer):
            self._grow(site.name, site.module, start, folds)
            return
        total = site.as_matrix(start[0]).double()
        for fold in folds:
            total = total + fold.factor * fold.change.dense()[None].to(total.device)
        site.weight.copy_(site.from_matrix(total))

    def _grow(self, name: str, lora: LoraLayer, start: tuple[Tensor, ...], folds: Sequence[_Fold]) -> None:
        """A and B with further rows and columns; the trained ones stay as they are."""
        scale = lora.scaling[ADAPTER]
        a, b = start
        rows, columns = [a], [b]
        for fold in folds:
            left, right = fold.factor / scale * fold.change.left, fold.change.right
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
