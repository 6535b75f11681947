"""What a trainer does before its first step: read the original once, and fix layers, subspaces and targets."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from ..errors import UNSCError
from ..models.hooks import evaluation_mode, trace_layers
from ..models.layers import LayerSelection, find_layers
from ..models.outputs import Outputs, join_outputs
from ..nullspace.lora import LoraProjection
from ..nullspace.moments import SecondMoment
from ..nullspace.projection import NullSpaceProjection
from ..nullspace.rules import build_subspace, full_layers
from ..nullspace.statistics import ActivationStatistics
from ..nullspace.storage import mapped_moments
from ..nullspace.subspace import Subspace
from ..tasks import Task
from ..utils.fingerprint import data_fingerprint
from .goals import ForgettingGoal
from .rows import ModelReader, UnlearningRows, at_most, check_variety

logger = logging.getLogger(__name__)

POOL = "retain"  # the one group of statistics whose classes need not be told apart
_SHOWN = 32  # retained rows that show whether the model tells them apart
_EXACT_ROWS = 200  # rounding shows on any of them
STATISTICS_BATCH = 128  # samples per forward pass: larger batches are no faster, and take more memory


@dataclass(frozen=True)
class Spaces:
    """What the statistics of a run give.

    Attributes:
        subspace: retained subspace and null space of each layer input.
        held_out: second moments of held-out retained rows by key of `subspace`, for the leak.
        retained: statistics of the retained rows.
        forget_moments: second moments of the forget rows by key of `subspace`.
        seconds: time spent on the statistics.
    """

    subspace: Subspace
    held_out: dict[str, SecondMoment]
    retained: ActivationStatistics
    forget_moments: Mapping[str, SecondMoment]
    seconds: float

    @property
    def pooled(self) -> bool:
        """Whether the statistics are of exactly the retained rows of this run, so that the others are held out."""
        return POOL in self.retained.moments


@dataclass(frozen=True)
class UnlearningPlan:
    """Everything that is fixed before the first step, computed from the original model.

    Attributes:
        selection: the layers that are trained, and why every other parameter is frozen.
        subspace: retained subspace and null space of each layer input; without its bases while the model is trained.
        projection: projectors and starting weights.
        held_out: second moments of held-out retained rows by key, for the leak.
        held_out_logits: the original model's logits on the held-out retained rows.
        certificate: its outputs on the rows of the certificate.
        exact_logits: its logits on `exact_rows` of the statistics' rows, where `energy` 1.0 promises to keep them.
        targets: targets of the forget rows that are trained on, one dict for each row.
        certifies_unseen: whether the held-out rows are in none of the statistics.
        seconds: time spent on "statistics", "decomposition" and "pseudo_labels".
    """

    selection: LayerSelection
    subspace: Subspace
    projection: NullSpaceProjection
    held_out: dict[str, SecondMoment]
    held_out_logits: Tensor
    certificate: Outputs
    exact_logits: Tensor | None
    targets: list[dict[str, Tensor]]
    certifies_unseen: bool
    seconds: dict[str, float]

    @property
    def pseudo_labels(self) -> Tensor:
        """New label, or distribution, of each forget row of a classifier, (rows,) or (rows, labels)."""
        return torch.stack([row["pseudo_labels"] for row in self.targets])

    def released(self, folder: str | os.PathLike[str]) -> UnlearningPlan:
        """Without what only the preparation needed, and with what only checks need put into files of `folder`.

        Every moment and basis is as large as a layer's width squared.
        """
        self.projection.keep_on_disk(folder)
        return replace(self, subspace=self.subspace.without_bases(), held_out=mapped_moments(self.held_out, folder))


class Preparation:
    """Reads the original model once. `UNSCTrainer.preparation` makes it; a subclass may share what it reads.

    Args:
        model: the original model, unwrapped.
        goal, rows, reader: the parts of the run.
        weights: hash of the model's weights.
        statistics: the caller's, or the folder they were saved in; None to collect them.
    """

    def __init__(
        self, model: nn.Module, goal: ForgettingGoal, rows: UnlearningRows, reader: ModelReader, weights: str,
        statistics: ActivationStatistics | str | os.PathLike[str] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.goal, self.args, self.task = model, goal, goal.args, goal.task
        self.rows, self.reader, self.weights, self.statistics = rows, reader, weights, statistics

    def plan(self) -> tuple[UnlearningPlan, Spaces]:
        """Fix everything.

        Raises:
            UNSCError: no protectable layer, no layer with capacity left, or statistics of another model.
        """
        selection = self.select_layers()
        started = time.perf_counter()
        spaces = self.spaces(selection)
        decomposed = time.perf_counter()
        selection = self._with_capacity(selection, spaces.subspace)
        projection = self._projection(selection, spaces)
        by_mean = self.goal.pseudo_labels == "nearest_mean"
        retain = self.outputs(self.rows.retain_held_out, "Held-out logits", features=by_mean)
        check_variety(self.outputs(at_most(self.rows.retain, _SHOWN), "Variety").logits)
        targets = self.targets(retain if by_mean else None)
        self.goal.fix(self.model, self.reader, self.rows)
        plan = UnlearningPlan(
            selection=selection,
            subspace=spaces.subspace,
            projection=projection,
            held_out=spaces.held_out,
            held_out_logits=retain.logits,
            certificate=self.outputs(self.rows.certificate, "Certificate rows"),
            exact_logits=self.outputs(exact_rows(self.rows), "Exact rows").logits if self.args.is_exact else None,
            targets=targets,
            certifies_unseen=self.rows.holds_out and (self.statistics is None or spaces.pooled),
            seconds={
                "statistics": spaces.seconds,
                "decomposition": decomposed - started - spaces.seconds,
                "pseudo_labels": time.perf_counter() - decomposed,
            },
        )
        return plan, spaces

    def select_layers(self) -> LayerSelection:
        """Protectable layers that run on this data; layers asked for by name must run.

        Raises:
            UNSCError: none does, or one that was asked for does not.
        """
        wanted = self.args.target_modules
        selection = find_layers(self.model, wanted)
        inputs = self.reader.inputs(self.reader.collate([self.reader.prepare(self.rows.retain)[0]]))
        with evaluation_mode(self.model):
            trace = trace_layers(selection.layers, lambda: self.model(**inputs), 1)
        if trace.silent and wanted is not None:
            raise UNSCError(f"target_modules: layer {trace.silent[0]!r} never runs on this data; leave it out.")
        if not trace.leaders:
            raise UNSCError(
                f"model: none of the {len(selection.layers)} protectable layers of {type(self.model).__name__} runs on "
                "this data."
            )
        return selection.without(dict.fromkeys(trace.silent, "never runs on this data"))

    def spaces(self, selection: LayerSelection) -> Spaces:
        """Statistics of forget, retained and held-out rows, and the subspace of each layer input."""
        started = time.perf_counter()
        forget = self._collect(self.rows.forget, selection, "forget")
        held_out = self._collect(self.rows.retain_held_out, selection, "held-out", torch.float64)
        retained, groups = self._retained(selection)
        seconds = time.perf_counter() - started
        keys = {layer.name: retained.module_keys[layer.name] for layer in selection.layers}
        forget_moments = {key: forget.moments["forget"][forget.module_keys[name]] for name, key in keys.items()}
        subspace = build_subspace(
            {group: retained.moments[group] for group in groups},
            keys,
            **self.args.subspace_options,
            forget=forget_moments,
            device=self.args.device,
            together=True,
        )
        if self.args.null_space == "random":
            subspace = subspace.randomised(self.args.seed)
        theirs = {key: held_out.moments["held-out"][held_out.module_keys[name]] for name, key in keys.items()}
        return Spaces(subspace, theirs, retained, forget_moments, seconds)

    def targets(self, retain: Outputs | None) -> list[dict[str, Tensor]]:
        """Targets of every forget row that is trained on; `retain` holds outputs where the strategy needs them."""
        matching = self.goal.matching(self.model, self.reader, self.rows)
        strategy, with_features = self.goal.pseudo_labels, retain is not None
        parts = self.iterate(self.rows.forget, "Pseudo-labels", with_features)
        if self.task.label_column is None:
            return [target for part in parts for target in self.task.targets(strategy, part, retain, matching)]
        outputs = join_outputs(list(parts))
        return self.goal.watch(self.task.targets(strategy, outputs, retain, matching), outputs, matching)

    def outputs(self, dataset: Dataset, description: str, features: bool = False) -> Outputs:
        """The original model's outputs on raw rows."""
        return self.reader.outputs(self.model, dataset, description, features)

    def iterate(self, dataset: Dataset, description: str, features: bool = False) -> Iterator[Outputs]:
        """The same batch by batch."""
        return self.reader.iterate(self.model, dataset, description, features)

    def _collect(
        self, dataset: Dataset, selection: LayerSelection, group: str | None, dtype: torch.dtype | None = None
    ) -> ActivationStatistics:
        """Moments of some rows, in one group where it has a name, multiplied in the precision that the rule needs.

        A leak is small beside the products it is summed from, so held-out rows are always multiplied in float64.
        """
        args = self.args
        return ActivationStatistics.collect(
            self.model,
            dataset,
            groups=self.task.groups(dataset),
            pool_as=group,
            layers=selection.layers,
            prepare=self.reader.prepare,
            collate_fn=self.reader.collate,
            batch_size=STATISTICS_BATCH,
            rows_per_direction=None if group == "held-out" else args.row_budget,
            weights=self.weights,
            progress=not args.disable_tqdm,
            num_workers=args.dataloader_num_workers,
            max_memory=args.max_statistics_memory,
            dtype=dtype or self.product_dtype,
        )

    @property
    def product_dtype(self) -> torch.dtype:
        """Precision in which rows are multiplied."""
        return self.args.product_dtype

    def _retained(self, selection: LayerSelection) -> tuple[ActivationStatistics, list[str]]:
        """Statistics of the retained rows, given or collected, and the groups of them that belong to these rows."""
        given = self.statistics
        if given is None:
            collected = self._collect(self.rows.retain, selection, None if self.args.per_class_statistics else POOL)
            return collected, list(collected.moments)
        retained = given if isinstance(given, ActivationStatistics) else ActivationStatistics.from_pretrained(given)
        retained.check_same_model(self.weights)
        if self.args.is_exact and retained.fingerprint.rows_per_direction is not None:
            raise UNSCError(
                "statistics: were collected with a budget, but energy 1.0 keeps every direction; collect them with "
                "rows_per_direction=None."
            )
        missing = [layer.name for layer in selection.layers if layer.name not in retained.module_keys]
        if missing:
            raise UNSCError(
                f"statistics: do not cover layer {missing[0]!r}; collect them with the same target_modules."
            )
        return retained, retained_groups(retained, self.task, self.rows)

    def _with_capacity(self, selection: LayerSelection, subspace: Subspace) -> LayerSelection:
        """The layers whose null space is not empty; the others are frozen and named."""
        full = full_layers(subspace, selection.layers, **self.args.subspace_options)
        for name, reason in full.items():
            logger.info("%s is frozen: %s.", name, reason)
        return selection.without(full)

    def _projection(self, selection: LayerSelection, spaces: Spaces) -> NullSpaceProjection:
        identity = self.args.null_space == "none"
        if isinstance(self.model, PeftModel):
            return LoraProjection(self.model, selection.layers, spaces.subspace, spaces.forget_moments, identity)
        return NullSpaceProjection(selection.layers, spaces.subspace, identity)


def exact_rows(rows: UnlearningRows) -> Dataset:
    """Some rows of the statistics, whose outputs `energy` 1.0 keeps to rounding."""
    return at_most(rows.retain, _EXACT_ROWS)


def retained_groups(statistics: ActivationStatistics, task: Task, rows: UnlearningRows) -> list[str]:
    """Groups of given statistics that belong to retained rows: their classes, or one pool of exactly these rows.

    Raises:
        UNSCError: the statistics still hold rows to forget, or are of other rows.
    """
    if list(statistics.moments) == [POOL]:
        data = data_fingerprint(rows.retain)
        if statistics.fingerprint.data != data:
            raise UNSCError(
                f"statistics: collected from data {statistics.fingerprint.data[:12]}, the retained rows are "
                f"{data[:12]}; collect them again."
            )
        return [POOL]
    if not task.whole_classes:
        still = statistics.fingerprint.still_held(rows.forget)
        if still:
            raise UNSCError(
                f"statistics: still hold {still} of the {len(rows.forget)} rows to forget; take them out with "
                "statistics.without_rows, or leave statistics out."
            )
        return list(statistics.moments)
    absent = [c for c in task.remaining_classes if str(c) not in statistics.moments]
    if absent:
        raise UNSCError(f"statistics: hold no rows of retained class {absent[0]}; collect them on this data.")
    return [str(c) for c in task.remaining_classes]
