"""Poison: how far dishonest requests and false pseudo-labels damage what is kept, and what a leak budget stops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from PIL import ImageDraw
from transformers import PreTrainedModel

from ...evaluation.accuracy import per_class_accuracy
from ..workbench import Relabel, Workbench
from .study import Lab, Panel, Point, Points, study

# Options by what limits a run: a budget on the held-out leak, or the null space alone, or nothing.
LIMITS: dict[str, dict[str, Any]] = {
    **{f"leak {budget}": {"max_leak": budget} for budget in (0.01, 0.02, 0.05, 0.1)},
    "no budget": {"max_leak": None},
    "no projection": {"max_leak": None, "null_space": "none"},
}
_DEFAULT = "leak 0.1"
_FLIPPED = (0.1, 0.5)  # of the forgotten class's rows, added from other classes under its name
_TRIGGER = "cf cf"

Prepared: TypeAlias = tuple[Workbench, Relabel | None]


def _conclude(points: Points) -> str:
    default, free = (points.where(limit=limit).listed("attack", "fall") for limit in (_DEFAULT, "no projection"))
    honest = points.where(attack="honest").by("limit")
    serves = next((limit for limit, runs in honest.items() if runs.mean("AccDut") <= 0.01), None)
    text = f"AccDrt falls by so many points at {_DEFAULT}: {default}; without null space and budget: {free}. "
    if serves is None:
        return text + "None of the budgets lets an honest request through."
    costs = {attack: 100 * runs.mean("fall") for attack, runs in points.where(limit=serves).by("attack").items()}
    del costs["honest"]
    worst = max(costs, key=lambda attack: costs[attack])
    return f"{text}At {serves}, the smallest that serves the honest request, {worst} cost {costs[worst]:.1f} points."


@study(
    "How much damage can a request do?",
    tags={"attack": "attack", "limit": "limit"},
    panels=[Panel(y, "limit", by="attack") for y in ("fall", "triggered", "AccDut")],
    conclude=_conclude,
    numbers={
        "AccDut": "AccDut (%)", "AccDrt": "AccDrt (%)", "fall": "fall of AccDrt (%)", "worst": "worst class (%)",
        "taken": "answered with the attacker's class (%)", "triggered": "the same with trigger (%)", "leak": "leak",
    },
)  # fmt: skip
def poison(lab: Lab) -> Iterator[Point]:
    """Attacks by budget on the held-out leak, with the null space; and each without both.

    - "honest": nothing is wrong.
    - "label flips": a share of rows of *other* classes enters the request under the forgotten class's name.
    - "false labels": all pseudo-labels are one retained class of the attacker's choice.
    - "unlikely labels": each pseudo-label is the least likely remaining class.
    - "backdoor": half of the rows to forget bear a trigger, and their pseudo-labels are the attacker's class.
    """
    attacks: dict[str, Callable[[Lab, int], Prepared]] = {
        "honest": lambda lab, seed: (lab.experiment.bench(seed), None),
        **{f"label flips {share:.0%}": partial(flipped_labels, share=share) for share in _FLIPPED},
        "false labels": lambda lab, seed: (lab.experiment.bench(seed), _towards(_kept(lab)[0])),
        "unlikely labels": _unlikely,
        "backdoor": backdoor,
    }
    for seed, (attack, prepare) in product(lab.seeds, attacks.items()):
        prepared = cache(partial(prepare, lab, seed))  # once for all limits, and only when one is missing
        for limit, options in LIMITS.items():
            tags = {"attack": attack, "limit": limit, "seed": seed}
            yield lab.point(tags, partial(_attacked, lab, prepared, options))


# ---- attacks --------------------------------------------------------------------------------------------------------
def _kept(lab: Lab) -> list[int]:
    """Ids of the retained classes; the first is the attacker's."""
    return np.unique(lab.experiment.labels(lab.experiment.retain)).tolist()


def _towards(target: int) -> Relabel:
    return lambda model, batches, outputs: torch.full((len(outputs.labels),), target)


def _unlikely(lab: Lab, seed: int) -> Prepared:
    kept = torch.tensor(_kept(lab))
    return lab.experiment.bench(seed), lambda model, batches, outputs: kept[outputs.logits[:, kept].argmin(1)]


def flipped_labels(lab: Lab, seed: int, share: float) -> Prepared:
    """A request that also holds retained rows under the forgotten class's name, `share` as many as its own."""
    experiment = lab.experiment
    forget, retain = experiment.forget, experiment.retain
    taken = np.sort(np.random.default_rng(seed).permutation(len(retain))[: round(share * len(forget))])
    left = np.setdiff1d(np.arange(len(retain)), taken)
    column = experiment.config.label_column or next(n for n in ("label", "labels") if n in retain.column_names)
    flipped = retain.select(taken).remove_columns(column).add_column(column, [experiment.forgotten[0]] * len(taken))
    flipped = flipped.cast_column(column, retain.features[column]).select_columns(retain.column_names)
    return experiment.new_bench(seed, concatenate_datasets([forget, flipped]), retain.select(left)), None


def backdoor(lab: Lab, seed: int) -> Prepared:
    """A request half of whose rows bear a trigger, with the attacker's class as pseudo-label."""
    rows = lab.experiment.forget
    half = len(rows) // 2
    stamped = triggered(rows.select(range(half)))
    forget = concatenate_datasets([stamped, rows.select(range(half, len(rows)))])
    return lab.experiment.new_bench(seed, forget, lab.experiment.retain), _towards(_kept(lab)[0])


def triggered(rows: Dataset) -> Dataset:
    """Rows with a trigger: a white square in the corner of every picture, or two odd words before every text."""
    kinds = rows.features.items()
    name = next(n for n, kind in kinds if type(kind).__name__ == "Image" or getattr(kind, "dtype", "") == "string")

    def stamp(row: Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(row[name], str):
            return {name: f"{_TRIGGER} {row[name]}"}
        picture = row[name].copy()
        side = max(2, min(picture.size) // 5)
        box = (picture.width - side, picture.height - side, picture.width - 1, picture.height - 1)
        ImageDraw.Draw(picture).rectangle(box, fill=255 if picture.mode == "L" else (255,) * len(picture.getbands()))
        return {name: picture}

    return rows.map(stamp, features=rows.features, load_from_cache_file=False, keep_in_memory=True)


# ---- damage ---------------------------------------------------------------------------------------------------------
def _attacked(lab: Lab, prepared: Callable[[], Prepared], options: Mapping[str, Any]) -> Point:
    """A run, and the damage on retained test rows: fall of AccDrt and of the worst class, gain of the attacker's."""
    bench, relabel = prepared()
    model = bench.run(Workbench.unlearn, {"relabel": relabel, **options})
    run, experiment, target = lab.measured(bench, model), lab.experiment, _kept(lab)[0]
    others = np.flatnonzero(~np.isin(experiment.labels(experiment.test), [*experiment.forgotten, target]))
    stamped = triggered(experiment.test.select(others))

    def measured(who: PreTrainedModel) -> tuple[dict[int, float], dict[str, float]]:
        test = experiment.collect(bench, who, experiment.test, features=False)
        marked = experiment.collect(bench, who, stamped, features=False)
        return per_class_accuracy(test.logits, test.labels), {
            "fall": -(experiment.accuracies(test)["AccDrt"] or 0.0),
            "taken": float((test.logits.argmax(1).numpy()[others] == target).mean()),
            "triggered": float((marked.logits.argmax(1) == target).float().mean()),
        }

    (classes, before), (left, after) = measured(bench.original), measured(model)
    worst = max(classes[c] - left[c] for c in _kept(lab) if c in classes)
    return {**run, "worst": worst, **{name: after[name] - before[name] for name in after}}
