"""Requests: time and memory of 1 to 50 of them, served one after another or in one batch."""

from __future__ import annotations

import shutil
import tempfile
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import PreTrainedModel

from ...evaluation.accuracy import macro_accuracy
from ...models.outputs import collect_outputs
from ...reporting.plots import BLUE, ORANGE
from ...trainer.sequence import serve_request
from ...trainer.trainer import UNSCTrainer
from .lab import Lab, Point, curve, different, matching, mean, panels, zoom
from .registry import Points, Study, register

COUNTS = (1, 2, 5, 10, 20, 50)
_ROWS = 10  # of each request
_EVERYTHING: dict[str, Any] = {"max_rows_per_class": None, "max_samples_per_class": None}  # rows are subtracted whole


def measure(lab: Lab) -> list[dict[str, Any]]:
    """Requests of ten rows each, drawn without repetition: all in one batch, and in sequence (`serve_request`)."""
    points = []
    for seed in lab.seeds:
        points += lab.points({"way": "in sequence", "seed": seed}, partial(_sequence, lab, seed))
        for count in COUNTS:
            if count * _ROWS < len(lab.experiment.train) // 2:
                tags = {"way": "in one batch", "requests": count, "seed": seed}
                points.append(lab.point(tags, partial(_batch, lab, seed, count)))
    return points


def _rows(lab: Lab, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).permutation(len(lab.experiment.train))


def _start(lab: Lab, seed: int) -> tuple[PreTrainedModel, Any, Any]:
    experiment, name = lab.experiment, lab.experiment.original(seed)
    config = deepcopy(experiment.config)
    config.seed, config.max_leak = seed, None  # what is measured is the cost; nothing may end a sequence early
    for option, value in _EVERYTHING.items():
        setattr(config, option, value)
    return experiment.load(name, "originals"), config, experiment.arguments.load_processor(name)


def _parts(lab: Lab, order: np.ndarray, start: int, stop: int) -> tuple[Dataset, Dataset]:
    return lab.experiment.train.select(np.sort(order[start:stop])), lab.experiment.train.select(np.sort(order[stop:]))


def _measured(lab: Lab, trainer: UNSCTrainer) -> dict[str, Any]:
    rows, size = trainer.task.prepare(lab.experiment.test), lab.experiment.config.per_device_eval_batch_size
    test = collect_outputs(trainer.model, rows, trainer.data_collator, batch_size=size)
    memory = psutil.Process().memory_info().rss / 2**20
    return {"memory": memory, "accuracy": macro_accuracy(test.logits, test.labels)}


def _batch(lab: Lab, seed: int, count: int) -> dict[str, Any]:
    model, config, processor = _start(lab, seed)
    forget, retain = _parts(lab, _rows(lab, seed), 0, count * _ROWS)
    started = time.perf_counter()
    trainer = UNSCTrainer(
        model, config, forget, retain, processing_class=processor, unseen_dataset=lab.experiment.validation
    )
    trainer.train()
    return {"seconds": time.perf_counter() - started, **_measured(lab, trainer)}


def _sequence(lab: Lab, seed: int) -> list[Point]:
    model, config, processor = _start(lab, seed)
    order, points, seconds = _rows(lab, seed), [], 0.0
    folder = Path(tempfile.mkdtemp())
    try:
        for i in range(min(max(COUNTS), len(order) // (2 * _ROWS))):
            forget, retain = _parts(lab, order, i * _ROWS, (i + 1) * _ROWS)
            started = time.perf_counter()
            trainer = serve_request(
                model,
                folder,
                config,
                forget,
                retain,
                processing_class=processor,
                unseen_dataset=lab.experiment.validation,
            )
            last = time.perf_counter() - started
            seconds += last
            if i + 1 in COUNTS:
                cost = {"seconds": seconds, "last": last}
                points.append(
                    {"way": "in sequence", "requests": i + 1, "seed": seed, **cost, **_measured(lab, trainer)}
                )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return points


def plot(points: Points) -> Figure:
    figure, axes = panels(3, 4.0)
    heights: dict[str, list[float]] = {"seconds": [], "memory": [], "accuracy": []}
    for way, colour in (("in sequence", BLUE), ("in one batch", ORANGE)):
        runs = [p for p in matching(points, way=way) if "requests" in p]
        for one, key, scale in zip(axes, ("seconds", "memory", "accuracy"), (1.0, 1.0, 100.0), strict=True):
            heights[key] += curve(one, runs, "requests", key, way, colour, scale)
    for one, label in zip(axes, ("seconds, summed", "memory of the process (MiB)", "test accuracy (%)"), strict=True):
        one.set(xlabel=f"requests of {_ROWS} rows", ylabel=label)
    for one, key in zip(axes[:2], ("seconds", "memory"), strict=True):
        one.set_ylim(0, 1.15 * max(heights[key], default=1.0))
    zoom(axes[2], heights["accuracy"], 5)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def paragraph(points: Points) -> str:
    sequence = [p for p in matching(points, way="in sequence") if "requests" in p]
    counts = sorted(different(sequence, "requests"))
    first, most = matching(sequence, requests=counts[0]), matching(sequence, requests=counts[-1])
    batch = matching(points, way="in one batch", requests=counts[-1])
    text = (
        f"{counts[-1]} requests of {_ROWS} rows take {mean(most, 'seconds'):.0f} seconds in sequence; the first "
        f"{mean(first, 'last'):.1f}, the last {mean(most, 'last'):.1f}. Memory goes from "
        f"{mean(first, 'memory'):.0f} to {mean(most, 'memory'):.0f} MiB, test accuracy from "
        f"{mean(first, 'accuracy'):.1%} to {mean(most, 'accuracy'):.1%}."
    )
    text += " No leak budget was set, so that all requests are served; with one, a sequence ends when it is spent."
    if batch:
        text += (
            f" The same rows in one batch take {mean(batch, 'seconds'):.0f} seconds and leave "
            f"{mean(batch, 'accuracy'):.1%}."
        )
    return text


register(
    Study(
        "requests",
        "What do many requests cost?",
        measure,
        {"way": "way", "requests": "requests"},
        {"seconds": "seconds", "last": "seconds of the last", "memory": "MiB", "accuracy": "test accuracy"},
        plot,
        paragraph,
    )
)
