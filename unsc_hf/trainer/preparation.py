"""What a trainer does before its first step: read the original once, and make of it layers, subspaces, targets and when to stop."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from ..config import UNSCConfig
from ..data.selection import evenly_spaced
from ..erasure.feature_terms import FeatureTerms
from ..errors import UNSCError
from ..evaluation.membership import tolerated_exposure
from ..experimental.left_out import LeftOut
from ..models.hooks import NOT_INPUTS, evaluation_mode, trace_layers
from ..models.layers import LayerSelection, find_layers
from ..models.outputs import Outputs, collect_outputs, iterate_outputs, join_outputs
from ..nullspace.lora import LoraProjection
from ..nullspace.moments import Measurable, Moment
from ..nullspace.projection import NullSpaceProjection
from ..nullspace.statistics import ActivationStatistics
from ..nullspace.storage import Shelf, shelve_moments
from ..nullspace.subspace import Subspace, build_subspace, no_capacity_message, no_capacity_reason, randomised
from ..objectives import OBJECTIVES
from ..objectives.pseudo_labels import AS_UNSEEN, MatchedTargets, Matching
from ..tasks import Task
from ..tasks.base import Measure
from ..utils.fingerprint import data_fingerprint
from .plan import UnlearningPlan
from .rows import RelabelledDataset

logger = logging.getLogger(__name__)


_CLASS_TARGET = 0.002  # accuracy at which whole classes count as forgotten


_TOKEN_TOLERANCE = 0.01  # answers count as forgotten when their tokens are predicted this nearly as well as unseen ones


MOST_LOGITS = 50_000_000  # held-out logits kept for the drift; a language model gives them for every token


_ROWS_LEFT_OUT = 20_000  # retained rows, and unseen ones, whose features are held in memory to see how hard rows are


_POOL = "retain"  # the one group of statistics whose classes need not be told apart


class PreparingTrainer(Trainer):
    """A `Trainer` that reads its model before it changes it; `UNSCTrainer` fills in the rows and trains.

    Attributes:
        task: what kind of model this is.
        plan: everything that was decided before the first step; None until then.
        original_weights: hash of the model as it was given.
    """

    args: UNSCConfig
    data_collator: Any
    task: Task
    plan: UnlearningPlan | None
    original_weights: str
    whole_classes: bool
    forgotten_classes: list[int]
    remaining_classes: list[int]

    _forget_train: Dataset
    _forget_validation: Dataset
    _retain_train: Dataset
    _retain_held_out: Dataset
    _unseen: Dataset | None
    _unseen_read: list[Outputs] | None
    _prepared: Callable[[Dataset], Any]
    _inner_collator: Callable[[list[dict[str, Any]]], dict[str, Any]]
    _given_statistics: ActivationStatistics | str | os.PathLike[str] | None
    _statistics_seconds: float
    _retained: ActivationStatistics | None
    _pooled: bool
    _forget_moments: dict[str, Moment]
    _matched: MatchedTargets | None
    _teacher: nn.Module | None
    _feature_terms: FeatureTerms | None

    # ---- data -------------------------------------------------------------------------------------------------------

    def _collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Batch of what the model reads, plus pseudo-labels where rows carry them."""
        known = set(self._signature_columns or ()) | {"label", "labels", "label_ids"}
        features = []
        for row in rows:
            feature = {name: value for name, value in row.items() if name in known}
            column = self.task.label_column
            if column is not None and column not in known and column in row:
                feature["labels"] = row[column]
            features.append(feature)
        batch = dict(self._inner_collator(features))
        if "pseudo_labels" in rows[0]:
            self.task.collate_targets(batch, rows)
        if "retain" in rows[0]:
            batch["retain"] = self._collate([row["retain"] for row in rows])
        return batch

    # ---- before the first step --------------------------------------------------------------------------------------

    def prepare_unlearning(self) -> UnlearningPlan:
        """Read the original model once: statistics, subspaces, pseudo-labels. `train` calls it; a second call is free.

        Raises:
            UNSCError: no protectable layer, no layer with capacity left, or statistics of another model.
        """
        if self.plan is not None:
            return self.plan
        args, model = self.args, self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        original = self.original_weights
        selection = self._selection(model)
        started = time.perf_counter()
        subspace, held_out = self._subspace(model, selection, original)
        decomposed = time.perf_counter()

        full = {
            layer.name: no_capacity_reason(subspace[layer.name])
            for layer in selection.layers
            if not subspace[layer.name].has_capacity
        }
        if len(full) == len(selection.layers):
            raise UNSCError(
                no_capacity_message(subspace, args.energy, args.subspace_rank, args.subspace_ratio, args.subspace_merge)
            )
        for name, reason in full.items():
            logger.warning("%s is frozen: %s.", name, reason)
        selection = selection.without(full)
        projection = self._projection(model, selection, subspace)

        strategy = self.pseudo_label_strategy
        by_mean = strategy == "nearest_mean"
        retain = self._outputs(model, self._retain_held_out, "Held-out logits", features=by_mean)
        targets = self._targets(model, strategy, retain if by_mean else None)
        retained = self._prepared(self._retain_train) if OBJECTIVES[args.objective].retain else None
        self.train_dataset = RelabelledDataset(self._prepared(self._forget_train), targets, retained, args.seed)
        if OBJECTIVES[args.objective].keeps_original:
            self._teacher = copy.deepcopy(model).requires_grad_(False)
            self._teacher.eval()
        if OBJECTIVES[args.objective].features:
            self._feature_terms = FeatureTerms(self, model, self._given_statistics)
        target, unseen = self._target(model)
        self.plan = UnlearningPlan(
            selection=selection,
            subspace=subspace,
            projection=projection,
            held_out=held_out,
            forgotten_classes=self.forgotten_classes,
            remaining_classes=self.remaining_classes,
            pseudo_labels=torch.stack([row["pseudo_labels"] for row in targets]) if self.task.label_column else None,
            original_weights=original,
            held_out_logits=retain.logits,
            target=target,
            unseen=unseen,
            seconds={
                "statistics": self._statistics_seconds,
                "decomposition": decomposed - started - self._statistics_seconds,
                "pseudo_labels": time.perf_counter() - decomposed,
            },
        )
        return self.plan

    @property
    def retained_statistics(self) -> ActivationStatistics:
        """Statistics of the retained rows, between `prepare_unlearning` and `train`, which lets go of them.

        Raises:
            UNSCError: before or after that.
        """
        if self._retained is None:
            raise UNSCError(
                "retained_statistics: there are none before prepare_unlearning, and train lets go of them; read them in between, "
                "or collect them with ActivationStatistics.collect."
            )
        return self._retained

    @retained_statistics.setter
    def retained_statistics(self, statistics: ActivationStatistics) -> None:
        self._retained, self._pooled = statistics, _POOL in statistics.moments

    def _release(self) -> None:
        """Let go of what only the preparation needed, and put away what only checks need: every moment and basis is as large as a
        layer's width squared."""
        assert self.plan is not None
        self._retained, self._forget_moments, self._unseen_read = None, {}, None
        self.plan.subspace = self.plan.subspace.without_bases()
        shelf = Shelf(str(self.args.output_dir))
        self.plan.held_out = shelve_moments(self.plan.held_out, shelf)
        self.plan.projection.shelve(shelf)

    @property
    def pseudo_label_strategy(self) -> str:
        """The stated one; else "soft" for whole classes, "matched" for single rows beside unseen ones."""
        if self.args.pseudo_labels is not None:
            return self.args.pseudo_labels
        if self.whole_classes:
            return "soft"
        return "top1" if self._unseen is None else "matched"

    def _targets(self, model: nn.Module, strategy: str, retain: Outputs | None) -> list[dict[str, Tensor]]:
        """Targets of every forget row that is trained on, from the original model."""
        matching = order = None
        if strategy == "left_out":
            order = self._left_out(model)
        if strategy in AS_UNSEEN and self._unseen is not None:
            matching = Matching.of(
                self._iterate(model, self._forget_train, "Margins"), self._unseen_outputs(model), order
            )
        parts = self._iterate(model, self._forget_train, "Pseudo-labels", features=retain is not None)
        if self.task.label_column is not None:
            outputs = join_outputs(list(parts))
            targets = self.task.targets(strategy, outputs, retain, matching)
            if matching is not None:  # they follow the model, so a batch says whose they are
                self._matched = MatchedTargets(
                    matching, outputs, torch.stack([row["pseudo_labels"] for row in targets])
                )
                targets = [{**row, "target_row": torch.tensor(i)} for i, row in enumerate(targets)]
            return targets
        return [target for part in parts for target in self.task.targets(strategy, part, retain, matching)]

    def _left_out(self, model: nn.Module) -> Tensor:
        """How well each forget row would be known if it had been left out; unseen rows as hard as these take the place of all."""
        assert self._unseen is not None
        taught, unseen = (
            rows.select(evenly_spaced(np.arange(len(rows)), _ROWS_LEFT_OUT))
            for rows in (self._retain_train, self._unseen)
        )
        found = LeftOut.of(
            model,
            self._prepared(taught),
            self._prepared(self._forget_train),
            self._prepared(unseen),
            self._collate,
            batch_size=self.args.per_device_eval_batch_size,
            seed=self.args.seed,
            progress=not self.args.disable_tqdm,
        )
        self._unseen = unseen.select(found.counterparts)
        return found.order

    def _unseen_outputs(self, model: nn.Module) -> Iterable[Outputs]:
        """The original's outputs on unseen rows; a classifier's are small, and read once."""
        assert self._unseen is not None
        if self.task.label_column is None:
            return self._iterate(model, self._unseen, "Unseen rows")
        if self._unseen_read is None:
            self._unseen_read = list(self._iterate(model, self._unseen, "Unseen rows"))
        return self._unseen_read

    def _target(self, model: nn.Module) -> tuple[float, Measure | None]:
        """When to stop: at the stated accuracy; else where whole classes are gone, or single rows look like unseen ones, which are measured.

        Rows that look alike have alike losses; their accuracy says less the fewer they are: of two rows that a model should
        know with 98 %, none has to be got wrong.
        """
        if self.args.target_forget_accuracy is not None:
            return self.args.target_forget_accuracy, None
        if self.whole_classes:
            return _CLASS_TARGET, None
        assert self._unseen is not None
        unseen = self.task.measure(iter(self._unseen_outputs(model)))
        self._unseen_read = None
        if unseen.losses is None:
            return unseen.accuracy + _TOKEN_TOLERANCE, None
        return tolerated_exposure(len(self._forget_validation)), unseen.in_order()

    def _projection(self, model: nn.Module, selection: LayerSelection, subspace: Subspace) -> NullSpaceProjection:
        identity = self.args.null_space == "none"
        if isinstance(model, PeftModel):
            return LoraProjection(model, selection.layers, subspace, self._forget_moments, identity)
        return NullSpaceProjection(selection.layers, subspace, identity)

    def _selection(self, model: nn.Module) -> LayerSelection:
        """Protectable layers that run on this data; layers asked for by name must run."""
        args = self.args
        selection = find_layers(model, args.target_modules)
        probe = self._model_inputs(self._collate([self._prepared(self._retain_train)[0]]))
        with evaluation_mode(model):
            trace = trace_layers(selection.layers, lambda: model(**probe), 1)
        if trace.silent and args.target_modules is not None:
            raise UNSCError(f"target_modules: layer {trace.silent[0]!r} never runs on this data; leave it out.")
        if not trace.leaders:
            raise UNSCError(
                f"model: none of the {len(selection.layers)} protectable layers of {type(model).__name__} runs on this data."
            )
        return selection.without(dict.fromkeys(trace.silent, "never runs on this data"))

    def _model_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v.to(self.args.device) for k, v in batch.items() if k not in NOT_INPUTS}

    def _subspace(
        self, model: nn.Module, selection: LayerSelection, original: str
    ) -> tuple[Subspace, dict[str, Measurable]]:
        """Retained subspace of each layer input, and the held-out second moments."""
        args = self.args
        started = time.perf_counter()
        per_class = args.subspace_merge == "concat" or args.subspace_rule == "released_ramp"

        given = self._given_statistics
        if given is not None and not isinstance(given, ActivationStatistics):
            given = ActivationStatistics.from_pretrained(given)

        def collect(dataset: Dataset, group: str | None, held_out: bool = False) -> ActivationStatistics:
            return ActivationStatistics.collect(
                model,
                dataset,
                groups=self.task.groups(dataset),
                pool_as=group,
                layers=selection.layers,
                prepare=self.task.prepare,
                collate_fn=self._collate,
                batch_size=args.statistics_batch_size,
                max_rows_per_class=args.max_rows_per_class,
                max_samples_per_class=args.max_samples_per_class,
                weights=original,
                progress=not args.disable_tqdm,
                num_workers=args.dataloader_num_workers,
                max_memory=args.max_statistics_memory,
                sketch_size=args.sketch_size,
                layout=None if given is None else given.sketch_sizes,
                wide_rows=held_out,
                dtype=torch.float64
                if held_out
                else args.product_dtype,  # a leak is small beside the products it is summed from
            )

        forget = collect(self._forget_train, "forget")
        held_out = collect(self._retain_held_out, "held-out", held_out=True)
        names = [layer.name for layer in selection.layers]
        if given is None:
            retained = collect(self._retain_train, None if per_class else _POOL)
            kept = list(retained.moments)
        else:
            retained = given
            retained.check_same_model(original)
            missing = [name for name in names if name not in retained.module_keys]
            if missing:
                raise UNSCError(
                    f"statistics: do not cover layer {missing[0]!r}; collect them with the same target_modules."
                )
            kept = self._kept_groups(retained)
        self.retained_statistics = retained
        self._statistics_seconds = time.perf_counter() - started
        self._forget_moments = {
            retained.module_keys[name]: forget.moments["forget"][forget.module_keys[name]] for name in names
        }
        subspace = build_subspace(
            {group: retained.moments[group] for group in kept},
            {name: retained.module_keys[name] for name in names},
            rule=args.subspace_rule,
            energy=args.energy,
            rank=args.subspace_rank,
            ratio=args.subspace_ratio,
            merge=args.subspace_merge,
            forget=self._forget_moments,
            device=args.device,
            together=True,
        )
        if args.null_space == "random":
            subspace = randomised(subspace, args.seed)
        keys = {retained.module_keys[name]: held_out.module_keys[name] for name in names}
        return subspace, {key: held_out.moments["held-out"][theirs] for key, theirs in keys.items()}

    def _kept_groups(self, statistics: ActivationStatistics) -> list[str]:
        """Groups of given statistics that belong to retained rows: its classes, or one pool of exactly these rows."""
        if not self.whole_classes and list(statistics.moments) != [_POOL]:
            still = statistics.fingerprint.still_held(self._forget_train)
            if still:
                raise UNSCError(
                    f"statistics: still hold {still} of the {len(self._forget_train)} rows to forget; take them out with "
                    "statistics.without_rows, or leave statistics out."
                )
            return list(statistics.moments)
        if list(statistics.moments) == [_POOL]:
            data = data_fingerprint(self._retain_train)
            if statistics.fingerprint.data != data:
                raise UNSCError(
                    f"statistics: collected from data {statistics.fingerprint.data[:12]}, the retained rows are {data[:12]}; collect them again."
                )
            return [_POOL]
        absent = [c for c in self.remaining_classes if str(c) not in statistics.moments]
        if absent:
            raise UNSCError(f"statistics: hold no rows of retained class {absent[0]}; collect them on this data.")
        return [str(c) for c in self.remaining_classes]

    def _iterate(
        self, model: nn.Module, dataset: Dataset, description: str, features: bool = False
    ) -> Iterator[Outputs]:
        return iterate_outputs(model, self._prepared(dataset), self._collate, **self._reading(description, features))

    def _outputs(self, model: nn.Module, dataset: Dataset, description: str, features: bool = False) -> Outputs:
        """On all rows; of a language model on as many as fit in memory."""
        limit = None if self.task.label_column is not None else MOST_LOGITS
        options = self._reading(description, features)
        return collect_outputs(model, self._prepared(dataset), self._collate, max_elements=limit, **options)

    def _reading(self, description: str, features: bool) -> dict[str, Any]:
        return {
            "features": features,
            "batch_size": self.args.per_device_eval_batch_size,
            "progress": not self.args.disable_tqdm,
            "description": description,
            "read": self.task.outputs,
        }
