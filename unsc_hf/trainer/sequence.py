"""Requests one after another: statistics are collected once and serve each request by subtraction.

Retained activations do not move (within the leak). So statistics of the original still describe the model that
earlier requests have left. Every request takes its rows' moments out of the stored statistics for good, and binds what
is left to the new weights. It adds an entry to their log: a salted hash of the rows, the time, and the certificate.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
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
from ..tasks import Task, make_task
from ..utils.fingerprint import row_digests, weight_hash
from .rows import check_arguments
from .trainer import UNSCTrainer


def open_statistics(
    folder: str | os.PathLike[str], model: PreTrainedModel, args: UNSCConfig, task: Task, forget: Dataset,
    retain: Dataset,
) -> ActivationStatistics:  # fmt: skip
    """Statistics of all rows that the model still knows, from `folder`; the first time they are collected.

    Raises:
        UNSCError: statistics of another model, or of other rows.
    """
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
        rows_per_direction=args.row_budget,
        progress=not args.disable_tqdm,
        num_workers=args.dataloader_num_workers,
        max_memory=args.max_statistics_memory,
    )
    _first_then_all(lambda: statistics.save_pretrained(folder))
    return statistics


def _first_then_all(write: Callable[[], None]) -> None:
    """One process calls `write`; the others wait for it."""
    state = PartialState()
    if state.is_main_process:
        write()
    state.wait_for_everyone()


def remaining_leak(statistics: ActivationStatistics, max_leak: float | None) -> float | None:
    """What earlier requests have left of the budget. Leaks of several requests add up at most.

    Raises:
        UNSCError: nothing is left.
    """
    if max_leak is None:
        return None
    spent = spent_leak(statistics.requests)
    if spent >= max_leak:
        raise UNSCError(
            f"max_leak: {len(statistics.requests)} requests have spent {spent:.3g} of the budget {max_leak:.3g}; "
            "raise it, or retrain and collect statistics again."
        )
    return max_leak - spent


def spent_leak(requests: Sequence[dict[str, Any]]) -> float:
    """Sum of the held-out leaks in a log of requests."""
    return sum(float(entry["leak"]) for entry in requests)


def request_digest(digests: Sequence[str], salt: str) -> str:
    """Salted SHA-256 over the rows of a request, in any order, 16 hexadecimal digits."""
    return hashlib.sha256("|".join([salt, *sorted(digests)]).encode()).hexdigest()[:16]


class StoredRequest:
    """One request that is served from statistics in a folder: open it, train, then save the model inside `commit`.

    Whenever the process is killed, the statistics in the folder fit the model before this request, or the one after it.

    Args:
        folder: where the statistics live; the first request collects them.
        model: as the previous request has left it.
        args: options; `max_leak` is the budget of all requests together.
        forget, retain: rows to forget and to keep; `retain` leaves out the rows of earlier requests.
        processing_class: image processor or tokenizer, for raw rows.

    Attributes:
        args: the same options with the leak budget that earlier requests have left.
        statistics: of the rows that stay.
        requests: the log, oldest first; this request is the last entry once it is committed.

    Raises:
        UNSCError: statistics of another model, a row that was forgotten before, or a spent budget.
    """

    def __init__(
        self, folder: str | os.PathLike[str], model: PreTrainedModel, args: UNSCConfig, forget: Dataset,
        retain: Dataset, processing_class: Any,
    ) -> None:  # fmt: skip
        self.folder, self._forget, self._committed = folder, forget, False
        task = make_task(model, args, forget, retain, processing_class)
        statistics = open_statistics(folder, model, args, task, forget, retain)
        self.requests, self._max_leak = list(statistics.requests), args.max_leak
        self.args = deepcopy(args)
        self.args.max_leak = remaining_leak(statistics, args.max_leak)
        self.statistics = self._without_forgotten(statistics, model, task)

    def _without_forgotten(
        self, statistics: ActivationStatistics, model: PreTrainedModel, task: Task
    ) -> ActivationStatistics:
        """Whole classes are dropped. Single rows are read once more by the model as it is now, and subtracted."""
        groups = task.groups(self._forget)
        if not task.whole_classes:
            return statistics.without_rows(
                model, self._forget, groups=groups, prepare=task.prepare, collate_fn=task.default_collator(),
                progress=False, max_memory=self.args.max_statistics_memory,
            )  # fmt: skip
        removed = statistics.fingerprint.refuse_removed(self._forget)
        return statistics.without_groups(np.unique(groups).tolist(), removed)

    @property
    def budget(self) -> dict[str, float | None]:
        """The leak budget of all requests, what earlier ones have spent of it, and this one once it is committed."""
        earlier = self.requests[:-1] if self._committed else self.requests
        this = spent_leak(self.requests[-1:]) if self._committed else None
        return {"max_leak": self._max_leak, "spent_by_earlier_requests": spent_leak(earlier), "spent": this}

    @contextmanager
    def commit(self, trainer: UNSCTrainer) -> Iterator[None]:
        """Log the request and bind the statistics to the unlearned weights; the body saves the model.

        The new statistics wait beside the old ones until the body has ended. Every process must enter. Entered again,
        for a second copy of the model, this logs nothing more.
        """
        weights = weight_hash(trainer.unwrapped())
        if not self._committed:
            requests = [*self.requests, self._entry(trainer)]
            if trainer.is_world_process_zero():
                self.statistics.bound_to(weights, requests).save_pretrained(self.folder, pending=True)
            self.requests, self._committed = requests, True
        yield
        if trainer.is_world_process_zero():
            settle(self.folder, weights)

    def _entry(self, trainer: UNSCTrainer) -> dict[str, Any]:
        certificate, salt = trainer.certify(), secrets.token_hex(8)
        return {
            "rows": len(self._forget),
            "salt": salt,
            "digest": request_digest(row_digests(self._forget), salt),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "leak": certificate.leak,
            "logit_drift": certificate.drift.relative,
            "agreement": certificate.drift.agreement,
            "stopped_by": certificate.stop_reason,
        }


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

    The first call reads all rows once and keeps the statistics in `statistics_dir`; later calls subtract. The unlearned
    model is saved in `args.output_dir/request-N`. Then the model of the request before is removed.

    Args:
        model: as the previous request has left it; it becomes the unlearned model.
        statistics_dir, args, forget_dataset, retain_dataset, processing_class: as for `StoredRequest`.
        unseen_dataset, options: as for `UNSCTrainer`.

    Returns:
        The trainer, after training. Its `args.max_leak` is what earlier requests had left of the budget.

    Raises:
        UNSCError: as `StoredRequest`; or adapters.
    """
    if options.get("peft_config") is not None:
        raise UNSCError(
            "peft_config: requests in sequence change the weights themselves; serve each with full weights, or merge "
            "the adapter and collect statistics again."
        )
    retain_dataset = check_arguments(args, forget_dataset, retain_dataset)
    stored = StoredRequest(statistics_dir, model, args, forget_dataset, retain_dataset, processing_class)
    trainer = UNSCTrainer(
        model, stored.args, forget_dataset, retain_dataset, processing_class=processing_class,
        statistics=stored.statistics, unseen_dataset=unseen_dataset, **options,
    )  # fmt: skip
    trainer.train()
    with stored.commit(trainer):
        number, folder = len(stored.requests), Path(str(args.output_dir))
        move_model(trainer, folder / f"request-{number}")
        if trainer.is_world_process_zero():
            finish(folder / f"request-{number}")
    if trainer.is_world_process_zero():
        # The model of the request before still knows what this one has forgotten.
        shutil.rmtree(folder / f"request-{number - 1}", ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return trainer
