"""The certificate: how far the retained rows' outputs moved, layer by layer and at the end."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..errors import UNSCError


@dataclass(frozen=True)
class LogitDrift:
    """Measured change of logits on the same rows.

    Attributes:
        relative: |z - z_0| / |z_0|, Frobenius, over all rows.
        largest: largest absolute change of one logit.
        agreement: share of rows whose most likely label is unchanged.
    """

    relative: float
    largest: float
    agreement: float


def logit_drift(before: Tensor, after: Tensor) -> LogitDrift:
    """Drift between two sets of logits of shape (rows, labels)."""
    if before.shape != after.shape:
        raise UNSCError(f"logits: shapes {tuple(before.shape)} and {tuple(after.shape)} differ; use the same rows.")
    change = (after.double() - before.double()).abs()
    return LogitDrift(
        relative=float(change.norm() / before.double().norm()),
        largest=float(change.max()),
        agreement=float((before.argmax(1) == after.argmax(1)).double().mean()),
    )


@dataclass(frozen=True)
class Certificate:
    """What was measured on held-out retained rows.

    Attributes:
        leak: relative change of the outputs of the trained layers, over all of them.
        leak_per_layer: the same for each layer by name.
        drift: measured change of the logits.
        rows: number of held-out data set rows.
        relative_change: norm of W - W_0 as a share of that of W_0, over the trained weights.
        max_leak: the budget it had to keep.
        stop_reason: why unlearning ended.
        merged: drift after the adapter is merged into the base weights, by the dtype they are then stored in ("float32",
            "bfloat16"); None without an adapter.
        held_out: False when the statistics were given by the caller and may contain these rows.
    """

    leak: float
    leak_per_layer: dict[str, float]
    drift: LogitDrift
    rows: int
    relative_change: float
    max_leak: float | None
    stop_reason: str | None
    held_out: bool = True
    merged: dict[str, LogitDrift] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        worst = max(self.leak_per_layer, key=lambda name: self.leak_per_layer[name]) if self.leak_per_layer else ""
        return (
            f"held-out leak {self.leak:.3g} (worst layer {worst}: {self.leak_per_layer.get(worst, 0.0):.3g}), "
            f"logit drift {self.drift.relative:.3g}, decisions unchanged {self.drift.agreement:.2%}, on {self.rows} rows"
        )
