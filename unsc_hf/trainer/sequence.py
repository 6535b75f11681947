"""Requests one after another: statistics are collected once and serve each by subtraction.

Retained activations do not move (within the leak), so what was collected from the original still describes the model
that earlier requests have left. Every request takes its rows' moments out of the stored statistics for good, re-binds
them to the new weights, and adds a line to their log: what (size and salted hash), when, and with which certificate.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedModel

from ..config import UNSCConfig
from ..errors import UNSCError
from ..nullspace.statistics import ActivationStatistics
from ..nullspace.storage import settle
from ..reporting.run_folder import finish, move_model
from ..tasks import make_task
from ..utils.fingerprint import row_digests, weight_hash
from .trainer import UNSCTrainer


def open_statistics(
    folder: str | os.PathLike[str],
    model: PreTrainedModel,
    args: UNSCConfig,
    forget: Dataset,
    retain: Dataset,
    processing_class: Any,
) -> ActivationStatistics:
    """Statistics of all rows that the model still knows: read from `folder`, or collected now and kept there.

    Raises:
        UNSCError: statistics of another model, or of other rows.
    """
    task = make_task(model, args, forget, retain, processing_class)
    if Path(folder, "statistics.json").is_file():
        weights = weight_hash(model)
        _first_then_all(lambda: settle(folder, weights))
        statistics = ActivationStatistics.from_pretrained(folder)
        statistics.check_same_model(weights)
        statistics.fingerprint.refuse_removed(forget)
        return statistics
    rows = concatenate_datasets([forget, retain])
    statistics = ActivationStatistics.collect(
        model,
        rows,
        groups=task.groups(rows),
        prepare=task.prepare,
        collate_fn=task.default_collator(),
        target_modules=args.target_modules,
        batch_size=args.statistics_batch_size,
        max_rows_per_class=args.max_rows_per_class,
        max_samples_per_class=args.max_samples_per_class,
        progress=not args.disable_tqdm,
        num_workers=args.dataloader_num_workers,
        max_memory=args.max_statistics_memory,
    )
    _first_then_all(lambda: statistics.save_pretrained(folder))
    return statistics


def _first_then_all(write: Callable[[], None]) -> None:
    """One process writes, the others wait for it."""
    state = PartialState()
    if state.is_main_process:
        write()
    state.wait_for_everyone()


def without_request(
    statistics: ActivationStatistics,
    model: PreTrainedModel,
    args: UNSCConfig,
    forget: Dataset,
    retain: Dataset,
    processing_class: Any,
) -> ActivationStatistics:
    """What is left of the statistics when the rows to forget are taken out.

    Whole classes are dropped; single rows are read once more by the model as it is now, and subtracted.
    """
    task = make_task(model, args, forget, retain, processing_class)
    groups = task.groups(forget)
    if not task.whole_classes:
        return statistics.without_rows(
            model, forget, groups=groups, prepare=task.prepare, collate_fn=task.default_collator(), progress=False,
            max_memory=args.max_statistics_memory,
        )  # fmt: skip
    return statistics.without_groups(np.unique(groups).tolist(), statistics.fingerprint.refuse_removed(forget))


def remaining_leak(statistics: ActivationStatistics, max_leak: float | None) -> float | None:
    """What earlier requests have left of the budget; leaks of several requests add up at most.

    Raises:
        UNSCError: nothing is left.
    """
    if max_leak is None:
        return None
    spent = sum(float(entry["leak"]) for entry in statistics.requests)
    if spent >= max_leak:
        raise UNSCError(
            f"max_leak: {len(statistics.requests)} requests have spent {spent:.3g} of the budget {max_leak:.3g}; raise it, "
            "or retrain and collect statistics again."
        )
    return max_leak - spent


def record_request(
    statistics: ActivationStatistics, folder: str | os.PathLike[str], trainer: UNSCTrainer, forget: Dataset
) -> ActivationStatistics:
    """Bind what `without_request` left to the unlearned weights, and log the request.

    Beside the stored statistics the new ones wait until the model is saved and `settle` puts them in their place. Every process must
    call this; the first one writes.
    """
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    certificate = trainer.certify()
    salt = secrets.token_hex(8)
    entry = {
        "rows": len(forget),
        "salt": salt,
        "digest": request_digest(row_digests(forget), salt),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "leak": certificate.leak,
        "logit_drift": certificate.drift.relative,
        "agreement": certificate.drift.agreement,
        "stopped_by": certificate.stop_reason,
    }
    bound = statistics.bound_to(weight_hash(model), [*statistics.requests, entry])
    if trainer.is_world_process_zero():
        bound.save_pretrained(folder, pending=True)
    return bound


def request_digest(digests: Sequence[str], salt: str) -> str:
    """Salted SHA-256 over the rows of a request, in any order, 16 hexadecimal digits."""
    return hashlib.sha256("|".join([salt, *sorted(digests)]).encode()).hexdigest()[:16]


def request_folder(args: UNSCConfig, number: int) -> Path:
    """Where the model is that the request of this number, from 1, has left."""
    return Path(str(args.output_dir)) / f"request-{number}"


def serve_request(
    model: PreTrainedModel,
    statistics_dir: str | os.PathLike[str],
    args: UNSCConfig,
    forget_dataset: Dataset,
    retain_dataset: Dataset,
    processing_class: Any = None,
    unseen_dataset: Dataset | None = None,
    **options: Any,
) -> UNSCTrainer:
    """Serve one request of several: unlearn `forget_dataset` on the model that earlier requests have left.

    The first call reads all rows once and keeps the statistics in `statistics_dir`; later calls subtract. `max_leak` is
    the budget of all requests together. The unlearned model is saved in `args.output_dir/request-N` before its statistics take the
    place of the earlier ones and the model of the request before is removed: whenever the process is killed, the folder of statistics
    fits the model before this request, or the one after it.

    Args:
        model: as the previous request has left it; it becomes the unlearned model.
        statistics_dir: where the statistics live.
        args, forget_dataset, retain_dataset, processing_class, unseen_dataset, options: as for `UNSCTrainer`;
            `retain_dataset` leaves out the rows of earlier requests.

    Returns:
        The trainer, after training.

    Raises:
        UNSCError: statistics of another model, a row that was forgotten before, or a spent budget; adapters.
    """
    if options.get("peft_config") is not None:
        raise UNSCError(
            "peft_config: requests in sequence change the weights themselves; serve each with full weights, or merge the "
            "adapter and collect statistics again."
        )
    inputs = (args, forget_dataset, retain_dataset, processing_class)
    statistics = open_statistics(statistics_dir, model, *inputs)
    limit, args.max_leak = args.max_leak, remaining_leak(statistics, args.max_leak)
    try:
        left = without_request(statistics, model, *inputs)
        trainer = UNSCTrainer(
            model,
            args,
            forget_dataset,
            retain_dataset,
            processing_class=processing_class,
            statistics=left,
            unseen_dataset=unseen_dataset,
            **options,
        )
        trainer.train()
        bound = record_request(left, statistics_dir, trainer, forget_dataset)
        served = request_folder(args, len(bound.requests))
        move_model(trainer, served)
        if trainer.is_world_process_zero():
            finish(served)
            settle(statistics_dir, bound.fingerprint.weights)
            # The model of the request before still knows what this one has asked to forget.
            shutil.rmtree(request_folder(args, len(bound.requests) - 1), ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
    finally:
        args.max_leak = limit
    return trainer
