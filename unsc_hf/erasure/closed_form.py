"""Closed-form erasure: the smallest change of one layer after which class means no longer give forgotten rows away.

A linear probe tells the forgotten rows from the retained rows of a class by the difference of their means. LEACE
(Belrose et al., arXiv 2306.03819) takes such differences out of a feature by an affine map of least distortion. A
network has no place for an affine map behind its last normalisation, but the layer that writes the feature can do the
same. Let `inputs` be the differences of the means of its input rows, one column each, and `shifts` how far the means
of its output shall move:

    dW = argmin tr(dW C dW^T)  subject to  dW inputs = shifts,
    so   dW = shifts (inputs^T C^-1 inputs)^-1 inputs^T C^-1,

where C is the second moment of the retained rows. Of all changes that do this, it leaks least. Its rank is the number
of columns. Differences are taken between retained rows of one class and the rows of one forgotten class that are re-
labelled to it: what tells the retained classes from each other stays.

Such changes have a low rank. They are folded into a layer's own weight, or into its adapter, which grows by their rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..errors import UNSCError
from ..models.layers import ADAPTER, ProtectedLayer, plain_name, row_geometry

Pair = tuple[int, int]  # a forgotten class, and the retained class that rows of it are re-labelled to

_SHARE = 0.05  # of the forgotten rows that must be re-labelled to a class: the mean of fewer is not worth the leak
_FEW = 8  # classes that are taken where none has that share
RIDGE = 0.01  # of the mean diagonal: directions that the rows hardly use are not known well enough to be relied on


@dataclass(frozen=True)
class LowRank:
    """A change `left @ right.T` of a weight (out, in), in float64: left (out, k), right (in, k)."""

    left: Tensor
    right: Tensor

    def dense(self) -> Tensor:
        return self.left @ self.right.T

    def scaled(self, factor: float) -> LowRank:
        return LowRank(self.left * factor, self.right)


def ridged(matrix: Tensor, ridge: float = RIDGE) -> Tensor:
    """A symmetric positive matrix (width, width) with `ridge` times its mean diagonal added to the diagonal."""
    scale = matrix.diagonal().mean().clamp_min(torch.finfo(matrix.dtype).tiny)
    return (matrix + matrix.T) / 2 + ridge * scale * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def least_leak(inputs: Tensor, shifts: Tensor, moment: Tensor, ridge: float = RIDGE) -> LowRank:
    """The change of a weight with `change @ inputs = shifts` and the least leak on rows of this second moment.

    Args:
        inputs: differences of input means, (in, k). Columns that depend on each other are met as far as they can be.
        shifts: wanted shifts of the output means, (out, k).
        moment: second moment of retained input rows, (in, in).
    """
    solved = torch.linalg.solve(ridged(moment.double(), ridge), inputs.double())
    inner = torch.linalg.pinv(inputs.double().T @ solved, rtol=1e-6, hermitian=True)
    right, mixed = torch.linalg.qr(solved)  # orthonormal: factors of like size, whose product rounds little in float32
    return LowRank(shifts.double() @ inner @ mixed.T, right)


def shared_pairs(own: Tensor, relabelled: Tensor, retained: Tensor) -> list[Pair]:
    """Pairs of a forgotten class and a retained one to which at least 5 % of its rows are re-labelled.

    Where no retained class takes as much, the few that take most. `own` and `relabelled` are true and new labels of the
    forgotten rows, `retained` those of the retained rows, (rows,) each. UNSCError when no class has two rows of either
    kind.
    """
    pairs: list[Pair] = []
    for c in torch.unique(own).tolist():
        mine = relabelled[own == c]
        ids, counts = torch.unique(mine, return_counts=True)
        there = torch.isin(ids, retained) & (counts >= 2)
        ids, counts = ids[there], counts[there]
        enough = counts >= _SHARE * len(mine)
        if len(ids) and not bool(enough.any()):
            enough = torch.zeros_like(enough).index_fill(0, counts.topk(min(_FEW, len(counts))).indices, True)
        pairs += [(c, k) for k in ids[enough].tolist()]
    if not pairs:
        raise UNSCError(
            f"pseudo_labels: no retained class takes two of the {len(relabelled)} forgotten rows that were read, so "
            "there is no class mean to move them to; use pseudo_labels='top1'."
        )
    return pairs


def differences(
    forgotten: Tensor, own: Tensor, relabelled: Tensor, retained: Tensor, labels: Tensor, pairs: Iterable[Pair]
) -> Tensor:
    """Mean of the forgotten rows of each pair minus the mean of the retained rows of its new class, (width, pairs).

    Rows are (rows, width). Forgotten ones have true and new classes `own` and `relabelled`, retained ones `labels`,
    (rows,).
    """
    columns = [
        forgotten[(own == c) & (relabelled == k)].double().mean(0) - retained[labels == k].double().mean(0)
        for c, k in pairs
    ]
    return torch.stack(columns, 1)


def output_shifts(jacobian: Tensor, wanted: Tensor, ridge: float = RIDGE) -> Tensor:
    """Shifts of a layer's output (out, k) that move the features by `wanted` (features, k), where they can be moved.

    `jacobian` is the derivative of the mean feature by a constant added to the output, (features, out). A normalisation
    behind the layer lets two directions hardly move. Without the ridge these would take all.
    """
    jacobian = jacobian.double()
    return jacobian.T @ torch.linalg.solve(ridged(jacobian @ jacobian.T, ridge), wanted.double())


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
