"""How much calibration needs: forgotten rows in a step of unlearning."""

from __future__ import annotations

from collections.abc import Iterator

from .study import Lab, Panel, Point, Points, study

_BATCHES = (8, 16, 32, 64, 128, 256, 512)


def _conclude(points: Points) -> str:
    return (
        f"AccDrt in percent by rows in a step: {points.listed('batch', 'AccDrt')}. AccDut: "
        f"{points.listed('batch', 'AccDut')}."
    )


@study(
    "How many rows does a step need?",
    tags={"batch": "rows in a step"},
    panels=[Panel(y, "batch", log="x") for y in ("AccDrt", "AccDut")],
    conclude=_conclude,
)
def calibration(lab: Lab) -> Iterator[Point]:
    """Batch sizes 8 to 512."""
    for seed in lab.seeds:
        for rows in _BATCHES:
            yield lab.run({"batch": rows}, seed, per_device_train_batch_size=rows)
