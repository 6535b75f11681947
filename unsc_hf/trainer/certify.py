"""The end of a run: guards against silent no-ops and silent damage, and the certificate."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerState

from ..config import UNSCConfig
from ..errors import UNSCError
from ..evaluation.certificate import Certificate, LogitDrift, logit_drift
from ..nullspace.projection import Leak
from ..utils.precision import full_float32
from .goals import ForgettingGoal
from .preparation import UnlearningPlan
from .rows import ModelReader, UnlearningRows, cast_floats

logger = logging.getLogger(__name__)

LEAST_AGREEMENT = 0.5  # of decisions before and after: where more of them change, a small leak says nothing
_MUCH_LOST = 0.02  # of the accuracy on held-out retained rows: worth a warning


def check_outcome(
    plan: UnlearningPlan,
    goal: ForgettingGoal,
    args: UNSCConfig,
    state: TrainerState,
    stop_reason: str,
    frozen: Mapping[str, str],
    now: Mapping[str, str],
) -> None:
    """Raise where nothing was unlearned or a frozen weight moved; warn where the target or accuracy was missed.

    Args:
        frozen, now: hashes of the frozen weights by name, before and after.

    Raises:
        UNSCError: no weight moved.
        RuntimeError: a frozen weight has changed.
    """
    if not plan.projection.relative_change() > 0:
        raise UNSCError(
            f"learning_rate: {args.learning_rate} moved no weight within the leak budget (max_leak {args.max_leak}), "
            "so nothing was forgotten; lower it, or lower check_steps."
            if stop_reason == "leak_budget"
            else f"learning_rate: {args.learning_rate} moved no weight in {state.global_step} steps; raise it."
        )
    changed = [name for name, digest in now.items() if frozen.get(name) != digest]
    if changed:
        raise RuntimeError(f"{changed[0]}, a frozen weight or buffer, has changed while unlearning")
    if stop_reason != "target":
        logger.warning(
            "Unlearning ended (%s) before the target %s %.3g was reached.", stop_reason, goal.measure, goal.target
        )
    for sentence in nothing_to_forget(goal, state.log_history):
        logger.warning(sentence)
    kept = [entry["retain_accuracy"] for entry in state.log_history if "retain_accuracy" in entry]
    if kept and not args.is_control and kept[0] - kept[-1] > _MUCH_LOST:
        logger.warning(
            "Accuracy on held-out retained rows fell from %.4g to %.4g; objective 'unsc_retain', a higher energy or a "
            "lower learning_rate may keep more.",
            kept[0],
            kept[-1],
        )


def nothing_to_forget(goal: ForgettingGoal, history: Sequence[Mapping[str, float]]) -> list[str]:
    """A sentence where the target was reached before the first step, by the log of a run."""
    first = next((entry for entry in history if "forget_accuracy" in entry), None)
    known = None if first is None else first.get("exposure", first["forget_accuracy"])
    if known is None or known > goal.target:
        return []
    return [
        f"Before the first step the {goal.measure} was {known:.3g} already, and the target is {goal.target:.3g}: there "
        "was nothing to forget."
    ]


def certify(
    model: nn.Module,
    plan: UnlearningPlan,
    rows: UnlearningRows,
    reader: ModelReader,
    leak: Leak,
    max_leak: float | None,
    stop_reason: str | None,
    base_dtype: str,
    *,
    sharded: bool,
    control: bool,
) -> Certificate:
    """What is measured on the held-out retained rows.

    Args:
        model: the unlearned model, unwrapped.
        leak: on the same rows.
        max_leak: its limit; controls are measured, not limited.
        base_dtype: precision in which the original was loaded.
        sharded: sharded adapters are not merged for the measurement.

    Raises:
        UNSCError: the leak exceeds the limit, or most decisions changed.
    """
    logits = reader.outputs(model, rows.retain_held_out, "Certificate").logits
    merged = None
    if isinstance(model, PeftModel) and not sharded:
        merged = _merged_drift(model, plan, rows, reader, base_dtype)
    certificate = Certificate(
        leak=leak.total,
        leak_per_layer=leak.per_layer,
        drift=logit_drift(plan.held_out_logits, logits),
        rows=len(rows.retain_held_out),
        relative_change=plan.projection.relative_change(),
        max_leak=max_leak,
        stop_reason=stop_reason,
        merged=merged,
        held_out=plan.certifies_unseen,
    )
    agreement = certificate.drift.agreement
    if not control and agreement < LEAST_AGREEMENT:
        raise UNSCError(
            f"retain_dataset: {1 - agreement:.0%} of the decisions on {certificate.rows} held-out rows changed at a "
            f"leak of {leak.total:.2g}, so nothing is certified; give rows that differ more, or lower max_leak."
        )
    if not control and max_leak is not None and leak.total > max_leak:
        raise UNSCError(
            f"max_leak: the held-out leak is {leak.total:.4g}, above the limit {max_leak:.4g}; lower learning_rate or "
            "raise energy."
        )
    return certificate


def _merged_drift(
    model: PeftModel, plan: UnlearningPlan, rows: UnlearningRows, reader: ModelReader, base_dtype: str
) -> dict[str, LogitDrift]:
    """Drift on held-out rows once the adapter is merged, in float32 and cast to bfloat16; measured on a copy.

    A bfloat16 model is merged in float32 too. What that cast alone changes is not counted: the merged model is compared
    with the original in float32.
    """
    merged: Any = copy.deepcopy(model).float()

    def logits(network: nn.Module, dtype: torch.dtype) -> Tensor:
        cast = CastingReader(reader, dtype)
        return cast.outputs(network.to(dtype), rows.retain_held_out, "Merged").logits

    before = plan.held_out_logits
    if base_dtype != "float32":
        with merged.disable_adapter():
            before = logits(merged, torch.float32)
    with full_float32():
        merged = merged.merge_and_unload()
    return {
        "float32": logit_drift(before, logits(merged, torch.float32)),
        "bfloat16": logit_drift(plan.held_out_logits, logits(merged, torch.bfloat16)),
    }


class CastingReader(ModelReader):
    """A reader whose batches are cast to another floating precision."""

    def __init__(self, reader: ModelReader, dtype: torch.dtype) -> None:
        self.task, self.args, self.prepare = reader.task, reader.args, reader.prepare
        self._inner, self._dtype = reader, dtype

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return cast_floats(self._inner.collate(rows), self._dtype)
