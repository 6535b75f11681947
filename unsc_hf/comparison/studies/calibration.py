"""How much calibration needs: rows in a step of unlearning, and rows of the statistics for each direction."""

from __future__ import annotations

from collections.abc import Iterator

from .study import Lab, Panel, Point, Points, study

_BATCHES = (8, 16, 32, 64, 128, 256, 512)
_ROWS = (1, 3, 10, 30, 100)


def _conclude(points: Points) -> str:
    kept = {rows: runs.mean("AccDrt") for rows, runs in sorted(points.by("rows").items())}
    enough = next(rows for rows in kept if kept[rows] >= kept[max(kept)] - 0.005)
    return (
        f"AccDrt in percent by rows in a step: {points.listed('batch', 'AccDrt')}. From {enough} rows a direction "
        f"in the statistics on, it lies within half a point of what {max(kept)} give."
    )


@study(
    "How many rows do a step and the statistics need?",
    tags={"batch": "rows in a step", "rows": "rows of the statistics for each direction"},
    panels=[Panel(y, x, log="x") for x in ("batch", "rows") for y in ("AccDrt", "AccDut")],
    conclude=_conclude,
)
def calibration(lab: Lab) -> Iterator[Point]:
    """Batch sizes 8 to 512; statistics from 1 row a direction to 100."""
    for seed in lab.seeds:
        for rows in _BATCHES:
            yield lab.run({"batch": rows}, seed, per_device_train_batch_size=rows)
        for rows in _ROWS:
            yield lab.run({"rows": rows}, seed, rows_per_direction=rows)
