"""The certificate: how much the outputs of retained rows changed, in each layer and in the logits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..errors import UNSCError


@dataclass(frozen=True)
class LogitDrift:
    """Measured change of logits on the same rows."""

    relative: float  #: `|z - z_0|` / `|z_0|`, Frobenius norms over all rows
    largest: float  #: largest absolute change of one logit
    agreement: float  #: share of rows whose most likely label is unchanged


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
    """What was measured at the end, on retained rows that nothing else has read."""

    leak: float  #: relative change of all trained layers' outputs, each fed what it had before; on the checks' rows
    leak_per_layer: dict[str, float]  #: the same for each layer, by name
    drift: LogitDrift  #: measured change of the logits
    rows: int  #: number of certificate rows
    relative_change: float  #: `|W - W_0|` / `|W_0|` over the trained weights
    max_leak: float | None  #: the leak budget; None without one
    stop_reason: str | None  #: why unlearning ended
    #: Rows of which the most likely remaining class changed; of a language model, answers with any changed token.
    flips: int = 0
    #: With 95 % confidence at most this share of inputs drawn like these rows changes its decision. True of any network
    #: and any update; see `evaluation.flips.upper_bound`.
    upper_95: float = 1.0
    #: Relative change of the same layers' outputs inside the unlearned network, where their inputs have moved too. None
    #: where it cannot be measured.
    network_leak: float | None = None
    amplification: float | None = None  #: `network_leak / leak`: how much a change grows from layer to layer
    max_flips: float | None = None  #: the budget of changed decisions; None without one
    held_out: bool = True  #: False when the caller gave the statistics, which may contain these rows
    unseen: bool = False  #: whether the original never saw these rows, as the caller says; else it was trained on them
    #: Drift after the adapter is merged into the base weights, by the dtype they are then stored in ("float32",
    #: "bfloat16"); None without an adapter.
    merged: dict[str, LogitDrift] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        worst = max(self.leak_per_layer, key=lambda name: self.leak_per_layer[name]) if self.leak_per_layer else ""
        return (
            f"held-out leak {self.leak:.3g} (worst layer {worst}: {self.leak_per_layer.get(worst, 0.0):.3g}), "
            f"logit drift {self.drift.relative:.3g}, {self.flips} of {self.rows} decisions changed: with 95 % "
            f"confidence at most {self.upper_95:.2%} of such {'inputs' if self.unseen else 'training rows'}"
        )
