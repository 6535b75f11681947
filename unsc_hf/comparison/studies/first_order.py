"""First order: the change of retained loss that a confined update should make, and the one it made, as |dW| grows."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...data.columns import read_labels
from ...errors import UNSCError
from ...models.hooks import NOT_INPUTS, evaluation_mode
from ...models.layers import ProtectedLayer
from ...nullspace.projection import NullSpaceProjection
from ...nullspace.rules import build_subspace
from ...nullspace.statistics import ActivationStatistics
from ..methods import Workbench
from .lab import Lab, Point, curve, different, matching, mean, panels
from .registry import Points, Study, register

ENERGIES = (1.0, 0.9999, 0.999, 0.99, 0.95, 0.9, 0.0)  # 0: no projection
SIZES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of dW, relative to W
_FORGET_ROWS = 256
_MATTERS = 0.01  # nats


def measure(lab: Lab) -> list[dict[str, Any]]:
    """The descent direction towards the pseudo-labels at the original weights, confined by each energy, at each size.

    There are few enough retained rows for every layer to have a null space at energy 1, and all of them are in the
    statistics; loss and gradient are evaluated on them, in float64.
    """
    points = []
    for seed in lab.seeds:
        points += lab.points({"seed": seed}, partial(_points, lab, seed))
    return points


def _points(lab: Lab, seed: int) -> list[Point]:
    bench = lab.experiment.bench(seed)
    model = deepcopy(bench.original).double()
    layers = bench.layers(model)
    rows, statistics = _few(
        bench, model, layers, read_labels(lab.experiment.retain, lab.experiment.config.label_column)
    )
    retained = _inputs(next(bench.batches(rows, len(rows), shuffle=False)))
    before, gradient = _loss_and_gradient(model, layers, retained)
    forget = _inputs(next(bench.batches(bench.forget, _FORGET_ROWS)))
    with torch.no_grad(), evaluation_mode(model):
        logits = model(**{k: v for k, v in forget.items() if k not in NOT_INPUTS}).logits
    logits[:, bench.forgotten] = -torch.inf
    _, direction = _loss_and_gradient(model, layers, {**forget, "labels": logits.argmax(1)})
    points = []
    for energy in ENERGIES:
        subspace = build_subspace(
            {"retained": statistics.pooled()}, statistics.module_keys, rule="energy", energy=energy or 1.0
        )
        projection = NullSpaceProjection(layers, subspace, identity=energy == 0)
        _move(layers, direction, 1.0)
        projection.project_displacements()
        step = {layer.name: layer.weight.detach() - direction.start[layer.name] for layer in layers}
        unit = projection.relative_change()
        for size in SIZES:
            scale = size / unit
            for layer in layers:
                layer.weight.data.copy_(direction.start[layer.name] + scale * step[layer.name])
            after, _ = _loss_and_gradient(model, layers, retained, gradients=False)
            points.append(
                {
                    "seed": seed,
                    "energy": energy,
                    "size": size,
                    "rows": len(rows),
                    "loss": before,
                    "predicted": scale * sum(float((gradient.by_layer[n] * step[n]).sum()) for n in step),
                    "changed": after - before,
                    "leak": projection.leak(statistics.pooled(), statistics.module_keys).total,
                }
            )
        projection.restore()
    return points


class _Gradient:
    """Gradients by layer name, and the weights they were taken at."""

    def __init__(self, layers: list[ProtectedLayer], gradients: tuple[Tensor, ...]) -> None:
        self.by_layer = {layer.name: gradient for layer, gradient in zip(layers, gradients, strict=True)}
        self.start = {layer.name: layer.weight.detach().clone() for layer in layers}


def _move(layers: list[ProtectedLayer], direction: _Gradient, rate: float) -> None:
    for layer in layers:
        layer.weight.data.sub_(rate * direction.by_layer[layer.name])


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def _loss_and_gradient(
    model: nn.Module, layers: list[ProtectedLayer], batch: dict[str, Tensor], gradients: bool = True
) -> tuple[float, _Gradient]:
    """Mean cross-entropy, evaluated in the model's float64, and its gradient (zeros when not asked for)."""
    weights = [layer.weight for layer in layers]
    with evaluation_mode(model, gradients=True):
        logits = model(**{name: value for name, value in batch.items() if name not in NOT_INPUTS}).logits
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        of_loss = torch.autograd.grad(loss, weights) if gradients else tuple(torch.zeros_like(w) for w in weights)
    return float(loss.detach()), _Gradient(layers, of_loss)


def _few(
    bench: Workbench, model: PreTrainedModel, layers: list[ProtectedLayer], labels: np.ndarray
) -> tuple[Dataset, ActivationStatistics]:
    """Retained rows of many classes that leave every layer a direction which none of them uses, and their moments."""
    turn = np.zeros(len(labels), dtype=int)
    for c in set(labels.tolist()):
        turn[labels == c] = np.arange((labels == c).sum())
    order = np.lexsort((labels, turn))
    for count in (64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1):
        chosen = np.sort(order[:count])
        rows = bench.retain.select(chosen)
        statistics = ActivationStatistics.collect(
            model, bench.prepared(rows), groups=labels[chosen], layers=layers, collate_fn=_double(bench), progress=False
        )
        exact = build_subspace({"retained": statistics.pooled()}, statistics.module_keys, rule="energy", energy=1.0)
        if all(layer.has_capacity for layer in exact.layers.values()):
            return rows, statistics
    raise UNSCError(
        "energy: a single retained row already fills the input space of a layer, so no update is exact; "
        "take a wider model."
    )


def _double(bench: Workbench) -> Any:
    return lambda samples: _inputs(bench.collate(samples))


def plot(points: Points) -> Figure:
    figure, axes = panels(2, 5.2, 3.8)
    palette = colormaps["viridis"]
    energies = different(points, "energy")
    shown = [{**p, "size_of_change": abs(p["changed"]), "size_of_predicted": abs(p["predicted"])} for p in points]
    for i, energy in enumerate(energies):
        colour, runs = palette(i / max(1, len(energies) - 1)), matching(shown, energy=energy)
        curve(axes[0], runs, "size", "size_of_change", _words(energy), colour, 1.0)
        sizes = sorted({p["size"] for p in runs})
        means = [[mean(matching(runs, size=s), key) for s in sizes] for key in ("leak", "size_of_change")]
        axes[1].plot(*means, "o-", ms=4, color=colour, label=_words(energy))
        axes[0].plot(sizes, [mean(matching(runs, size=s), "size_of_predicted") for s in sizes], ":", lw=1, color=colour)
    axes[0].set(
        xscale="log", yscale="log", xlabel="|dW| / |W|", ylabel="change of retained loss (nats; dotted: predicted)"
    )
    axes[1].axhline(_MATTERS, color="#9aa0a6", ls=":", lw=1)
    axes[1].set(xscale="log", yscale="log", xlabel="leak on the same rows", ylabel="change of retained loss (nats)")
    axes[1].legend(frameon=False, fontsize=8)
    return figure


def _words(energy: float) -> str:
    return f"energy {energy:g}" if energy else "no projection"


def paragraph(points: Points) -> str:
    exact = [abs(p["changed"]) for p in matching(points, energy=1.0)]
    largest = max(p["size"] for p in points)
    leaks = [p["leak"] for p in matching(points) if abs(p["changed"]) >= _MATTERS and p["energy"] not in (0.0, 1.0)]
    free = matching(points, energy=0.0, size=0.1)
    confined = matching(points, energy=0.99, size=0.1)
    text = (
        f"At energy 1 the loss on the retained rows changes by at most {max(exact):.1e} nats, however far the weights "
        f"move (up to {largest:g} times their own norm). At a tenth of the weights' norm it changes by "
        f"{mean(confined, 'changed'):+.2g} nats at energy 0.99 (first order predicts "
        f"{mean(confined, 'predicted'):+.2g}) and by {mean(free, 'changed'):+.2g} without projection (predicted "
        f"{mean(free, 'predicted'):+.2g})."
    )
    if leaks:
        text += (
            f" The smallest leak at which a confined update changed the loss by {_MATTERS} nats or more was "
            f"{min(leaks):.2g}."
        )
    return text


register(
    Study(
        "first-order",
        "Does the retained loss stay where it was, and from which leak on does it not?",
        measure,
        {"energy": "energy (0: none)", "size": "dW / W"},
        {"leak": "leak", "predicted": "predicted", "changed": "changed", "rows": "rows"},
        plot,
        paragraph,
    )
)
