"""The rows of an unlearning run: which are trained on, which are held out, and how they are fed to the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..config import UNSCConfig
from ..data.columns import read_labels
from ..data.copies import without_copies, without_overlap
from ..data.inputs import CachedRows, Collator
from ..data.selection import evenly_spaced, hold_out
from ..errors import UNSCError
from ..models.hooks import model_inputs
from ..models.outputs import Outputs, collect_outputs, iterate_outputs
from ..tasks import Task
from ..utils.reserve import check_writable

logger = logging.getLogger(__name__)

MAX_VALIDATION_ROWS = 1_000  # more rows would make checks slow and tell no more than a tenth of a percent
LEAST_SPREAD = 1e-3  # of the outputs on retained rows, relative to their size
_CACHE = 128 * 2**20  # bytes of prepared rows of one data set that stay in memory
MAX_LOGITS = 25_000_000  # logits of kept rows that are remembered; a language model gives them for every token


@dataclass(frozen=True)
class UnlearningRows:
    """Raw rows of one request.

    Attributes:
        forget: rows to forget that are trained on.
        forget_validation: rows to forget that checks read; the same rows where single rows are forgotten.
        retain: rows to keep, for the statistics and for rehearsal.
        retain_held_out: rows to keep that neither statistics nor training read; checks read them.
        certificate: rows to keep that nothing reads before the certificate.
        certificate_unseen: whether the caller gave these, as rows that the original never saw.
        holds_out: False where there are too few retained rows to hold any out, or all of those are copies of others.
        caveats: what a reader of the results must know, in sentences.
    """

    forget: Dataset
    forget_validation: Dataset
    retain: Dataset
    retain_held_out: Dataset
    certificate: Dataset
    certificate_unseen: bool
    holds_out: bool
    caveats: tuple[str, ...]

    @classmethod
    def of(
        cls,
        forget: tuple[Dataset, Dataset],
        retain: Dataset,
        strata: Callable[[Dataset], np.ndarray],
        args: UNSCConfig,
        certificate: Dataset | None = None,
    ) -> UnlearningRows:
        """Hold out retained rows of every stratum, for checks and for the certificate.

        Args:
            forget: rows to forget, already split into trained and validation rows.
            retain: rows to keep.
            strata: stratum of each row of a data set.
            certificate: rows for the certificate, where the caller has some that the original never saw.
        """
        fraction, seed, given = args.validation_fraction, args.seed, certificate is not None
        kept, held_out = hold_out(retain, fraction, strata(retain), MAX_VALIDATION_ROWS, seed)
        if certificate is None:
            share = min(fraction / (1 - fraction), 0.5)  # as many rows as the checks have
            kept, certificate = hold_out(kept, share, strata(kept), MAX_VALIDATION_ROWS, seed + 1)
        caveats: list[str] = []
        validation, _ = _unlike(*forget, "held-out rows to forget", args.text_columns, caveats)
        apart, checked = _unlike(kept, held_out, "held-out rows to keep", args.text_columns, caveats)
        proof, unread = _unlike(kept, certificate, "rows of the certificate", args.text_columns, caveats)
        return cls(forget[0], validation, kept, apart, proof, given and unread, checked and unread, tuple(caveats))


def _unlike(
    trained: Dataset, held_out: Dataset, name: str, text_columns: Sequence[str] | None, caveats: list[str]
) -> tuple[Dataset, bool]:
    """Held-out rows that are no copies of trained ones, and whether there are any: if not, all held-out rows.

    A sentence about copies is added to `caveats`.
    """
    if held_out is trained:
        return held_out, False
    unlike = without_copies(held_out, trained, text_columns)
    copied = len(held_out) - len(unlike)
    if copied:
        rest = "." if len(unlike) else "; no other was held out."
        caveats.append(f"{copied} of {len(held_out)} {name} are copies of training rows, so they do not count{rest}")
        logger.warning(caveats[-1])
    return (unlike, True) if len(unlike) else (held_out, False)


class ModelReader:
    """Runs models on raw rows: prepares them, makes batches, and collects outputs.

    Attributes:
        prepared: rows that were made ready for the model, by fingerprint of the raw ones.
    """

    def __init__(
        self,
        task: Task,
        args: UNSCConfig,
        collate_inputs: Collator,
        input_names: Sequence[str],
    ) -> None:
        """`collate_inputs` makes a batch of what the model reads; `input_names` are the names of its inputs."""
        self.task, self.args, self.prepared = task, args, dict[str, CachedRows]()
        self._collate_inputs = collate_inputs
        self._known = {*input_names, "label", "labels", "label_ids"}

    def prepare(self, dataset: Dataset) -> CachedRows:
        """Rows ready for the model. Equal selections of one data set have one fingerprint, and are prepared once."""
        key = str(dataset._fingerprint)
        if key not in self.prepared:
            self.prepared[key] = CachedRows(self.task.prepare(dataset), _CACHE)
        return self.prepared[key]

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Batch of what the model reads, with pseudo-labels and retained rows where the rows carry them."""
        column = self.task.label_column
        features = []
        for row in rows:
            feature = {name: value for name, value in row.items() if name in self._known}
            if column is not None and column not in self._known and column in row:
                feature["labels"] = row[column]
            features.append(feature)
        batch = dict(self._collate_inputs(features))
        if "pseudo_labels" in rows[0]:
            self.task.collate_targets(batch, rows)
        if "retain" in rows[0]:
            batch["retain"] = self.collate([row["retain"] for row in rows])
        return batch

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the model reads of a batch, on its device."""
        return model_inputs(batch, self.args.device)

    def iterate(
        self, model: nn.Module, dataset: Dataset, description: str, features: bool = False
    ) -> Iterator[Outputs]:
        """Outputs batch by batch."""
        options = self._options(description, features)
        return iterate_outputs(model, self.prepare(dataset), self.collate, **options)

    def outputs(self, model: nn.Module, dataset: Dataset, description: str, features: bool = False) -> Outputs:
        """Outputs on all rows; of a language model on as many rows as fit in memory."""
        limit = None if self.task.label_column is not None else MAX_LOGITS
        options = self._options(description, features)
        return collect_outputs(model, self.prepare(dataset), self.collate, max_elements=limit, **options)

    def _options(self, description: str, features: bool) -> dict[str, Any]:
        return {
            "features": features,
            "batch_size": self.args.per_device_eval_batch_size,
            "progress": not self.args.disable_tqdm,
            "description": description,
            "read": self.task.outputs,
        }


def at_most(dataset: Dataset, rows: int) -> Dataset:
    """So many rows, evenly spaced; all where there are fewer."""
    return dataset.select(evenly_spaced(np.arange(len(dataset)), rows))


class RelabelledDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """The rows that are trained on: forget rows with their targets, as a task's `targets` gives them for each row.

    With `retained`, every row also brings one of those along, under "retain". They are drawn anew for each epoch from
    `seed`, so that a resumed run meets the same ones, however far batches were read ahead.
    """

    def __init__(
        self, dataset: Dataset, targets: Sequence[dict[str, Tensor]], retained: Dataset | None = None, seed: int = 0
    ) -> None:
        if len(targets) != len(dataset):
            raise RuntimeError(f"{len(targets)} targets for {len(dataset)} rows")
        self.dataset, self.targets, self.retained, self.seed = dataset, targets, retained, seed
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Draw the retained rows of an epoch: `drawn` holds one row number for each forget row."""
        if self.retained is not None:
            self.drawn = np.random.default_rng([self.seed, epoch]).integers(len(self.retained), size=len(self.dataset))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        rows = self.dataset.__getitems__(indices)
        result = [{**row, **self.targets[i]} for row, i in zip(rows, indices, strict=True)]
        if self.retained is not None:
            drawn = self.drawn[indices].tolist()
            for row, extra in zip(result, self.retained.__getitems__(drawn), strict=True):
                row["retain"] = extra
        return result


def check_arguments(args: object, forget_dataset: object, retain_dataset: object) -> Dataset:
    """The rows to keep, without copies of rows to forget where these are to be dropped.

    Raises:
        UNSCError: arguments of other types, data sets without rows, rows on both sides, or a folder that is read-only.
    """
    if not isinstance(args, UNSCConfig):
        raise UNSCError(f"args: got {type(args).__name__}, expected a UNSCConfig.")
    for name, dataset in (("forget_dataset", forget_dataset), ("retain_dataset", retain_dataset)):
        if not isinstance(dataset, Dataset):
            raise UNSCError(f"{name}: got {type(dataset).__name__}, expected a datasets.Dataset; see split_dataset.")
        if len(dataset) == 0:
            raise UNSCError(f"{name}: has no rows; unlearning needs rows to forget and rows to keep.")
    check_writable(str(args.output_dir))
    return without_overlap(forget_dataset, retain_dataset, args.drop_overlap, args.text_columns)


def prepare_evaluation(eval_dataset: Dataset | dict[str, Dataset] | None, task: Task) -> Any:
    """Evaluation rows ready for the model.

    Raises:
        UNSCError: rows called "forget" of other classes than those that are forgotten.
    """
    if not isinstance(eval_dataset, dict):
        return None if eval_dataset is None else task.prepare(eval_dataset)
    if task.whole_classes and task.label_column is not None and "forget" in eval_dataset:
        labels = read_labels(eval_dataset["forget"], task.label_column)
        other = labels[~np.isin(labels, task.forgotten_classes)]
        if len(other):
            names = dict(enumerate(task.class_names))
            raise UNSCError(
                f"eval_dataset: {len(other)} of {len(labels)} rows of 'forget' are of other classes than those to "
                f"forget, such as {names.get(int(other[0]), int(other[0]))!r}; take both parts from split_dataset."
            )
    return {name: task.prepare(part) for name, part in eval_dataset.items()}


def check_variety(logits: Tensor) -> None:
    """Refuse retained rows that a model hardly tells apart: nothing but their mean would be protected.

    Args:
        logits: of the original model on some of them, (positions, labels).

    Raises:
        UNSCError: says how little they differ.
    """
    values = logits.double()
    spread = float((values - values.mean(0)).norm() / values.norm().clamp(min=1e-300))
    if len(values) > 1 and spread < LEAST_SPREAD:
        raise UNSCError(
            f"retain_dataset: the model's outputs on {len(values)} of its rows differ by {spread:.2g} of their size, "
            "so hardly anything would be protected; give rows to keep that differ."
        )


def cast_floats(batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same tensors, floating ones in another precision."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}


def cast_inputs(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: floating inputs in the precision the model is in at that moment."""
    given = {str(i): value for i, value in enumerate(args)} | kwargs
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    cast = {**given, **cast_floats(tensors, model.dtype)}
    return tuple(cast[str(i)] for i in range(len(args))), {name: cast[name] for name in kwargs}
