"""The end of a run: guards against silent no-ops and silent damage, and the certificate."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerState

from ..config import UNSCConfig
from ..errors import UNSCError
from ..evaluation.certificate import Certificate, LogitDrift, logit_drift
from ..evaluation.flips import remaining_columns, upper_bound
from ..models.hooks import evaluation_mode, layer_outputs
from ..models.outputs import Outputs
from ..nullspace.projection import Leak
from ..reporting.tables import STOP_REASONS
from ..utils.precision import full_float32
from .goals import ForgettingGoal
from .preparation import UnlearningPlan, exact_rows
from .rows import ModelReader, UnlearningRows, at_most, cast_inputs

logger = logging.getLogger(__name__)

_NETWORK_ROWS = 64  # certificate rows on which all layers' outputs are compared at once
_FEWEST_FLIPS = 3  # a budget of fewer rows would be broken by a single odd one
_SAYS_LITTLE = 0.1  # a bound above this, without a flip, tells a user nothing
_EXACT_DRIFT = 1e-5  # relative, of float32 logits: some roundings
TRAINING_ROWS = (
    "The certificate counts rows that the original was trained on. Inputs that it never saw may change more often; "
    "rows given as certificate_dataset would tell."
)
_MUCH_LOST = 0.02  # of the accuracy on held-out retained rows: worth a warning


def check_outcome(
    plan: UnlearningPlan,
    goal: ForgettingGoal,
    state: TrainerState,
    stop_reason: str,
    frozen: Mapping[str, str],
    now: Mapping[str, str],
) -> None:
    """Raise where nothing was unlearned or a frozen weight moved; warn where the target or accuracy was missed.

    Args:
        frozen, now: hashes of the frozen weights by name, before and after.

    Raises:
        UNSCError: no weight moved, or weights are not finite.
        RuntimeError: a frozen weight has changed.
    """
    change, args = plan.projection.relative_change(), goal.args
    if not math.isfinite(change) and not args.is_control:  # a control may diverge; its figures say so
        raise UNSCError(f"learning_rate: {args.learning_rate} made weights infinite or not a number; lower it.")
    if change == 0:
        raise UNSCError(
            f"learning_rate: {args.learning_rate} moved no weight within the budgets (max_leak {args.max_leak}, "
            f"max_flips {args.max_flips}), so nothing was forgotten; lower it, or lower check_steps."
            if stop_reason in ("leak_budget", "flips_budget")
            else f"learning_rate: {args.learning_rate} moved no weight in {state.global_step} steps; raise it."
        )
    changed = [name for name, digest in now.items() if frozen.get(name) != digest]
    if changed:
        raise RuntimeError(f"{changed[0]}, a frozen weight or buffer, has changed while unlearning")
    if stop_reason != "target" and not args.is_control:
        logger.warning(
            "Unlearning ended by %s before the target was reached (%s %.3g%s).",
            STOP_REASONS[stop_reason], goal.measure, goal.target,
            f", loss at least {goal.least_loss:g}" if goal.least_loss else "",
        )  # fmt: skip
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
    if first is None or known is None or known > goal.target or first["forget_loss"] < goal.least_loss:
        return []
    return [
        f"Before the first step the {goal.measure} was {known:.3g} already, and the target is {goal.target:.3g}: there "
        "was nothing to forget."
    ]


def flips_budget(args: UNSCConfig, rows: int) -> float | None:
    """`max_flips` where so many rows can tell a share from chance: at least three may change."""
    budget = args.flips_budget
    return budget if budget is not None and budget * rows >= _FEWEST_FLIPS else None


def certify(
    model: nn.Module,
    plan: UnlearningPlan,
    rows: UnlearningRows,
    reader: ModelReader,
    leak: Leak,
    stop_reason: str | None,
    base_dtype: str,
    *,
    sharded: bool,
) -> Certificate:
    """What is measured on the rows of the certificate.

    Args:
        model: the unlearned model, unwrapped.
        leak: on the held-out rows of the checks.
        base_dtype: precision in which the original was loaded.
        sharded: sharded adapters are not merged for the measurement, and layers are not compared inside the network.

    Raises:
        UNSCError: a budget is exceeded (controls have none), or logits that `energy` 1.0 should keep have drifted.
    """
    args = reader.args
    if args.is_exact:
        _check_exactness(model, plan, rows, reader, base_dtype)
    after = reader.outputs(model, rows.certificate, "Certificate")
    count, flips = _changed_samples(plan.certificate, after, reader.task.forgotten_classes)
    merged = None
    if isinstance(model, PeftModel) and not sharded:
        merged = _merged_drift(model, plan, rows, reader, base_dtype)
    network = None if sharded else network_leak(model, plan, rows, reader)
    certificate = Certificate(
        leak=leak.total,
        leak_per_layer=leak.per_layer,
        drift=logit_drift(plan.certificate.logits, after.logits),
        rows=count,
        flips=flips,
        upper_95=upper_bound(flips, count),
        network_leak=network,
        amplification=None if network is None or leak.total == 0 else network / leak.total,
        relative_change=plan.projection.relative_change(),
        max_leak=args.max_leak,
        max_flips=args.max_flips,
        stop_reason=stop_reason,
        merged=merged,
        held_out=plan.certifies_unseen,
        unseen=rows.certificate_unseen,
    )
    if upper_bound(0, count) > _SAYS_LITTLE:
        logger.warning(
            "certificate: %d rows can show no less than %.2g changed decisions, even where none is seen; give more "
            "rows with certificate_dataset, or raise validation_fraction.",
            count,
            upper_bound(0, count),
        )
    if args.leak_budget is not None and leak.total > args.leak_budget:
        raise UNSCError(
            f"max_leak: the held-out leak is {leak.total:.4g}, above the limit {args.leak_budget:.4g}; lower "
            "learning_rate or raise energy."
        )
    budget = None if reader.task.label_column is None else flips_budget(args, count)
    if budget is not None and flips > budget * count:
        raise UNSCError(
            f"max_flips: {flips} of {count} decisions on kept rows changed, above the limit {budget:.4g}; "
            "raise displacement_decay or energy, or lower learning_rate."
        )
    return certificate


def _check_exactness(
    model: nn.Module, plan: UnlearningPlan, rows: UnlearningRows, reader: ModelReader, base_dtype: str
) -> None:
    """Refuse where rounding has grown from layer to layer until logits of retained rows moved."""
    if plan.exact_logits is None:
        return
    logits = reader.outputs(model, exact_rows(rows), "Exact rows").logits
    drift = logit_drift(plan.exact_logits, logits).relative
    limit = _EXACT_DRIFT * torch.finfo(getattr(torch, base_dtype)).eps / torch.finfo(torch.float32).eps
    if not drift <= limit:
        raise UNSCError(
            f"energy: 1.0 should keep the logits of retained rows, and their drift is {drift:.2g} (limit {limit:.2g}): "
            "layers amplified the rounding of a change this large; lower learning_rate, or raise displacement_decay."
        )


def _changed_samples(before: Outputs, after: Outputs, forgotten: Sequence[int]) -> tuple[int, int]:
    """Number of samples, and of those with a changed decision among the remaining classes."""
    columns = remaining_columns(before.logits, forgotten)
    changed = before.logits[:, columns].argmax(1) != after.logits[:, columns].argmax(1)
    if before.samples is None:
        return len(changed), int(changed.sum())
    samples = int(before.samples.max()) + 1  # of answer tokens; an answer counts once
    return len(torch.unique(before.samples)), int((torch.bincount(before.samples, changed.double(), samples) > 0).sum())


@torch.no_grad()
def network_leak(model: nn.Module, plan: UnlearningPlan, rows: UnlearningRows, reader: ModelReader) -> float:
    """Relative change of the trained layers' outputs on the same rows, in the unlearned network against the original.

    A layer's inputs have moved too, so this is larger than the leak, which feeds every layer what it had before.
    """
    layers, now = plan.projection.layers, plan.projection.snapshot()
    prepared = reader.prepare(at_most(rows.certificate, _NETWORK_ROWS))
    inputs = reader.inputs(reader.collate([prepared[i] for i in range(len(prepared))]))
    with evaluation_mode(model):
        after = layer_outputs(model, layers, inputs)
        plan.projection.restore()
        try:
            before = layer_outputs(model, layers, inputs)
        finally:
            plan.projection.restore(now)
    changed = sum(float((after[name] - before[name]).double().square().sum()) for name in before)
    whole = sum(float(output.double().square().sum()) for output in before.values())
    return math.sqrt(changed / whole) if whole > 0 else 0.0


def _merged_drift(
    model: PeftModel, plan: UnlearningPlan, rows: UnlearningRows, reader: ModelReader, base_dtype: str
) -> dict[str, LogitDrift]:
    """Drift on the certificate's rows once the adapter is merged, in float32 and cast to bfloat16; measured on a copy.

    A bfloat16 model is merged in float32 too. What that cast alone changes is not counted: the merged model is compared
    with the original in float32.
    """
    merged: Any = copy.deepcopy(model).float()
    merged.get_base_model().register_forward_pre_hook(cast_inputs, with_kwargs=True)

    def logits(network: nn.Module, dtype: torch.dtype) -> Tensor:
        return reader.outputs(network.to(dtype), rows.certificate, "Merged").logits

    before = plan.certificate.logits
    if base_dtype != "float32":
        with merged.disable_adapter():
            before = logits(merged, torch.float32)
    with full_float32():
        merged = merged.merge_and_unload()
    return {
        "float32": logit_drift(before, logits(merged, torch.float32)),
        "bfloat16": logit_drift(plan.certificate.logits, logits(merged, torch.bfloat16)),
    }
