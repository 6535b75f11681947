"""Where forgotten classes can be read, by linear probes of each layer's input.

An input is split into its part in the span of the retained activations, and the rest. A layer passes the first part on
as before, whatever an update in the null space does to its weights. So this part bounds from below what can still be
read behind a layer whose inputs stay as they are. The probe is `linear_probe` (Alain and Bengio, arXiv 1610.01644).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.hooks import NOT_INPUTS, capture_inputs, evaluation_mode, row_mask
from ..models.layers import ProtectedLayer
from .probes import linear_probe


@dataclass(frozen=True)
class Inputs:
    """Inputs of layers, averaged over the tokens or patches of each sample."""

    layers: dict[str, Tensor]  # by name, float32, (samples, groups, width)
    labels: Tensor  # int64, (samples,)


@dataclass(frozen=True)
class Readability:
    """Test accuracy on the forgotten classes (macro) of a probe."""

    whole: float | None  # of the input as it is
    inside: float | None  # of its part in the span of the retained activations
    free: float | None  # of the rest; None where nothing is left


def pooled_inputs(model: nn.Module, layers: Sequence[ProtectedLayer], batches: Iterable[Mapping[str, Any]]) -> Inputs:
    """Run the model over batches with "labels", and average each layer's inputs over the real tokens of a sample."""
    means: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    labels: list[Tensor] = []
    mask: Tensor | None = None

    def keep(layer: ProtectedLayer, x: Tensor) -> None:
        rows = layer.rows(x.detach()).float()  # (groups, batch * rows, width)
        groups, _, width = rows.shape
        rows = rows.reshape(groups, x.shape[0], -1, width)
        real = row_mask(x, mask)
        weight = torch.ones(rows.shape[1:3], device=x.device) if real is None else real.reshape(x.shape[0], -1).float()
        mean = (rows * weight[None, :, :, None]).sum(2) / weight.sum(1).clamp_min(1)[None, :, None]
        means[layer.name].append(mean.transpose(0, 1).cpu())

    for batch in batches:
        mask = batch.get("attention_mask")
        with evaluation_mode(model), capture_inputs(layers, keep):
            model(**{name: value for name, value in batch.items() if name not in NOT_INPUTS})
        labels.append(batch["labels"].cpu())
    return Inputs({name: torch.cat(parts) for name, parts in means.items()}, torch.cat(labels))


def split_input(x: Tensor, basis: Tensor, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Split inputs (samples, groups, width): their parts inside the span of the first `ranks[g]` columns of `basis`
    (groups, width, width), and the rest. The two add up to the whole."""
    kept = torch.arange(basis.shape[-1])[None, :] < torch.tensor(list(ranks))[:, None]
    span = basis * kept[:, None, :]
    inside = torch.einsum("sgw,gwk,gvk->sgv", x.double(), span, span)
    return inside.to(x.dtype), (x.double() - inside).to(x.dtype)


def readability(
    name: str, taught: Inputs, asked: Inputs, basis: Tensor, ranks: Sequence[int], classes: Iterable[int]
) -> Readability:
    """Probes taught on the inputs of layer `name`, and asked for the forgotten `classes`.

    The rows of `taught` and `asked` are training and test rows of all classes. The first `ranks[g]` columns of `basis`,
    (groups, width, width) as in `LayerSubspace`, span what is kept of group g.
    """
    forgotten = sorted(set(classes))

    def probe(train: Tensor, test: Tensor) -> float | None:
        return linear_probe(train.flatten(1), taught.labels, test.flatten(1), asked.labels, forgotten)

    train, test = taught.layers[name], asked.layers[name]
    (train_in, train_free), (test_in, test_free) = (split_input(x, basis, ranks) for x in (train, test))
    free = any(rank < basis.shape[-2] for rank in ranks)
    return Readability(probe(train, test), probe(train_in, test_in), probe(train_free, test_free) if free else None)


def leading_layers(layers: Sequence[ProtectedLayer], module_keys: Mapping[str, str]) -> Iterator[ProtectedLayer]:
    """One layer for each input: those that share it (q, k and v) read the same."""
    seen: set[str] = set()
    for layer in layers:
        key = module_keys.get(layer.name)
        if key is not None and key not in seen:
            seen.add(key)
            yield layer
