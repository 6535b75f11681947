"""Poison: how far dishonest requests and false pseudo-labels damage what is kept, and what a leak budget stops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from matplotlib.figure import Figure
from PIL import ImageDraw
from transformers import PreTrainedModel

from ...data.columns import read_labels
from ...evaluation.accuracy import macro_accuracy, per_class_accuracy
from ...reporting.plots import BLUE, GREEN, GREY, ORANGE
from ..methods import Workbench
from ..workbench import Relabel
from .lab import Lab, curve, different, matching, mean, panels, percent
from .registry import Points, Study, register

BUDGETS: tuple[float | None, ...] = (0.01, 0.02, 0.05, 0.1, None)
_FLIPPED = (0.1, 0.5)  # of the forgotten class's rows, added from other classes under its name
_NO_BUDGET = 1.0  # where "none" is drawn
_TRIGGER = "cf cf"

Prepared = tuple[Workbench, Relabel | None]


def measure(lab: Lab) -> list[dict[str, Any]]:
    """Attacks by budget on the held-out leak, with the null space; and each without both.

    - "honest": nothing is wrong.
    - "label flips": a share of rows of *other* classes enters the request under the forgotten class's name.
    - "false labels": all pseudo-labels are one retained class of the attacker's choice.
    - "unlikely labels": each pseudo-label is the least likely remaining class.
    - "backdoor": half of the rows to forget bear a trigger, and their pseudo-labels are the attacker's class.
    """
    attacks: dict[str, Callable[[Lab, int], Prepared]] = {
        "honest": _honest,
        **{f"label flips {share:.0%}": partial(flipped_labels, share=share) for share in _FLIPPED},
        "false labels": _false_labels,
        "unlikely labels": _unlikely,
        "backdoor": backdoor,
    }
    points = []
    for seed in lab.seeds:
        for attack, prepare in attacks.items():
            prepared = cache(partial(prepare, lab, seed))  # once for all budgets, and only when one is missing
            for space, budget in (*(("retained", b) for b in BUDGETS), ("none", None)):
                tags = {"attack": attack, "space": space, "budget": budget or 0.0, "seed": seed}
                points.append(lab.point(tags, partial(_attacked, lab, prepared, space, budget)))
    return points


def _attacked(lab: Lab, prepared: Callable[[], Prepared], space: str, budget: float | None) -> dict[str, Any]:
    bench, relabel = prepared()
    model = bench.unlearn(relabel=relabel, null_space=space, max_leak=budget)
    return {**lab.measured(bench, model), **_damage(lab, bench, model)}


# ---- attacks --------------------------------------------------------------------------------------------------------
def _kept(lab: Lab) -> list[int]:
    labels = read_labels(lab.experiment.retain, lab.experiment.config.label_column)
    return sorted(set(labels.tolist()))


def _target(lab: Lab) -> int:
    return _kept(lab)[0]


def _honest(lab: Lab, seed: int) -> Prepared:
    return lab.experiment.bench(seed), None


def _towards(target: int) -> Relabel:
    return lambda model, batches, outputs: torch.full((len(outputs.labels),), target)


def _false_labels(lab: Lab, seed: int) -> Prepared:
    return lab.experiment.bench(seed), _towards(_target(lab))


def _unlikely(lab: Lab, seed: int) -> Prepared:
    kept = torch.tensor(_kept(lab))
    return lab.experiment.bench(seed), lambda model, batches, outputs: kept[outputs.logits[:, kept].argmin(1)]


def flipped_labels(lab: Lab, seed: int, share: float) -> Prepared:
    experiment = lab.experiment
    rng = np.random.default_rng(seed)
    taken = np.sort(rng.permutation(len(experiment.retain))[: round(share * len(experiment.forget))])
    left = np.setdiff1d(np.arange(len(experiment.retain)), taken)
    relabelled = _relabelled(experiment.retain.select(taken), experiment.forgotten[0], experiment.config.label_column)
    forget = concatenate_datasets([experiment.forget, relabelled])
    return experiment.new_bench(seed, forget, experiment.retain.select(left)), None


def _relabelled(rows: Dataset, label: int, column: str | None) -> Dataset:
    name = column or next(n for n in ("label", "labels") if n in rows.column_names)
    kind = rows.features[name]
    other = rows.remove_columns(name).add_column(name, [label] * len(rows)).cast_column(name, kind)
    return other.select_columns(rows.column_names)


def backdoor(lab: Lab, seed: int) -> Prepared:
    experiment = lab.experiment
    half = len(experiment.forget) // 2
    stamped = triggered(experiment.forget.select(range(half)))
    forget = concatenate_datasets([stamped, experiment.forget.select(range(half, len(experiment.forget)))])
    return experiment.new_bench(seed, forget, experiment.retain), _towards(_target(lab))


def triggered(rows: Dataset) -> Dataset:
    """Rows with a trigger: a white square in the corner of every picture, or two odd words before every text."""
    name = next(
        n
        for n, kind in rows.features.items()
        if type(kind).__name__ == "Image" or getattr(kind, "dtype", "") == "string"
    )

    def stamp(row: Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(row[name], str):
            return {name: f"{_TRIGGER} {row[name]}"}
        picture = row[name].copy()
        side = max(2, min(picture.size) // 5)
        box = (picture.width - side, picture.height - side, picture.width - 1, picture.height - 1)
        ImageDraw.Draw(picture).rectangle(box, fill=255 if picture.mode == "L" else (255,) * len(picture.getbands()))
        return {name: picture}

    return rows.map(stamp, features=rows.features, load_from_cache_file=False, keep_in_memory=True)  # fmt: skip


# ---- damage ---------------------------------------------------------------------------------------------------------
def _damage(lab: Lab, bench: Workbench, model: PreTrainedModel) -> dict[str, Any]:
    """What happened to retained test rows: fall of AccDrt and of the worst class, gain of the attacker's class."""
    experiment, target = lab.experiment, _target(lab)
    labels = read_labels(experiment.test, experiment.config.label_column)
    others = experiment.test.select(np.flatnonzero(~np.isin(labels, [*experiment.forgotten, target])))
    kept = [c for c in _kept(lab) if c not in experiment.forgotten]
    seen: dict[str, dict[str, Any]] = {}
    for name, who in (("before", bench.original), ("after", model)):
        test = experiment.collect(bench, who, experiment.test, features=False)
        stamped = experiment.collect(bench, who, triggered(others), features=False)
        plain = np.isin(labels, [*experiment.forgotten, target])
        answers = test.logits.argmax(1).numpy()[~plain]
        seen[name] = {
            "AccDrt": macro_accuracy(test.logits, test.labels, kept) or 0.0,
            "classes": per_class_accuracy(test.logits, test.labels),
            "taken": float((answers == target).mean()),
            "triggered": float((stamped.logits.argmax(1) == target).float().mean()),
        }
    before, after = seen["before"], seen["after"]
    return {
        "fall": before["AccDrt"] - after["AccDrt"],
        "worst": max(before["classes"][c] - after["classes"][c] for c in kept if c in before["classes"]),
        "taken": after["taken"] - before["taken"],
        "triggered": after["triggered"] - before["triggered"],
    }


# ---- reading --------------------------------------------------------------------------------------------------------
def plot(points: Points) -> Figure:
    figure, axes = panels(3, 4.2)
    colours = (GREEN, "#e0b04f", ORANGE, BLUE, "#7b4ea3", GREY)
    for attack, colour in zip(different(points, "attack"), colours, strict=False):
        runs = [{**p, "place": p["budget"] or _NO_BUDGET} for p in matching(points, attack=attack, space="retained")]
        for one, key in zip(axes, ("fall", "triggered", "AccDut"), strict=True):
            curve(one, runs, "place", key, attack, colour)
    words = ("fall of AccDrt (points)", "more triggered rows answered as asked (points)", "AccDut (%)")
    for one, label in zip(axes, words, strict=True):
        ticks = [b or _NO_BUDGET for b in BUDGETS]
        one.set(xscale="log", xlabel="leak budget", ylabel=label)
        one.set_xticks(ticks, [f"{b:g}" if b else "none" for b in BUDGETS])
        one.minorticks_off()
    for one, key in zip(
        axes, ("fall", "triggered", "AccDut"), strict=True
    ):  # wide intervals of few seeds run off the picture
        heights = [
            100 * mean(matching(points, attack=a, space="retained", budget=b or 0.0), key)
            for a in different(points, "attack")
            for b in BUDGETS
        ]
        one.set_ylim(min(heights) - 3, max(heights) + 6)
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def paragraph(points: Points) -> str:
    attacks = [attack for attack in different(points, "attack") if attack != "honest"]
    default = 0.1 if 0.1 in BUDGETS else BUDGETS[-1]

    def of(attack: str, budget: float | None, space: str = "retained") -> Points:
        return matching(points, attack=attack, space=space, budget=budget or 0.0)

    def falls(budget: float | None, space: str = "retained") -> str:
        return ", ".join(f"{a} {percent(of(a, budget, space), 'fall')}" for a in ("honest", *attacks))

    text = (
        f"Fall of AccDrt in points at a leak budget of {default}: {falls(default)}; without null space and budget: "
        f"{falls(None, 'none')}. A backdoor makes {percent(of('backdoor', default), 'triggered')} points more of the "
        "triggered rows answer as the attacker wants. "
    )
    serves = [budget for budget in BUDGETS if mean(of("honest", budget), "AccDut") <= 0.01]
    if not serves:
        return text + "None of the budgets lets an honest request through."
    least = serves[0]
    worst = max(attacks, key=lambda attack: mean(of(attack, least), "fall"))
    cost = 100 * mean(of(worst, least), "fall")
    text += (
        f"The smallest budget that serves the honest request is {least or 'none'}; there the worst attack ({worst}) "
        f"costs {cost:.1f} points. "
    )
    if cost > 1:
        text += (
            "So the budget does not stop a dishonest request that moves outputs no further than an honest one: it "
            "bounds the mean change of layer outputs on held-out rows, not the fate of one class. What does: "
            "pseudo-labels from the model itself, never from the request, and a look at the retained classes in the "
            "report."
        )
    return text


register(
    Study(
        "poison",
        "How much damage can a request do?",
        measure,
        {"attack": "attack", "space": "space", "budget": "budget (0: none)"},
        {
            "AccDut": "AccDut",
            "AccDrt": "AccDrt",
            "fall": "fall of AccDrt",
            "worst": "worst class",
            "taken": "answered with the attacker's class",
            "triggered": "the same with trigger",
            "leak": "leak",
        },
        plot,
        paragraph,
    )
)
