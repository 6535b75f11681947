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
    half = len(lab.experiment.train) // 2
    for seed in lab.seeds:
        tags = {"way": "in sequence", "seed": seed}
        sizes = [_ROWS] * min(max(COUNTS), half // _ROWS)
        yield from lab.points(tags, partial(_sequence, lab, tags, sizes))
        for count in COUNTS:
            if count * _ROWS < half:
                tags = {"way": "in one batch", "requests": count, "seed": seed}
                yield lab.point(tags, partial(_batch, lab, seed, count))


def _sequence(lab: Lab, tags: Point, sizes: list[int]) -> list[Point]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        serve = partial(serve_request, statistics_dir=folder)
        served = enumerate(_serve(lab, tags["seed"], sizes, serve), 1)
        return [{**tags, "requests": i, **point} for i, point in served if i in COUNTS]


def _batch(lab: Lab, seed: int, count: int) -> Point:
    def serve(*given: Any, **options: Any) -> UNSCTrainer:
        trainer = UNSCTrainer(*given, **options)
        trainer.train()
        return trainer

    return next(_serve(lab, seed, [count * _ROWS], serve))


def _serve(lab: Lab, seed: int, sizes: list[int], serve: Callable[..., UNSCTrainer]) -> Iterator[Point]:
    """Serve so many rows of a random order after each other; what each takes, and what is measured then.

    The leak has no budget, because the cost is measured and nothing may end a sequence early. The statistics read every
    row, so that rows can be subtracted from them.
    """
    experiment, name = lab.experiment, lab.experiment.original(seed)
    config = experiment.seeded(seed, max_leak=None, rows_per_direction=None)
    order = np.random.default_rng(seed).permutation(len(experiment.train))
    model, processor = experiment.load(name, "originals"), experiment.arguments.load_processor(name)
    total = 0.0
    for stop, rows in zip(np.cumsum(sizes), sizes, strict=True):
        parts = order[stop - rows : stop], order[stop:]
        forget, retain = (experiment.train.select(np.sort(part)) for part in parts)
        started = time.perf_counter()
        trainer = serve(
            model, args=config, forget_dataset=forget, retain_dataset=retain, processing_class=processor,
            unseen_dataset=experiment.validation,
        )  # fmt: skip
        last = time.perf_counter() - started
        total += last
        prepared, size = trainer.task.prepare(experiment.test), config.per_device_eval_batch_size
        test = collect_outputs(trainer.model, prepared, trainer.data_collator, batch_size=size)
        memory, accuracy = psutil.Process().memory_info().rss / 2**20, macro_accuracy(test.logits, test.labels)
        yield {"seconds": total, "last": last, "memory": memory, "accuracy": accuracy}
