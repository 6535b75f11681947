"""Requests: time and memory of 1 to 50 of them, served one after another or in one batch."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import psutil
from matplotlib.figure import Figure

from ...evaluation.accuracy import macro_accuracy
from ...models.outputs import collect_outputs
from ...reporting.plots import BLUE, ORANGE
from ...trainer.sequence import serve_request
from ...trainer.trainer import UNSCTrainer
from .study import Lab, Point, Points, Study, curves, legend, panels, register, zoom

COUNTS = (1, 2, 5, 10, 20, 50)
_ROWS = 10  # of each request
_COLOURS = {"in sequence": BLUE, "in one batch": ORANGE}


@register
class RequestStudy(Study):
    """Requests of ten rows each, drawn without repetition: all in one batch, and in sequence (`serve_request`)."""

    name = "requests"
    title = "What do many requests cost?"
    tags = {"way": "way", "requests": "requests"}
    numbers = {"seconds": "seconds", "last": "seconds of the last", "memory": "MiB", "accuracy": "test accuracy"}

    def measure(self, lab: Lab) -> list[Point]:
        points, most = [], len(lab.experiment.train) // 2
        for seed in lab.seeds:
            points += lab.points({"way": "in sequence", "seed": seed}, partial(_sequence, lab, seed))
            for count in COUNTS:
                if count * _ROWS < most:
                    tags = {"way": "in one batch", "requests": count, "seed": seed}
                    points.append(lab.point(tags, partial(_batch, lab, seed, count)))
        return points

    def plot(self, points: Points) -> Figure:
        figure, axes = panels(3, 4.0)
        panel = {"seconds": "seconds, summed", "memory": "memory of the process (MiB)", "accuracy": "test accuracy (%)"}
        for one, (key, label) in zip(axes, panel.items(), strict=True):
            lines = [(way, points.where(way=way), key, colour) for way, colour in _COLOURS.items()]
            scale = 100.0 if key == "accuracy" else 1.0
            heights = curves(one, "requests", lines, scale, xlabel=f"requests of {_ROWS} rows", ylabel=label)
            if key == "accuracy":
                zoom(one, heights, 5)
            else:
                one.set_ylim(0, 1.15 * max(heights, default=1.0))
        legend(axes[0])
        return figure

    def paragraph(self, points: Points) -> str:
        sequence = points.where(way="in sequence").by("requests")
        first, most = sequence[min(sequence)], sequence[max(sequence)]
        text = (
            f"{max(sequence)} requests of {_ROWS} rows take {most.mean('seconds'):.0f} seconds in sequence; the first "
            f"{first.mean('last'):.1f}, the last {most.mean('last'):.1f}. Memory goes from "
            f"{first.mean('memory'):.0f} to {most.mean('memory'):.0f} MiB, test accuracy from "
            f"{first.mean('accuracy'):.1%} to {most.mean('accuracy'):.1%}. No leak budget was set, so that all "
            "requests are served; with one, a sequence ends when it is spent."
        )
        batch = points.where(way="in one batch", requests=max(sequence))
        if batch:
            text += f" The same rows in one batch take {batch.mean('seconds'):.0f} seconds and leave "
            text += f"{batch.mean('accuracy'):.1%}."
        return text


def _server(lab: Lab, seed: int, serve: Callable[..., UNSCTrainer]) -> Callable[[int, int], tuple[float, Point]]:
    """Serves the rows from `start` to `stop` of a random order; returns the seconds, and what is measured then.

    The leak has no budget, because the cost is measured and nothing may end a sequence early. The statistics read every
    row, so that rows can be subtracted from them.
    """
    experiment, name = lab.experiment, lab.experiment.original(seed)
    config = experiment.seeded(seed, max_leak=None, rows_per_direction=None)
    order = np.random.default_rng(seed).permutation(len(experiment.train))
    model, processor = experiment.load(name, "originals"), experiment.arguments.load_processor(name)
    shared: dict[str, Any] = {"processing_class": processor, "unseen_dataset": experiment.validation}

    def run(start: int, stop: int) -> tuple[float, Point]:
        forget, retain = (experiment.train.select(np.sort(rows)) for rows in (order[start:stop], order[stop:]))
        started = time.perf_counter()
        trainer = serve(model, args=config, forget_dataset=forget, retain_dataset=retain, **shared)
        seconds = time.perf_counter() - started
        rows, size = trainer.task.prepare(experiment.test), config.per_device_eval_batch_size
        test = collect_outputs(trainer.model, rows, trainer.data_collator, batch_size=size)
        memory = psutil.Process().memory_info().rss / 2**20
        return seconds, {"memory": memory, "accuracy": macro_accuracy(test.logits, test.labels)}

    return run


def _batch(lab: Lab, seed: int, count: int) -> Point:
    def serve(*given: Any, **options: Any) -> UNSCTrainer:
        trainer = UNSCTrainer(*given, **options)
        trainer.train()
        return trainer

    seconds, measured = _server(lab, seed, serve)(0, count * _ROWS)
    return {"seconds": seconds, **measured}


def _sequence(lab: Lab, seed: int) -> list[Point]:
    points, total = [], 0.0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        run = _server(lab, seed, partial(serve_request, statistics_dir=folder))
        for i in range(min(max(COUNTS), len(lab.experiment.train) // (2 * _ROWS))):
            last, measured = run(i * _ROWS, (i + 1) * _ROWS)
            total += last
            if i + 1 in COUNTS:
                tags = {"way": "in sequence", "requests": i + 1, "seed": seed}
                points.append({**tags, "seconds": total, "last": last, **measured})
    return points
