"""The certificate: how much the outputs of retained rows changed, in each layer and in the logits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..errors import UNSCError


@dataclass(frozen=True)
class LogitDrift:
    """Measured change of logits on the same rows.

    Attributes:
        relative: |z - z_0| / |z_0|, Frobenius norms over all rows.
        largest: largest absolute change of one logit.
        agreement: share of rows whose most likely label is unchanged.
    """

    relative: float
    largest: float
    agreement: float


def logit_drift(before: Tensor, after: Tensor) -> LogitDrift:
    """Drift between the logits of the same rows, (rows, labels) each.

    Raises:
        UNSCError: when the shapes differ.
    """
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
    """What was measured on retained rows that nothing else has read, once, at the end.

    Attributes:
        leak: relative change of the outputs of all trained layers together, each fed the inputs it had before. The
            leak is measured on the held-out rows of the checks.
        leak_per_layer: the same for each layer, by name.
        drift: measured change of the logits.
        rows: number of certificate rows.
        flips: rows of which the most likely remaining class changed (of a language model: of which any answer token's
            most likely token changed).
        upper_95: with 95 % confidence, at most this share of inputs drawn like these rows changes its decision, for
            any network and any update (`evaluation.flips.upper_bound`).
        network_leak: relative change of the same layers' outputs inside the unlearned network, where inputs have moved
            too; None where it cannot be measured (sharded weights).
        amplification: `network_leak / leak`: how much a layer's own change grows by the layers before it.
        relative_change: `|W - W_0|` / `|W_0|` over the trained weights.
        max_leak, max_flips: the budgets; None without one.
        stop_reason: why unlearning ended.
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
    flips: int = 0
    upper_95: float = 1.0
    network_leak: float | None = None
    amplification: float | None = None
    max_flips: float | None = None
    held_out: bool = True
    merged: dict[str, LogitDrift] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        worst = max(self.leak_per_layer, key=lambda name: self.leak_per_layer[name]) if self.leak_per_layer else ""
        return (
            f"held-out leak {self.leak:.3g} (worst layer {worst}: {self.leak_per_layer.get(worst, 0.0):.3g}), "
            f"logit drift {self.drift.relative:.3g}, {self.flips} of {self.rows} decisions changed: with 95 % "
            f"confidence at most {self.upper_95:.2%} of such inputs"
        )
