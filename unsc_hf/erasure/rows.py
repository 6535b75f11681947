"""The rows that erasure reads, and how they become batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..config import UNSCConfig
from ..data.dialogues import IGNORED
from ..data.inputs import default_collator, prepare_dataset
from ..data.selection import evenly_spaced
from ..tasks import Task
from .closed_form import Pair, differences, shared_pairs

logger = logging.getLogger(__name__)

Batch = Mapping[str, Any]

_FORGOTTEN_ROWS = 600  # forgotten rows that are read, and retained ones of a language model
_FORGOTTEN_ROWS_PER_CLASS = 100  # the least limit for a class, where many classes are forgotten
_ROWS_PER_CLASS = 150  # retained rows of each class that forgotten rows are re-labelled to
_OTHER_ROWS = 300  # retained rows of all other classes together: they count in the leak
_FEW_ROWS = 20  # with fewer retained rows the mean of a class is uncertain


@dataclass(frozen=True)
class FeatureRows:
    """The rows of a request, and what makes batches of them."""

    task: Task  # knows the classes of rows
    args: UNSCConfig  # says what to erase, and on which device
    forget: Dataset
    retain: Dataset
    held_out: Dataset  # forget rows held out for validation
    processor: Any  # tokenizer or image processor of the model, None where rows need none
    prepare: Callable[[Dataset], Any]
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def batches(self, rows: Dataset) -> list[Batch]:
        """Rows in batches on the device, in their order."""
        size, device = self.args.per_device_eval_batch_size, self.args.device
        loader = DataLoader(self.prepare(rows), size, collate_fn=self.collate, generator=torch.Generator())
        return [{name: value.to(device) for name, value in batch.items()} for batch in loader]

    def read_by(self, model: nn.Module, processor: Any) -> FeatureRows:
        """The same rows as another model reads them, with its own tokenizer or image processor.

        Rows that are no raw images or texts stay as they are.
        """
        if self.task.prepare(self.held_out).format["type"] != "custom":
            return self

        def prepare(rows: Dataset) -> Dataset:
            return prepare_dataset(rows, processor, model, self.args.label_column, self.args.text_columns)

        return replace(self, processor=processor, prepare=prepare, collate=default_collator(processor))


@dataclass(frozen=True)
class ErasureRows:
    """The rows that erasure reads, in batches on the model's device."""

    forgotten: Sequence[Batch]
    retained: Sequence[Batch]
    own: Tensor  # class of each forgotten reading row, (rows,)
    relabelled: Tensor  # the class that it is re-labelled to, (rows,)
    labels: Tensor  # classes of the retained reading rows, (rows,)
    pairs: Sequence[Pair]  # whose means are brought together, see `shared_pairs`
    answers: bool = False  # whether rows are the answer tokens of a language model

    def differences(self, forgotten: Tensor, retained: Tensor) -> Tensor:
        """Of class means (width, pairs), of what was read of the rows, (rows, width) each."""
        return differences(forgotten, self.own, self.relabelled, retained, self.labels, self.pairs)


def erasure_rows(rows: FeatureRows, pseudo_labels: Tensor | None) -> ErasureRows:
    """Choose evenly spaced rows to forget and to keep. None of them is held out.

    Pseudo-labels are ids (forget rows,) or distributions (forget rows, classes); None for a language model. UNSCError
    when no class has two rows of either kind.
    """
    own = rows.task.strata(rows.forget)
    classes = np.unique(own)
    limit = max(_FORGOTTEN_ROWS // len(classes), _FORGOTTEN_ROWS_PER_CLASS)
    chosen = np.sort(np.concatenate([evenly_spaced(np.flatnonzero(own == c), limit) for c in classes]))
    forgotten = rows.batches(rows.forget.select(chosen))
    if pseudo_labels is None:
        return _answer_rows(rows, forgotten)
    new = pseudo_labels[torch.from_numpy(chosen)]
    relabelled = new if new.dim() == 1 else new.argmax(1)
    mine, labels = torch.from_numpy(own[chosen]), rows.task.strata(rows.retain)
    pairs = shared_pairs(mine, relabelled, torch.from_numpy(labels))
    alone = sorted(set(classes.tolist()) - {c for c, _ in pairs})
    if alone:
        logger.warning(
            "Class %s is not erased: fewer than two of its rows have the same new label, so there is no mean to move.",
            alone[0],
        )
    shared = sorted({k for _, k in pairs})
    of_shared = [evenly_spaced(np.flatnonzero(labels == k), _ROWS_PER_CLASS) for k in shared]
    few = [k for k, part in zip(shared, of_shared, strict=True) if len(part) < _FEW_ROWS]
    if few:
        logger.warning("Class %s has fewer than %d retained rows: its mean is uncertain.", few[0], _FEW_ROWS)
    others = evenly_spaced(np.flatnonzero(~np.isin(labels, shared)), _OTHER_ROWS)
    kept = np.sort(np.concatenate([*of_shared, others]))
    retained = rows.batches(rows.retain.select(kept))
    return ErasureRows(forgotten, retained, mine, relabelled, torch.from_numpy(labels[kept]), pairs)


def _answer_rows(rows: FeatureRows, forgotten: Sequence[Batch]) -> ErasureRows:
    """Rows of a language model: all answer tokens are one group."""
    kept = evenly_spaced(np.arange(len(rows.retain)), _FORGOTTEN_ROWS)
    retained = rows.batches(rows.retain.select(kept))
    group, labels = (
        torch.zeros(sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in part), dtype=torch.long)
        for part in (forgotten, retained)
    )
    return ErasureRows(forgotten, retained, group, group, labels, shared_pairs(group, group, labels), True)
