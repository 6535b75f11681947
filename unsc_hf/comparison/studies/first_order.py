"""First order: the change of retained loss that a confined update should make, and the one it made, as |dW| grows."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import partial

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import UNSCError
from ...models.hooks import evaluation_mode, model_inputs
from ...models.layers import ProtectedLayer
from ...nullspace.projection import NullSpaceProjection
from ...nullspace.rules import build_subspace
from ...nullspace.statistics import ActivationStatistics
from ...nullspace.subspace import Subspace
from ...trainer.rows import cast_floats
from ..workbench import Workbench
from .study import Lab, Panel, Point, Points, study

ENERGIES = (1.0, 0.9999, 0.999, 0.99, 0.95, 0.9, 0.0)  # 0: no projection
SIZES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # of dW, relative to W
_FORGET_ROWS = 256
_MATTERS = 0.01  # nats


def _conclude(points: Points) -> str:
    exact = max(abs(p["changed"]) for p in points.where(energy=1.0))
    free, confined = (points.where(energy=energy, size=0.1) for energy in (0.0, 0.99))
    leaks = [p["leak"] for p in points.where() if abs(p["changed"]) >= _MATTERS and 0 < p["energy"] < 1]
    return (
        f"At energy 1 the loss on the retained rows changes by at most {exact:.1e} nats, however far the weights move; "
        f"below, {_MATTERS} nats are reached from a leak of {min(leaks, default=float('inf')):.2g} on. At a tenth of "
        f"the weights' norm it changes by {confined.mean('changed'):+.2g} at energy 0.99 (first order predicts "
        f"{confined.mean('predicted'):+.2g}), and by {free.mean('changed'):+.2g} without projection "
        f"({free.mean('predicted'):+.2g})."
    )


@study(
    "Does the retained loss stay where it was, and from which leak on does it not?",
    tags={"energy": "energy (0: no projection)", "size": "dW / W"},
    panels=[
        Panel("changed", "size", by="energy", log="xy"),
        Panel("changed", "size", by="energy", at="leak", log="xy"),
    ],
    conclude=_conclude,
    numbers={
        "leak": "leak on the same rows", "predicted": "predicted change of loss (nats)",
        "changed": "change of retained loss (nats)", "rows": "rows",
    },
)  # fmt: skip
def first_order(lab: Lab) -> Iterator[Point]:
    """The descent direction towards the pseudo-labels at the original weights, confined by each energy, at each size.

    There are few enough retained rows for every layer to have a null space at energy 1, and all of them are in the
    statistics; loss and gradient are evaluated on them, in float64.
    """
    for seed in lab.seeds:
        yield from lab.points({"seed": seed}, partial(_points, lab, seed))


def _points(lab: Lab, seed: int) -> list[Point]:
    bench = lab.experiment.bench(seed)
    model = deepcopy(bench.original).double()
    layers = bench.layers(model)
    weights = [layer.weight for layer in layers]
    start = [weight.detach().clone() for weight in weights]
    rows, statistics = _few_rows(bench, model, layers, lab.experiment.labels(lab.experiment.retain))
    retained = cast_floats(next(bench.batches(rows, len(rows), shuffle=False)), torch.double)
    forget = cast_floats(next(bench.batches(bench.forget, _FORGET_ROWS)), torch.double)
    logits = _logits(model, forget).detach()
    logits[:, bench.forgotten] = -torch.inf
    forget["labels"] = logits.argmax(1)
    before = _loss(model, retained)
    loss = float(before.detach())
    gradient, direction = (torch.autograd.grad(value, weights) for value in (before, _loss(model, forget)))
    points = []
    for energy in ENERGIES:
        projection = NullSpaceProjection(layers, _subspace(statistics, energy or 1.0), identity=energy == 0)
        for weight, downhill in zip(weights, direction, strict=True):
            weight.data.sub_(downhill)
        projection.project_displacements()
        steps = [weight.detach() - origin for weight, origin in zip(weights, start, strict=True)]
        slope = sum(float((part * step).sum()) for part, step in zip(gradient, steps, strict=True))
        unit = projection.relative_change()
        for size in SIZES:
            for weight, origin, step in zip(weights, start, steps, strict=True):
                weight.data.copy_(origin + size / unit * step)
            changed = float(_loss(model, retained).detach()) - loss
            leak = projection.leak(statistics.pooled(), statistics.module_keys).total
            tags = {"seed": seed, "energy": energy, "size": size, "rows": len(rows), "loss": loss}
            points.append({**tags, "predicted": size / unit * slope, "changed": changed, "leak": leak})
        projection.restore()
    return points


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with evaluation_mode(model, gradients=True):
        logits: Tensor = model(**model_inputs(batch)).logits
    return logits


def _loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy in the model's float64."""
    return nn.functional.cross_entropy(_logits(model, batch), batch["labels"])


def _subspace(statistics: ActivationStatistics, energy: float) -> Subspace:
    return build_subspace({"retained": statistics.pooled()}, statistics.module_keys, rule="energy", energy=energy)


def _few_rows(
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
            model, rows, groups=labels[chosen], layers=layers, prepare=bench.reader.prepare,
            collate_fn=lambda samples: cast_floats(bench.reader.collate(samples), torch.double), progress=False,
        )  # fmt: skip
        if all(layer.has_capacity for layer in _subspace(statistics, 1.0).layers.values()):
            return rows, statistics
    raise UNSCError(
        "energy: a single retained row already fills the input space of a layer, so no update is exact; "
        "take a wider model."
    )
