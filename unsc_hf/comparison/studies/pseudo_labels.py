"""Which pseudo-labels: what each strategy keeps, and how often it agrees with a retrained model."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from ...objectives.pseudo_labels import pseudo_labels
from ...reporting.plots import BLUE, GREEN, ORANGE
from .study import Lab, Point, Points, Study, bars, panels, register

_STRATEGIES = ("soft", "top1", "second", "nearest_mean", "random")
_BINS = 4


@register
class PseudoLabelStudy(Study):
    """Each strategy run, and the agreement of its most likely label with retrained models on the forget rows."""

    name = "pseudo-labels"
    title = "Which new labels, and are they what a retrained model would say?"
    tags = {"strategy": "strategy"}
    numbers = {name: name for name in ("AccDut", "AccDrt", "leak", "steps")}

    def measure(self, lab: Lab) -> list[Point]:
        points = []
        for seed in lab.seeds:
            points += [lab.run({"strategy": name}, seed, {"pseudo_labels": name}) for name in _STRATEGIES]
            if lab.experiment.reference_numbers():
                agreement = lab.point({"agreement": "all", "seed": seed}, partial(_agreement, lab, seed))
                names = (*_STRATEGIES, "retrained") if seed == lab.seeds[0] else _STRATEGIES  # the same pairs for all
                points += [{"agrees": name, "seed": seed, "agreement": agreement[name]} for name in names]
                points += [
                    {"agrees": "top1", "quarter": i, "seed": seed, "agreement": share}
                    for i, share in enumerate(agreement["by_confidence"])
                ]
        return points

    def plot(self, points: Points) -> Figure:
        known = any("agrees" in p for p in points)
        figure, axes = panels(3 if known else 1)
        kept = bars(axes[0], {s: points.where(strategy=s) for s in _STRATEGIES}, "AccDrt", (BLUE,), ylabel="AccDrt (%)")
        axes[0].set_ylim(max(0.0, min(kept) - 10), 100)
        if known:
            groups = {s: points.where(agrees=s, quarter=None) for s in (*_STRATEGIES, "retrained")}
            colours, words = (ORANGE,) * len(_STRATEGIES) + (GREEN,), "same answer as a retrained model (%)"
            bars(axes[1], groups, "agreement", colours, ylabel=words, ylim=(0, 100))
            quarters = {f"{i + 1}": points.where(agrees="top1", quarter=i) for i in range(_BINS)}
            bars(axes[2], quarters, "agreement", (ORANGE,), ylabel="agreement of top1 (%)", ylim=(0, 100))
            axes[2].set_xlabel("quarter of the forgotten rows, least to most confident")
        return figure

    def paragraph(self, points: Points) -> str:
        runs = {s: points.where(strategy=s) for s in _STRATEGIES}
        kept = "; ".join(f"{s} {of.percent('AccDrt')} (AccDut {of.percent('AccDut')})" for s, of in runs.items())
        text = f"AccDrt by strategy, percent: {kept}."
        if not any("agrees" in p for p in points):
            return text + " No retrained model was given, so nothing is said of agreement."
        agreed = ", ".join(
            f"{s} {points.where(agrees=s, quarter=None).percent('agreement')}"
            for s in _STRATEGIES
            if s != "soft"  # its most likely label is top1's
        )
        first, last = (100 * points.where(agrees="top1", quarter=i).mean("agreement") for i in (0, _BINS - 1))
        pairs = points.where(agrees="retrained", quarter=None)
        known = any(pair.get("agreement") for pair in pairs)
        ceiling = f" Two retrained models agree with each other on {pairs.percent('agreement')} %." if known else ""
        return (
            f"{text} The label that a retrained model gives the forgotten rows is met by: {agreed} %.{ceiling} Top1 "
            f"fails where the original is unsure of its second choice: {first:.0f} % agreement on the least confident "
            f"quarter of the rows, {last:.0f} % on the most confident."
        )


def _agreement(lab: Lab, seed: int) -> dict[str, Any]:
    """Agreement by strategy, and that of top1 by its confidence: quarters of the forget rows."""
    experiment, bench = lab.experiment, lab.experiment.bench(seed)
    forget, retain = (
        experiment.collect(bench, bench.original, rows) for rows in (experiment.forget, experiment.retain)
    )
    answers = [
        experiment.collect(bench, experiment.load(folder), experiment.forget, features=False).logits.argmax(1)
        for folder in experiment.references()
    ]

    def agreement(labels: Tensor, rows: Tensor | slice = slice(None)) -> float:
        return float(np.mean([(labels[rows] == answer[rows]).float().mean().item() for answer in answers]))

    kept = sorted(set(retain.labels.tolist()))
    result: dict[str, Any] = {}
    for strategy in _STRATEGIES:
        labels = pseudo_labels(strategy, forget, kept, retain=retain, seed=seed)
        result[strategy] = agreement(labels if labels.ndim == 1 else labels.argmax(1))
    pairs = [(a == b).float().mean().item() for i, a in enumerate(answers) for b in answers[:i]]
    result["retrained"] = float(np.mean(pairs)) if pairs else None
    top = pseudo_labels("top1", forget, kept)
    confidence = pseudo_labels("soft", forget, kept).gather(1, top[:, None])[:, 0]
    result["by_confidence"] = [agreement(top, rows) for rows in torch.chunk(confidence.argsort(), _BINS)]
    return result
