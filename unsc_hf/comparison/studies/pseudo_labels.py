"""Which pseudo-labels: what each strategy keeps, and how often it agrees with a retrained model."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from ...models.outputs import Outputs
from ...objectives.pseudo_labels import pseudo_labels
from ...reporting.plots import BLUE, GREEN, ORANGE
from .lab import Lab, bars, matching, mean, panels, percent
from .registry import Points, Study, register

_STRATEGIES = ("soft", "top1", "second", "nearest_mean", "random")
_BINS = 4


def measure(lab: Lab) -> list[dict[str, Any]]:
    """Each strategy run, and the agreement of its most likely label with retrained models on the forget rows."""
    points = []
    for seed in lab.seeds:
        for strategy in _STRATEGIES:
            points.append(lab.run({"strategy": strategy}, seed, {"pseudo_labels": strategy}))
        points += _agreement(lab, seed)
    return points


def _agreement(lab: Lab, seed: int) -> list[dict[str, Any]]:
    """Agreement by strategy, and that of top1 by its confidence: quarters of the forget rows."""
    experiment = lab.experiment
    folders = experiment.references()
    if not folders:
        return []

    def make() -> dict[str, Any]:
        bench, parts = experiment.bench(seed), (experiment.forget, experiment.retain)
        forget, retain = (experiment.collect(bench, bench.original, rows) for rows in parts)
        answers = []
        for folder in folders:
            model = experiment.load(folder)
            answers.append(experiment.collect(bench, model, experiment.forget, features=False).logits.argmax(1))
        kept = sorted(set(retain.labels.tolist()))
        agreed: dict[str, Any] = {}
        for strategy in _STRATEGIES:
            labels = pseudo_labels(strategy, forget, kept, retain=retain, seed=seed)
            ids = labels if labels.ndim == 1 else labels.argmax(1)
            agreed[strategy] = float(np.mean([(ids == answer).float().mean().item() for answer in answers]))
        pairs = [(a == b).float().mean().item() for i, a in enumerate(answers) for b in answers[:i]]
        agreed["retrained"] = float(np.mean(pairs)) if pairs else None
        agreed["by_confidence"] = _by_confidence(forget, kept, answers)
        return agreed

    agreement = lab.point({"agreement": "all", "seed": seed}, make)
    strategies = [{"agrees": s, "seed": seed, "agreement": agreement[s]} for s in _STRATEGIES]
    if seed == lab.seeds[0]:  # the same pairs of models for every seed
        strategies.append({"agrees": "retrained", "seed": seed, "agreement": agreement["retrained"]})
    return strategies + [
        {"agrees": "top1", "quarter": i, "seed": seed, "agreement": share}
        for i, share in enumerate(agreement["by_confidence"])
    ]


def _by_confidence(forget: Outputs, kept: list[int], answers: list[torch.Tensor]) -> list[float]:
    top = pseudo_labels("top1", forget, kept)
    confidence = pseudo_labels("soft", forget, kept).gather(1, top[:, None])[:, 0]
    quarters = torch.chunk(confidence.argsort(), _BINS)
    return [float(np.mean([(top[q] == a[q]).float().mean().item() for a in answers])) for q in quarters]


def plot(points: Points) -> Figure:
    known = any("agrees" in p for p in points)
    figure, axes = panels(3 if known else 1)
    bars(axes[0], points, [(s, {"strategy": s}) for s in _STRATEGIES], "AccDrt", (BLUE,))
    axes[0].set(ylabel="AccDrt (%)", ylim=(max(0.0, 100 * _lowest(points) - 10), 100))
    if known:
        groups = [(s, {"agrees": s, "quarter": None}) for s in (*_STRATEGIES, "retrained")]
        bars(axes[1], points, groups, "agreement", (ORANGE,) * len(_STRATEGIES) + (GREEN,))
        axes[1].set(ylabel="same answer as a retrained model (%)", ylim=(0, 100))
        quarters = [(f"{i + 1}", {"agrees": "top1", "quarter": i}) for i in range(_BINS)]
        bars(axes[2], points, quarters, "agreement", (ORANGE,))
        axes[2].set(ylabel="agreement of top1 (%)", ylim=(0, 100))
        axes[2].set_xlabel("quarter of the forgotten rows, least to most confident")
    return figure


def _lowest(points: Points) -> float:
    return min(mean(matching(points, strategy=s), "AccDrt") for s in _STRATEGIES)


def paragraph(points: Points) -> str:
    runs = {s: matching(points, strategy=s) for s in _STRATEGIES}
    kept = "; ".join(f"{s} {percent(run, 'AccDrt')} (AccDut {percent(run, 'AccDut')})" for s, run in runs.items())
    text = f"AccDrt by strategy, percent: {kept}."
    if not any("agrees" in p for p in points):
        return text + " No retrained model was given, so nothing is said of agreement."
    agreed = ", ".join(
        f"{s} {percent(matching(points, agrees=s, quarter=None), 'agreement')}"
        for s in _STRATEGIES
        if s != "soft"  # its most likely label is top1's
    )
    quarters = [100 * mean(matching(points, agrees="top1", quarter=i), "agreement") for i in range(_BINS)]
    pairs = matching(points, agrees="retrained", quarter=None)
    known = any(pair.get("agreement") for pair in pairs)
    ceiling = f" Two retrained models agree with each other on {percent(pairs, 'agreement')} %." if known else ""
    return (
        f"{text} The label that a retrained model gives the forgotten rows is met by: {agreed} %.{ceiling} Top1 fails "
        f"where the original is unsure of its second choice: {quarters[0]:.0f} % agreement on the least confident "
        f"quarter of the rows, {quarters[-1]:.0f} % on the most confident."
    )


register(
    Study(
        "pseudo-labels",
        "Which new labels, and are they what a retrained model would say?",
        measure,
        {"strategy": "strategy"},
        {"AccDut": "AccDut", "AccDrt": "AccDrt", "leak": "leak", "steps": "steps"},
        plot,
        paragraph,
    )
)
