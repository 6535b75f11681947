"""Requests: time and memory of 1 to 50 of them, served one after another or in one batch."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import psutil

from ...evaluation.accuracy import macro_accuracy
from ...models.outputs import collect_outputs
from ...trainer.sequence import serve_request
from ...trainer.trainer import UNSCTrainer
from .study import Lab, Panel, Point, Points, study

COUNTS = (1, 2, 5, 10, 20, 50)
_ROWS = 10  # of each request


def _conclude(points: Points) -> str:
    sequence, batches = (points.where(way=way).by("requests") for way in ("in sequence", "in one batch"))
    first, last = sequence[min(sequence)], sequence[max(sequence)]
    text = (
        f"{max(sequence)} requests of {_ROWS} rows take {last.mean('seconds'):.0f} seconds in sequence (the first "
        f"{first.mean('last'):.1f}, the last {last.mean('last'):.1f}), memory goes from {first.mean('memory'):.0f} to "
        f"{last.mean('memory'):.0f} MiB, test accuracy from {first.percent('accuracy')} to "
        f"{last.percent('accuracy')} %."
    )
    most = batches[max(batches)]
    return text + (
        f" {max(batches)} in one batch take {most.mean('seconds'):.0f} seconds and leave {most.percent('accuracy')} %."
    )


@study(
    "What do many requests cost?",
    tags={"way": "way", "requests": f"requests of {_ROWS} rows"},
    panels=[Panel(y, "requests", by="way") for y in ("seconds", "memory", "accuracy")],
    conclude=_conclude,
    numbers={
        "seconds": "seconds", "last": "seconds of the last", "memory": "MiB", "accuracy": "test accuracy (%)",
    },
)  # fmt: skip
def requests(lab: Lab) -> Iterator[Point]:
    """Requests of ten rows each, drawn without repetition: all in one batch, and in sequence (`serve_request`)."""
    for seed in lab.seeds:
        yield from lab.points({"way": "in sequence", "seed": seed}, partial(_sequence, lab, seed))
        for count in COUNTS:
            if count * _ROWS < len(lab.experiment.train) // 2:
                tags = {"way": "in one batch", "requests": count, "seed": seed}
                yield lab.point(tags, partial(_batch, lab, seed, count))


def _server(lab: Lab, seed: int, serve: Callable[..., UNSCTrainer]) -> Callable[[int, int], tuple[float, Point]]:
    """Serves the rows from `start` to `stop` of a random order; returns the seconds, and what is measured then.

    The leak has no budget, because the cost is measured and nothing may end a sequence early. The statistics read every
    row, so that rows can be subtracted from them.
    """
    experiment, name = lab.experiment, lab.experiment.original(seed)
    config = experiment.seeded(seed, max_leak=None, max_rows_per_class=None, max_samples_per_class=None)
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
