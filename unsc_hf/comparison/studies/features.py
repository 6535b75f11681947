"""Where the forgotten classes can be read in the features, and how much of that no null-space method may change."""

from __future__ import annotations

from functools import partial
from typing import Any

from datasets import Dataset, concatenate_datasets
from matplotlib.figure import Figure

from ...data.selection import hold_out
from ...evaluation.diagnosis import Inputs, leading_layers, pooled_inputs, readability
from ...models.layers import find_layers
from ...nullspace.rules import rank_for_energy
from ...reporting.plots import BLUE, GREEN, GREY, ORANGE
from .study import Lab, Point, Points, Study, legend, panels, register

_ENERGIES = (0.9, 0.95, 0.99, 0.999)
_SHOWN = 0.99
_ROWS = 3000  # rows that a probe is taught on, and asked about


@register
class FeatureStudy(Study):
    """Probes of every layer's input in the original, in the unlearned model, and in retrained ones."""

    name = "features"
    title = "Where can the forgotten classes still be read?"
    tags = {"model": "model", "layer": "input of", "energy": "energy"}
    numbers = {"whole": "whole", "inside": "inside the span", "free": "null space", "capacity": "free directions"}

    def measure(self, lab: Lab) -> list[Point]:
        points = []
        for seed in lab.seeds:
            for name in ("original", "UNSC"):
                points += lab.points({"model": name, "seed": seed}, partial(_read, lab, name, seed))
        for number in range(len(lab.experiment.reference_numbers())):
            points += lab.points({"model": "retrained", "seed": number}, partial(_read, lab, "retrained", number))
        return points

    def plot(self, points: Points) -> Figure:
        figure, (axes,) = panels(1, 9.0, 4.4)
        original = points.where(model="original")
        layers = list(original.by("layer"))
        shown = original.where(energy=_SHOWN)
        lines: list[tuple[str, Points, str, str, str]] = [
            ("original, whole input", shown, "whole", GREY, "-"),
            ("original, inside the span (energy 0.9)", original.where(energy=0.9), "inside", BLUE, ":"),
            (f"original, inside the span (energy {_SHOWN:g})", shown, "inside", BLUE, "-"),
            (f"original, in the null space (energy {_SHOWN:g})", shown, "free", ORANGE, "-"),
            ("UNSC, whole input", points.where(model="UNSC"), "whole", "black", "--"),
            ("retrained, whole input", points.where(model="retrained"), "whole", GREEN, "-"),
        ]
        for label, runs, key, colour, style in lines:
            if runs:
                rows = [runs.where(layer=layer) for layer in layers]
                means, halves = ([100 * number(row, key) for row in rows] for number in (Points.mean, Points.half))
                shape: dict[str, Any] = {"marker": "o", "ms": 3, "lw": 1.6, "elinewidth": 0.6}
                axes.errorbar(range(len(layers)), means, yerr=halves, label=label, color=colour, ls=style, **shape)
        short = [".".join(layer.removesuffix(".projection").split(".")[-3:])[-22:] for layer in layers]
        axes.set_xticks(range(len(layers)), short, rotation=60, ha="right", fontsize=7)
        axes.set(ylabel="forgotten classes read by a probe (%)", ylim=(-2, 102))
        legend(axes, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return figure

    def paragraph(self, points: Points) -> str:
        layers = points.where(model="original").by("layer")
        last = list(layers)[-1]
        shown = layers[last].where(energy=_SHOWN)
        unlearned, retrained = (points.where(model=model, layer=last) for model in ("UNSC", "retrained"))
        text = (
            f"Percent of the forgotten classes' test rows that a probe reads. At the head's input ({last}): "
            f"{shown.percent('whole')} in the original; {shown.percent('inside')} from the part inside the retained "
            f"span at energy {_SHOWN:g}, {layers[last].where(energy=_ENERGIES[0]).percent('inside')} at "
            f"{_ENERGIES[0]:g}; {shown.percent('free')} from the rest. After UNSC {unlearned.percent('whole')} is left "
            "of it."
        )
        if retrained:
            text += f" Retrained models: {retrained.percent('whole')}."
        at_energy = [runs.where(energy=_SHOWN) for runs in layers.values()]
        lost = [100 * runs.mean("whole") - 100 * runs.mean("inside") for runs in at_energy]
        return text + (
            f" Over all layers the part inside the span is read at most {max(x for x in lost if x == x):.1f} points "
            "worse than the whole. What lies inside, a layer passes on as before, whatever is done to its weights in "
            "the null space: it is the least that can still be read behind it while its own inputs stay as they are."
        )


def _read(lab: Lab, name: str, seed: int) -> list[Point]:
    """What probes read of each layer's input; of the original's also of its parts inside and outside the span."""
    experiment = lab.experiment
    bench = experiment.bench(lab.seeds[0] if name == "retrained" else seed)
    model, subspace = bench.original, bench.plan.subspace
    if name != "original":
        model = bench.unlearn() if name == "UNSC" else experiment.load(experiment.references()[seed])
    layers = list(leading_layers(find_layers(model).layers, subspace.module_keys))

    def inputs(rows: Dataset) -> Inputs:
        if len(rows) > _ROWS:  # of every class its share
            rows = hold_out(rows, _ROWS / len(rows), experiment.labels(rows), _ROWS, 0)[1]
        return pooled_inputs(model, layers, bench.batches(rows, shuffle=False))

    taught, asked = inputs(concatenate_datasets([experiment.forget, experiment.retain])), inputs(experiment.test)
    moments = bench.retained_moments() if name == "original" else {}
    points: list[Point] = []
    for depth, layer in enumerate(layers):
        space = subspace[layer.name]
        tags: dict[str, Any] = {"model": name, "seed": seed, "layer": layer.name, "depth": depth}
        read = partial(readability, layer.name, taught, asked, space.basis, classes=experiment.forgotten)
        if name != "original":
            points.append({**tags, "whole": read(ranks=space.ranks).whole})
            continue
        moment = moments[subspace.module_keys[layer.name]].matrix
        values = (space.basis.transpose(1, 2) @ moment @ space.basis).diagonal(dim1=1, dim2=2)
        for energy in _ENERGIES:
            ranks = [rank_for_energy(group, energy) for group in values]
            capacity = 1 - sum(ranks) / (len(ranks) * space.basis.shape[-1])
            parts = read(ranks=ranks)
            shares = {"whole": parts.whole, "inside": parts.inside, "free": parts.free, "capacity": capacity}
            points.append({**tags, "energy": energy, **shares})
    return points
