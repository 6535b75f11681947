"""Where the forgotten classes can be read in the features, and how much of that no null-space method may change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from datasets import Dataset, concatenate_datasets
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from ...data.columns import read_labels
from ...data.selection import hold_out
from ...evaluation.diagnosis import Inputs, leading_layers, pooled_inputs, readability
from ...models.layers import ProtectedLayer, find_layers
from ...models.loading import load_as
from ...nullspace.rules import rank_for_energy
from ...reporting.plots import BLUE, GREEN, GREY, ORANGE
from ..methods import Workbench
from .lab import Lab, different, matching, mean, panels, percent, spread
from .registry import Points, Study, register

_ENERGIES = (0.9, 0.95, 0.99, 0.999)
_SHOWN = 0.99
_ROWS = 3000  # rows that a probe is taught on, and asked about


def measure(lab: Lab) -> list[dict[str, Any]]:
    """Probes of every layer's input in the original, in the unlearned model, and in retrained ones."""
    points = []

    def add(model: str, seed: int, make: Callable[[], dict[str, Any]]) -> None:
        point = lab.point({"model": model, "seed": seed}, make)
        points.extend(point.get("points", [point]))

    for seed in lab.seeds:
        add("original", seed, partial(_original, lab, seed))
        add("UNSC", seed, partial(_unlearned, lab, seed))
    for i, folder in enumerate(lab.experiment.references()):
        add("retrained", i, partial(_retrained, lab, i, folder))
    return points


def _rows(lab: Lab, part: Dataset) -> Dataset:
    """At most `_ROWS` rows, of every class its share."""
    if len(part) <= _ROWS:
        return part
    return hold_out(part, _ROWS / len(part), read_labels(part, lab.experiment.config.label_column), _ROWS, 0)[1]


def _inputs(lab: Lab, bench: Workbench, model: PreTrainedModel) -> tuple[list[ProtectedLayer], Inputs, Inputs]:
    """Layers with inputs of their own, and these inputs on training and on test rows."""
    layers = list(leading_layers(find_layers(model).layers, bench.plan.subspace.module_keys))
    train = concatenate_datasets([lab.experiment.forget, lab.experiment.retain])

    def batches(part: Dataset) -> Iterator[dict[str, Any]]:
        return bench.batches(_rows(lab, part), shuffle=False)

    return (
        layers,
        pooled_inputs(model, layers, batches(train)),
        pooled_inputs(model, layers, batches(lab.experiment.test)),
    )


def _original(lab: Lab, seed: int) -> dict[str, Any]:
    bench = lab.experiment.bench(seed)
    subspace = bench.plan.subspace
    layers, taught, asked = _inputs(lab, bench, bench.original)
    moments = bench.retained_moments()
    points = []
    for depth, layer in enumerate(layers):
        basis = subspace[layer.name].basis
        moment = moments[subspace.module_keys[layer.name]].matrix
        values = (basis.transpose(1, 2) @ moment @ basis).diagonal(dim1=1, dim2=2)
        for energy in _ENERGIES:
            ranks = [rank_for_energy(group, energy) for group in values]
            read = readability(layer.name, taught, asked, basis, ranks, lab.experiment.forgotten)
            free = 1 - sum(ranks) / (len(ranks) * basis.shape[-1])
            points.append(
                {"model": "original", "seed": seed, "layer": layer.name, "depth": depth, "energy": energy,
                 "whole": read.whole, "inside": read.inside, "free": read.free, "capacity": free}
            )  # fmt: skip
    return {"points": points}


def _whole(lab: Lab, bench: Workbench, model: PreTrainedModel, name: str, seed: int) -> dict[str, Any]:
    layers, taught, asked = _inputs(lab, bench, model)
    points = []
    for depth, layer in enumerate(layers):
        of_layer = bench.plan.subspace[layer.name]
        read = readability(layer.name, taught, asked, of_layer.basis, of_layer.ranks, lab.experiment.forgotten)
        points.append({"model": name, "seed": seed, "layer": layer.name, "depth": depth, "whole": read.whole})
    return {"points": points}


def _unlearned(lab: Lab, seed: int) -> dict[str, Any]:
    bench = lab.experiment.bench(seed)
    return _whole(lab, bench, bench.unlearn(), "UNSC", seed)


def _retrained(lab: Lab, i: int, folder: str) -> dict[str, Any]:
    bench = lab.experiment.bench(lab.seeds[0])
    model = load_as(lab.experiment.arguments.auto_class, folder, "retrained_model_name_or_path").to(
        lab.experiment.config.device
    )
    return _whole(lab, bench, model, "retrained", i)


def plot(points: Points) -> Figure:
    figure, axes = panels(1, 9.0, 4.4)
    layers = different(matching(points, model="original"), "layer")
    lines: list[tuple[str, dict[str, Any], str, str, str]] = [
        ("original, whole input", {"model": "original", "energy": _SHOWN}, "whole", GREY, "-"),
        *((f"original, inside the span (energy {e:g})", {"model": "original", "energy": e}, "inside", BLUE, s)
          for e, s in ((0.9, ":"), (_SHOWN, "-"))),
        (f"original, in the null space (energy {_SHOWN:g})", {"model": "original", "energy": _SHOWN},
         "free", ORANGE, "-"),
        ("UNSC, whole input", {"model": "UNSC"}, "whole", "black", "--"),
        ("retrained, whole input", {"model": "retrained"}, "whole", GREEN, "-"),
    ]  # fmt: skip
    for label, tags, key, colour, style in lines:
        rows = [matching(points, layer=layer, **tags) for layer in layers]
        if any(rows):
            axes[0].errorbar(
                range(len(layers)), [100 * mean(row, key) for row in rows],
                yerr=[100 * spread(row, key) for row in rows], label=label, color=colour, ls=style, marker="o", ms=3,
                lw=1.6, elinewidth=0.6,
            )  # fmt: skip
    axes[0].set_xticks(range(len(layers)), [_short(layer) for layer in layers], rotation=60, ha="right", fontsize=7)
    axes[0].set(ylabel="forgotten classes read by a probe (%)", ylim=(-2, 102))
    axes[0].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _short(layer: str) -> str:
    """The end of a module's name."""
    return ".".join(layer.removesuffix(".projection").split(".")[-3:])[-22:]


def paragraph(points: Points) -> str:
    layers = different(matching(points, model="original"), "layer")
    last = layers[-1]

    def of(model: str, key: str, **tags: Any) -> str:
        return percent(matching(points, model=model, layer=last, **tags), key)

    whole, inside, free = (of("original", key, energy=_SHOWN) for key in ("whole", "inside", "free"))
    fewest = of("original", "inside", energy=_ENERGIES[0])
    text = (
        f"Percent of the forgotten classes' test rows that a probe reads. At the head's input ({last}): {whole} in "
        f"the original; {inside} from the part inside the retained span at energy {_SHOWN:g}, {fewest} at "
        f"{_ENERGIES[0]:g}; {free} from the rest. After UNSC {of('UNSC', 'whole')} is left of it."
    )
    if matching(points, model="retrained"):
        text += f" Retrained models: {of('retrained', 'whole')}."
    losses = []
    for layer in layers:
        rows = matching(points, model="original", layer=layer, energy=_SHOWN)
        losses.append(100 * mean(rows, "whole") - 100 * mean(rows, "inside"))
    lost = max(loss for loss in losses if loss == loss)
    return text + (
        f" Over all layers the part inside the span is read at most {lost:.1f} points worse than the whole. What lies "
        "inside, a layer passes on as before, whatever is done to its weights in the null space: it is the least that "
        "can still be read behind it while its own inputs stay as they are."
    )


register(
    Study(
        "features",
        "Where can the forgotten classes still be read?",
        measure,
        {"model": "model", "layer": "input of", "energy": "energy"},
        {"whole": "whole", "inside": "inside the span", "free": "null space", "capacity": "free directions"},
        plot,
        paragraph,
    )
)
