"""How much calibration needs: rows in a step of unlearning, and retained rows read for the statistics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .study import Lab, Panel, Point, Points, study

_BATCHES = (8, 16, 32, 64, 128, 256, 512)
_ROWS = (10, 30, 100, 300, 1000, 3000)


def _conclude(points: Points) -> str:
    kept = {rows: runs.mean("AccDrt") for rows, runs in sorted(points.by("rows").items())}
    enough = next(rows for rows in kept if kept[rows] >= kept[max(kept)] - 0.005)
    return (
        f"AccDrt in percent by rows in a step: {points.listed('batch', 'AccDrt')}. From {enough} rows of each class in "
        f"the statistics on, it lies within half a point of what all {max(kept)} give."
    )


@study(
    "How many rows do a step and the statistics need?",
    tags={"batch": "rows in a step", "rows": "rows of a class in the statistics"},
    panels=[Panel(y, x, log="x") for x in ("batch", "rows") for y in ("AccDrt", "AccDut")],
    conclude=_conclude,
)
def calibration(lab: Lab) -> Iterator[Point]:
    """Batch sizes 8 to 512; statistics from 10 rows of each class to all of them."""
    most = int(np.bincount(lab.experiment.labels(lab.experiment.retain)).max())
    for seed in lab.seeds:
        for rows in _BATCHES:
            yield lab.run({"batch": rows}, seed, per_device_train_batch_size=rows)
        for rows in (*(rows for rows in _ROWS if rows < most), most):
            yield lab.run({"rows": rows}, seed, max_samples_per_class=rows, max_rows_per_class=None)
