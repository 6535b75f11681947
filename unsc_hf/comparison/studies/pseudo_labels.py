"""Which pseudo-labels: what each strategy keeps, and how often it agrees with a retrained model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...objectives.pseudo_labels import pseudo_labels as new_labels
from .study import Lab, Panel, Point, Points, study

_STRATEGIES = ("soft", "top1", "second", "nearest_mean", "random")
_QUARTERS = 4


def _conclude(points: Points) -> str:
    text = f"AccDrt in percent by strategy: {points.listed('strategy', 'AccDrt')}. "
    agreed, quarters = points.listed("strategy", "agreement"), points.by("quarter")
    if not agreed:
        return text + "No retrained model was given, so nothing is said of agreement."
    least, most = (quarters[i].percent("agreement") for i in (1, _QUARTERS))
    return (
        f"{text}The label that a retrained model gives is met for so many percent of the forgotten rows: {agreed}; by "
        f"top1 for {least} of the quarter where the original is least sure of it, and for {most} of the surest."
    )


@study(
    "Which new labels, and are they what a retrained model would say?",
    tags={"strategy": "strategy", "quarter": "quarter of the rows, least to most confident"},
    panels=[Panel("AccDrt", "strategy"), Panel("agreement", "strategy"), Panel("agreement", "quarter")],
    conclude=_conclude,
    numbers={
        "AccDut": "AccDut (%)", "AccDrt": "AccDrt (%)", "leak": "leak", "steps": "steps",
        "agreement": "same answer as a retrained model (%)",
    },
)  # fmt: skip
def pseudo_labels(lab: Lab) -> Iterator[Point]:
    """Each strategy run, and the agreement of its most likely label with retrained models on the forget rows.

    "retrained" is the agreement of two retrained models; the quarters are those of top1.
    """
    for seed in lab.seeds:
        for strategy in _STRATEGIES:
            yield lab.run({"strategy": strategy}, seed, pseudo_labels=strategy)
        if lab.experiment.reference_numbers:
            yield from lab.points({"agreement": "all", "seed": seed}, partial(_agreement, lab, seed))


def _agreement(lab: Lab, seed: int) -> list[Point]:
    experiment, bench = lab.experiment, lab.experiment.bench(seed)
    forget, retain = (
        experiment.collect(bench, bench.original, rows) for rows in (experiment.forget, experiment.retain)
    )
    answers = [
        experiment.collect(
            bench, experiment.load(experiment.reference(number)), experiment.forget, features=False
        ).logits.argmax(1)
        for number in experiment.reference_numbers
    ]

    def agreement(labels: Tensor, rows: Tensor | slice = slice(None)) -> float:
        return float(np.mean([(labels[rows] == answer[rows]).float().mean().item() for answer in answers]))

    kept, points = sorted(set(retain.labels.tolist())), list[Point]()
    for strategy in _STRATEGIES:
        labels = new_labels(strategy, forget, kept, retain=retain, seed=seed)
        agreed = agreement(labels if labels.ndim == 1 else labels.argmax(1))
        points.append({"strategy": strategy, "seed": seed, "agreement": agreed})
    pairs = [(a == b).float().mean().item() for i, a in enumerate(answers) for b in answers[:i]]
    if pairs and seed == lab.seeds[0]:  # the same pairs for every seed
        points.append({"strategy": "retrained", "seed": seed, "agreement": float(np.mean(pairs))})
    top = new_labels("top1", forget, kept)
    confidence = new_labels("soft", forget, kept).gather(1, top[:, None])[:, 0]
    for i, rows in enumerate(torch.chunk(confidence.argsort(), _QUARTERS)):
        points.append({"quarter": i + 1, "seed": seed, "agreement": agreement(top, rows)})
    return points
