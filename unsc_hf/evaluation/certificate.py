"""The certificate: how much the outputs of retained rows changed, in each layer and in the logits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..errors import UNSCError


@dataclass(frozen=True)
class LogitDrift:
    """Measured change of logits on the same rows."""

    relative: float  # |z - z_0| / |z_0|, Frobenius norms over all rows
    largest: float  # largest absolute change of one logit
    agreement: float  # share of rows whose most likely label is unchanged


def logit_drift(before: Tensor, after: Tensor) -> LogitDrift:
    """Drift between the logits of the same rows, (rows, labels) each; UNSCError when the shapes differ."""
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
        leak, leak_per_layer: relative change of the outputs of all trained layers together, and of each by name.
        drift: measured change of the logits.
        rows: number of held-out rows of the data set.
        relative_change: `|W - W_0|` / `|W_0|` over the trained weights.
        max_leak, stop_reason: the leak budget, None without one, and why unlearning ended.
        held_out: False when the caller gave the statistics, which may contain these rows.
        merged: drift after the adapter is merged into the base weights, by the dtype they are then stored in
            ("float32", "bfloat16"); None without an adapter.
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
            f"logit drift {self.drift.relative:.3g}, decisions unchanged {self.drift.agreement:.2%}, "
            f"on {self.rows} rows"
        )
