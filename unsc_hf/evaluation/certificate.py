"""How much outputs of retained rows changed: the certificate, and flips, which are what a user of the model notices.

A retrained model has the same accuracy as the original and still answers some kept inputs differently. Flips are the
measure of regression-free model updates (Yan et al., "Positive-Congruent Training", CVPR 2021, arXiv 2011.09161), over
the remaining classes: the logits of forgotten classes are left out on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UNSCError


@dataclass(frozen=True)
class LogitDrift:
    """Measured change of logits on the same rows."""

    relative: float  #: `|z - z_0|` / `|z_0|`, Frobenius norms over all rows
    largest: float  #: largest absolute change of one logit
    agreement: float  #: share of rows whose most likely label is unchanged


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
class Flips:
    """Changed decisions on kept rows, as counts."""

    rows: int
    changed: int  #: rows whose most likely remaining class changed
    negative: int  #: rows that the first model answered rightly and the second does not
    positive: int  #: rows that the second model answers rightly and the first did not
    drift: float  #: `|z - z_0|` / `|z_0|` of the remaining logits, Frobenius, over all rows

    @property
    def share(self) -> float:
        """Changed rows as a share of all."""
        return self.changed / self.rows

    @property
    def negative_share(self) -> float:
        """The negative flip rate."""
        return self.negative / self.rows


def count_flips(before: Tensor, after: Tensor, labels: Tensor, forgotten: Sequence[int] = ()) -> Flips:
    """Compare two models' logits (rows, classes) on the same kept rows with true ids `labels` (rows,).

    UNSCError for logits of different shapes, no rows, or no class that remains.
    """
    if before.shape != after.shape or len(labels) != len(before):
        raise UNSCError(
            f"logits: shapes {tuple(before.shape)}, {tuple(after.shape)} for {len(labels)} labels; use the same rows."
        )
    kept = [c for c in range(before.shape[1]) if c not in set(forgotten)]
    if len(before) == 0 or not kept:
        raise UNSCError(f"logits: {len(before)} rows, {len(kept)} remaining classes; flips need at least one of each.")
    columns = torch.tensor(kept, device=before.device)
    old, new = before[:, columns].double(), after[:, columns].double()
    first, second = columns[old.argmax(1)], columns[new.argmax(1)]
    was_right, is_right = first == labels, second == labels
    return Flips(
        rows=len(before),
        changed=int((first != second).sum()),
        negative=int((was_right & ~is_right).sum()),
        positive=int((~was_right & is_right).sum()),
        drift=float((new - old).norm() / old.norm()),
    )


@dataclass(frozen=True)
class Certificate:
    """What was measured on held-out retained rows."""

    leak: float  #: relative change of the outputs of all trained layers together
    leak_per_layer: dict[str, float]  #: the same for each layer, by name
    drift: LogitDrift  #: measured change of the logits
    rows: int  #: number of held-out rows of the data set
    relative_change: float  #: `|W - W_0|` / `|W_0|` over the trained weights
    max_leak: float | None  #: the leak budget; None without one
    stop_reason: str | None  #: why unlearning ended
    held_out: bool = True  #: False when the caller gave the statistics, which may contain these rows
    #: Drift after the adapter is merged into the base weights, by the dtype they are then stored in ("float32",
    #: "bfloat16"); None without an adapter.
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
