"""`UNSCTrainer`: unlearning by null-space calibration as a transformers `Trainer`."""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import fsdp2_prepare_model
from datasets import Dataset
from huggingface_hub import CommitInfo
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, SchedulerType, TrainOutput
from transformers.utils import ModelOutput

from .adapters import LoraProjection, add_adapters, free_names
from .callbacks import Check, EpochCallback, ProjectionCallback, StoppingCallback
from .config import REFUSED, UNSCConfig, check_fsdp
from .data import hold_out
from .errors import UNSCError
from .evaluation.certificate import Certificate, LogitDrift, logit_drift
from .evaluation.membership import exposure, tolerated_exposure
from .feature_erasure import Choose, Erased, erase_features, evenly
from .feature_terms import FeatureTerms
from .fingerprint import data_fingerprint, weight_hash
from .layers import NOT_INPUTS, LayerSelection, evaluation_mode, find_layers, quiet, trace_layers
from .loading import check_weights, load_as, load_model
from .model_card import CardContent, public_name, write_card
from .moments import Measurable, Moment
from .objectives import OBJECTIVES, Terms
from .offload import Shelf, shelve_moments
from .outputs import Outputs, collect_outputs, iterate_outputs, join_outputs
from .plan import UnlearningPlan
from .projection import Leak, NullSpaceProjection
from .pseudo_labels import MatchedTargets, Matching
from .publishing import publish
from .relabelled import RelabelledDataset
from .saving import RESULTS, check_checkpoint, find_checkpoint, mark_checkpoint, unmark_checkpoint
from .sharding import gathered, reshard, set_trained, units_to_shard
from .sketch import RowSample
from .statistics import ActivationStatistics
from .subspace import Subspace, build_subspace, no_capacity_message, no_capacity_reason, randomised
from .tasks import make_task

logger = logging.getLogger(__name__)

_CLASS_TARGET = 0.002  # accuracy at which whole classes count as forgotten
_TOKEN_TOLERANCE = 0.01  # answers count as forgotten when their tokens are predicted this nearly as well as unseen ones
_VALIDATION_ROWS = 50  # forget rows wanted for validation where whole classes are forgotten ...
_MOST_HELD_OUT = 0.4  # ... but never more than this share of them
_MOST_LOGITS = 50_000_000  # held-out logits kept for the drift; a language model gives them for every token
_CURVE_ROWS = 300  # held-out retained rows that a check reads: they draw a curve, nothing is decided by them
_SETTLED = 10.0  # times the stated learning rate, where a run ends by settling
_MUCH_LOST = 0.02  # of the accuracy on held-out retained rows: worth a warning
_POOL = "retain"  # the one group of statistics whose classes need not be told apart


class UNSCTrainer(Trainer):
    """Makes a classifier forget rows while its answers on retained rows stay where they were.

    Before the first step the original model is read once: second moments of the retained rows' activations give a null
    space for each layer, and every forget row gets the most similar remaining classes as its new label. Then the model is
    trained on the re-labelled forget rows alone, with gradients and weight changes confined to the null space.

    Args:
        model: a `PreTrainedModel` in float32, or a Hub id or folder.
        args: a `UNSCConfig`.
        forget_dataset: rows to forget (`datasets.Dataset`, raw images or ready for the model).
        retain_dataset: rows to keep; read for statistics, never trained on.
        eval_dataset: a dict such as `{"forget": ..., "retain": ...}` gives `eval_forget_*` and `eval_retain_*`.
        processing_class: image processor for raw images, tokenizer for raw texts; saved with the model.
        peft_config: a `LoraConfig`, to train adapters only.
        unseen_dataset: rows that the original never saw, for requests whose rows share their classes with retained ones:
            such rows count as forgotten once they are known no better than these.
        statistics: `ActivationStatistics` of the retained classes (or of all), or the folder they were saved in. If they
            include the rows this trainer holds out, the certificate is not on unseen rows; it says so.
        data_collator, compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs: as in `Trainer`.

    Raises:
        UNSCError: for input that cannot work; the message names the argument and says what to do.

    Source: "Machine Unlearning via Null Space Calibration", IJCAI 2024, arXiv 2404.13588.
    """

    card_content: CardContent | None = None
    data_collator: Any
    lr_scheduler: Any
    _tag_names = ["unsc", "machine-unlearning"]

    # The loss is a batch mean; Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: UNSCConfig,
        forget_dataset: Dataset,
        retain_dataset: Dataset,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        peft_config: PeftConfig | None = None,
        statistics: ActivationStatistics | str | os.PathLike[str] | None = None,
        unseen_dataset: Dataset | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        if not isinstance(args, UNSCConfig):
            raise UNSCError(f"args: got {type(args).__name__}, expected a UNSCConfig.")
        if isinstance(model, str):
            model = load_model(model)
        check_weights(model)
        for name, dataset in (("forget_dataset", forget_dataset), ("retain_dataset", retain_dataset)):
            if not isinstance(dataset, Dataset):
                raise UNSCError(
                    f"{name}: got {type(dataset).__name__}, expected a datasets.Dataset; see split_dataset."
                )
            if len(dataset) == 0:
                raise UNSCError(f"{name}: has no rows; unlearning needs rows to forget and rows to keep.")
        self.task = make_task(model, args, forget_dataset, retain_dataset, processing_class)
        self.plan: UnlearningPlan | None = None
        self.stop_reason: str | None = None
        self.erased: list[Erased] = []
        self.choose_erasure: Choose | None = None
        self._teacher: nn.Module | None = None
        self._feature_terms: FeatureTerms | None = None
        self.unlearning_seconds = 0.0
        self._given_statistics = statistics
        self._retained: ActivationStatistics | None = None
        self._forget_moments: dict[str, Moment] = {}
        self._pooled = False
        self.class_names, self.whole_classes = self.task.class_names, self.task.whole_classes
        self.forgotten_classes, self.remaining_classes = self.task.forgotten_classes, self.task.remaining_classes
        if not self.whole_classes and args.target_forget_accuracy is None and unseen_dataset is None:
            raise UNSCError(
                "unseen_dataset: not given, but single rows are to be forgotten, not whole classes; give rows that the "
                "model never saw (a validation split), or set target_forget_accuracy."
            )
        self._unseen, self._forgotten_rows = unseen_dataset, len(forget_dataset)
        self._unseen_read: list[Outputs] | None = None
        self._matched: MatchedTargets | None = None
        fraction, limit, seed = args.validation_fraction, args.max_validation_rows, args.seed
        strata = self.task.strata
        # Whole classes generalise, so a part of their rows is kept aside to see it; single rows must each be unlearned.
        self._forget_train, self._forget_validation = (
            hold_out(forget_dataset, _forget_fraction(args, forget_dataset), strata(forget_dataset), limit, seed)
            if self.whole_classes
            else (forget_dataset, forget_dataset)
        )
        self._retain_train, self._retain_held_out = hold_out(
            retain_dataset, fraction, strata(retain_dataset), limit, seed
        )

        self.original_weights = weight_hash(model)
        self.model_class = type(model).__name__
        self.base_model_name = public_name(str(model.config._name_or_path or ""))
        if peft_config is not None:
            model = add_adapters(model, peft_config)
            # Written into adapter_config.json: a Hub id is needed there, a path of this machine is not.
            model.peft_config["default"].base_model_name_or_path = self.base_model_name or None

        prepared = self.task.prepare
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepared(part) for name, part in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepared(eval_dataset)
        self._prepared: Callable[[Dataset], Any] = prepared
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or self.task.default_collator(),
            train_dataset=prepared(self._forget_train),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics or self.task.compute_metrics,
            preprocess_logits_for_metrics=None if compute_metrics else self.task.preprocess_logits,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        if self.is_deepspeed_enabled:  # switched on by the launcher, not by an argument
            raise UNSCError(f"deepspeed: not supported, {REFUSED['deepspeed']}.")
        if self.is_fsdp_enabled:
            self._shard()
        self._set_signature_columns_if_needed()
        self._inner_collator = self.data_collator
        self.data_collator = self._collate
        model.add_model_tags(self._tag_names)

    def _shard(self) -> None:
        """Shard the weights now (FSDP2), before anything is read: nothing then needs the whole model on one device.

        Upstream shards when training begins, and finds that done.
        """
        plugin = self.accelerator.state.fsdp_plugin
        check_fsdp(plugin, self.args.objective, self.args.feature_erasure)
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = units_to_shard(self.model)
        grouped = [layer.name for layer in find_layers(self.model).layers if layer.geometry.groups > 1]
        if grouped:
            raise UNSCError(
                f"fsdp: {grouped[0]!r} is a grouped convolution, whose rows cannot be sharded; use one process or DDP (torchrun)."
            )
        fsdp2_prepare_model(self.accelerator, self.model)

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
        if OBJECTIVES[args.objective].teacher:
            self._teacher = copy.deepcopy(model).requires_grad_(False)
            self._teacher.eval()
        if OBJECTIVES[args.objective].features:
            self._feature_terms = FeatureTerms(self, model, self._given_statistics)
        target, unseen_losses = self._target(model)
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
            unseen_losses=unseen_losses,
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
        matching = None
        if strategy == "matched" and self._unseen is not None:
            matching = Matching.of(self._iterate(model, self._forget_train, "Margins"), self._unseen_outputs(model))
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

    def _unseen_outputs(self, model: nn.Module) -> Iterable[Outputs]:
        """The original's outputs on unseen rows; a classifier's are small, and read once."""
        assert self._unseen is not None
        if self.task.label_column is None:
            return self._iterate(model, self._unseen, "Unseen rows")
        if self._unseen_read is None:
            self._unseen_read = list(self._iterate(model, self._unseen, "Unseen rows"))
        return self._unseen_read

    def _target(self, model: nn.Module) -> tuple[float, Tensor | None]:
        """When to stop: at the stated accuracy; else where whole classes are gone, or single rows look like unseen ones.

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
        return tolerated_exposure(len(self._forget_validation)), unseen.losses.sort().values

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
        limit = None if self.task.label_column is not None else _MOST_LOGITS
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

    # ---- unlearning -------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Unlearn. With `resume_from_checkpoint`, construct the trainer with the *original* model, as the first time.

        True takes the last whole one, or starts anew where a run was killed before its first.

        Raises:
            UNSCError: resuming with another model, data or options than the checkpoint's run began with.
        """
        if self.erased:
            raise UNSCError(
                "feature_erasure: this model's features are erased already; save it and start anew from there."
            )
        checkpoint = find_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        plan = self.prepare_unlearning()
        if checkpoint is not None:
            check_checkpoint(checkpoint, self._run_identity())
        self._release()
        trained = {layer.weight_name for layer in plan.selection.layers}
        if isinstance(plan.projection, LoraProjection):
            trained = free_names(plan.selection) | (set() if self.args.lora_freeze_a else trained)
        wanted = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        set_trained(self.model, trained)
        frozen = weight_hash(self.model, exclude=trained)
        stopping = StoppingCallback(
            plan.projection,
            self._check,
            self.log,
            self.args.check_steps,
            plan.target,
            self.args.max_leak if self.args.null_space == "retained" else None,
            refine=not self.whole_classes,
        )
        assert isinstance(self.train_dataset, RelabelledDataset)
        epochs = EpochCallback(self.train_dataset.begin_epoch)
        callbacks: list[TrainerCallback] = [ProjectionCallback(plan.projection), stopping, epochs]
        for callback in callbacks:
            self.add_callback(callback)
        started = time.perf_counter()
        try:
            output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
            plan.projection.project_displacements(torch.float64)
            if self.args.feature_erasure != "none" and self.args.null_space == "retained":
                self.erased = erase_features(self, self.choose_erasure)
                self.log({name: value for name, value in asdict(self._check()).items() if value is not None})
        finally:
            for callback in callbacks:
                self.remove_callback(callback)
            set_trained(self.model, wanted)
        self.unlearning_seconds = time.perf_counter() - started
        self.stop_reason = stopping.reason
        self._check_outcome(frozen, trained)
        return output

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """With a constant schedule the learning rate doubles every `lr_doubling_steps` steps: whatever the model's scale,
        the target comes within reach, and the leak budget ends a run that goes too far. Rows that shall look like unseen ones, beside
        rehearsed ones, are not pushed out of reach, they settle: for them the rate grows to ten times the stated one and stays there."""
        doubling = self.args.lr_doubling_steps
        if doubling is None or self.lr_scheduler is not None or self.args.lr_scheduler_type != SchedulerType.CONSTANT:
            return super().create_scheduler(num_training_steps, optimizer)
        inner = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            inner, _Doubling(doubling, _SETTLED if self._follows else math.inf)
        )
        return self.lr_scheduler

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if "pseudo_labels" not in inputs:
            raise RuntimeError("a training batch carries no pseudo-labels: it would teach the true ones")
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.plan is not None and self.accelerator.sync_gradients:
            self.plan.projection.project_gradients()
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective on rows with targets; rows without them (evaluation) keep the model's own loss."""
        if "pseudo_labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, None)
        quiet(model)
        inputs = dict(inputs)
        targets, reference, rows = inputs.pop("pseudo_labels"), inputs.pop("reference"), inputs.pop("target_row", None)
        if self._matched is not None and self._follows:
            assert rows is not None
            targets = self._matched.now[rows.cpu()].to(targets)
        retain, labels = inputs.pop("retain", None), inputs.pop("labels")
        args, more = self.args, dict[str, Any]()
        if self._feature_terms is None:
            found = self.task.logits(model, inputs)
        else:
            terms = self._feature_terms
            outputs, more["features"] = terms.forward(model, inputs, labels)
            found = outputs.logits
            more.update(feature_targets=terms.targets, one_group=terms.answers, feature_weight=args.feature_weight)
        logits, true, pseudo, samples = self.task.positions(found, labels, targets)
        if self._teacher is not None:
            with torch.no_grad():
                taught = self.task.logits(self._teacher, inputs)
            more["teacher"] = self.task.positions(taught, labels, targets)[0]
        if retain is not None:
            kept_inputs = {name: value for name, value in retain.items() if name not in NOT_INPUTS}
            kept = self.task.outputs(self.task.logits(model, kept_inputs), retain["labels"])
            more["retain_logits"] = kept.logits
            more["retain_loss"] = nn.functional.cross_entropy(kept.logits.float(), kept.labels)
            if self._teacher is not None:
                with torch.no_grad():
                    taught = self.task.logits(self._teacher, kept_inputs)
                more["retain_teacher"] = self.task.outputs(taught, retain["labels"]).logits
        more.update(beta=args.objective_beta, gamma=args.objective_gamma, retain_weight=args.retain_weight)
        loss = OBJECTIVES[args.objective].loss(Terms(logits, true, pseudo, samples, reference, **more))
        return (loss, ModelOutput(logits=found)) if return_outputs else loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        reshard(self.model)
        return output

    def _check(self) -> Check:
        """Forgetting and leak at this moment, on rows that are not trained on."""
        every = -(-len(self._retain_held_out) // _CURVE_ROWS)
        rows = [self._forget_validation, self._retain_held_out.select(range(0, len(self._retain_held_out), every))]
        if not self.whole_classes:  # of many single rows a part shows how far all are
            limit = self.args.max_validation_rows
            rows = [part.select(evenly(np.arange(len(part)), limit)) for part in rows]
        forget, retain = (self.task.measure(self._iterate(self.model, part, "Check")) for part in rows)
        unseen = None if self.plan is None else self._now_unseen() if self._follows else self.plan.unseen_losses
        check = Check(
            forget_accuracy=forget.accuracy,
            forget_loss=forget.loss,
            retain_accuracy=retain.accuracy,
            leak=self.held_out_leak().total,
            exposure=None if unseen is None or forget.losses is None else exposure(forget.losses, unseen),
        )
        # One process decides for all: rounding must not let them disagree on stopping.
        decided: Check = gathered(check, self.args.device)[0]
        return decided

    @property
    def _follows(self) -> bool:
        """Whether single rows are held against unseen ones as the model knows them now, not as the original did.

        A model that loses some accuracy while it forgets knows unseen rows less well, and so must forgotten ones be. Only where retained rows
        are rehearsed: nothing else would keep both from being forgotten together.
        """
        return self.plan is not None and self.plan.unseen_losses is not None and OBJECTIVES[self.args.objective].retain

    def _now_unseen(self) -> Tensor:
        """Losses of unseen rows under the model as it is now, sorted; the targets of the forget rows follow them."""
        assert self._unseen is not None
        unseen = self._unseen.select(evenly(np.arange(len(self._unseen)), self.args.max_validation_rows))
        found = self.task.measure(self._iterate(self.model, unseen, "Unseen rows"))
        assert found.losses is not None
        losses = found.losses.sort().values
        if self._matched is not None:
            self._matched.follow(losses)
        return losses

    def _check_outcome(self, frozen: str, trained: set[str]) -> None:
        """Guards against silent no-ops and silent damage."""
        assert self.plan is not None
        moved = self.plan.projection.relative_change()
        if not moved > 0:
            raise UNSCError(
                f"learning_rate: {self.args.learning_rate} moved no weight within the leak budget "
                f"(max_leak {self.args.max_leak}), so nothing was forgotten; lower it, or lower check_steps."
                if self.stop_reason == "leak_budget"
                else f"learning_rate: {self.args.learning_rate} moved no weight in {self.state.global_step} steps; raise it."
            )
        if weight_hash(self.model, exclude=trained) != frozen:
            raise RuntimeError("a frozen weight or buffer has changed while unlearning")
        if self.stop_reason != "target":
            logger.warning(
                "Unlearning ended (%s) before the target %s %.3g was reached.",
                self.stop_reason,
                "forget accuracy" if self.plan.unseen_losses is None else "exposure",
                self.plan.target,
            )
        kept = [entry["retain_accuracy"] for entry in self.state.log_history if "retain_accuracy" in entry]
        if kept and self.args.null_space == "retained" and kept[0] - kept[-1] > _MUCH_LOST:
            logger.warning(
                "Accuracy on held-out retained rows fell from %.4g to %.4g; objective 'unsc_retain', a higher energy or a lower "
                "learning_rate may keep more.",
                kept[0],
                kept[-1],
            )

    # ---- certificate ------------------------------------------------------------------------------------------------

    def held_out_leak(self) -> Leak:
        """Leak of the current weights on held-out retained rows, whatever the budget says."""
        if self.plan is None:
            raise UNSCError("certify: nothing was unlearned yet; call train first.")
        return self.plan.projection.leak(self.plan.held_out, self.plan.subspace.module_keys)

    def certify(self) -> Certificate:
        """Leak per layer and in total, and measured logit drift, on held-out retained rows.

        Raises:
            UNSCError: before `train`, or when the leak exceeds `max_leak`.
        """
        leak = self.held_out_leak()
        assert self.plan is not None
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        keys = self.plan.subspace.module_keys
        logits = self._outputs(model, self._retain_held_out, "Certificate").logits
        certificate = Certificate(
            leak=leak.total,
            leak_per_layer=leak.per_layer,
            drift=logit_drift(self.plan.held_out_logits, logits),
            rows=len(self._retain_held_out),
            sampled_rows={
                name: rows.kept
                for name, rows in (
                    (layer.name, self.plan.held_out[keys[layer.name]]) for layer in self.plan.projection.layers
                )
                if isinstance(rows, RowSample)
            },
            relative_change=self.plan.projection.relative_change(),
            max_leak=self.args.max_leak,
            stop_reason=self.stop_reason,
            merged=self._merged_drift(model) if isinstance(model, PeftModel) and not self.is_fsdp_enabled else None,
            held_out=self._retain_held_out is not self._retain_train
            and (self._given_statistics is None or self._pooled),
        )
        limit = self.args.max_leak
        if self.args.null_space == "retained" and limit is not None and leak.total > limit:
            raise UNSCError(
                f"max_leak: the held-out leak is {leak.total:.4g}, above the limit {limit:.4g}; lower learning_rate or raise energy."
            )
        return certificate

    def _merged_drift(self, model: PeftModel) -> dict[str, LogitDrift]:
        """Logit drift on held-out rows once the adapter is merged, in float32 and cast to bfloat16; on a copy."""
        assert self.plan is not None
        merged = copy.deepcopy(model).merge_and_unload()
        held_out = self.plan.held_out_logits

        def drift(dtype: torch.dtype) -> LogitDrift:
            def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
                return _cast_floats(self._collate(rows), dtype)

            rows = self._prepared(self._retain_held_out)
            limit = None if self.task.label_column is not None else _MOST_LOGITS
            options = self._reading("Merged", False)
            outputs = collect_outputs(merged.to(dtype), rows, collate, max_elements=limit, **options)
            return logit_drift(held_out, outputs.logits)

        return {"float32": drift(torch.float32), "bfloat16": drift(torch.bfloat16)}

    # ---- saving -----------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As upstream, without the pickled arguments: they hold tokens and paths, and nothing reads them."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        has_card = (folder / "README.md").exists()
        super()._save(output_dir, state_dict)
        (folder / "training_args.bin").unlink(missing_ok=True)
        if isinstance(self.model, PeftModel) and not has_card:  # PEFT's own card names the base model's folder
            (folder / "README.md").unlink(missing_ok=True)

    def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
        """Write the card: of the whole comparison when a recipe made one (`card_content`), else of this run alone.

        Every process must call this: the certificate is measured by all of them, and written by the first.
        """
        content = self.card_content or CardContent(
            model_name=model_name or Path(str(self.args.output_dir)).resolve().name,
            base_model=self.base_model_name,
            model_class=self.model_class,
            adapter=isinstance(self.model, PeftModel),
            forgotten=[self.class_names[c] for c in self.forgotten_classes],
            forgotten_rows=self._forgotten_rows,
            dataset=str(kwargs.get("dataset") or ""),
            certificate=self.certify().to_dict() if self.plan is not None else None,
            hyperparameters={name: getattr(self.args, name) for name in ("energy", "learning_rate", "seed")},
        )
        if self.is_world_process_zero():
            write_card(content, str(self.args.output_dir))

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | None:
        """Publish model, processor, card, report and pictures in one commit; see `unsc_hf.publishing.publish`.

        Args:
            commit_message, token, revision, private: as upstream; `hub_token`, `hub_revision` and `hub_private_repo` when None.
            blocking: kept for upstream's signature; the commit is always waited for, so that its failure is seen.
            kwargs: for `create_model_card`.

        Returns:
            The commit, None on all processes but the first.

        Raises:
            UNSCError: what must not leave, or a refusal of the Hub, in one line that says what to do.
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if not Path(str(args.output_dir), RESULTS).is_file():  # a finished run is published as it stands
            self.save_model(_internal_call=True)
        repo_id = self.hub_model_id or args.hub_model_id or Path(str(args.output_dir)).resolve().name
        self.create_model_card(model_name=repo_id.split("/")[-1], **kwargs)
        if not self.is_world_process_zero():
            return None
        return publish(
            str(args.output_dir),
            repo_id,
            private=args.hub_private_repo if private is None else private,
            revision=revision or args.hub_revision,
            token=token or args.hub_token,
            message=commit_message or f"Unlearned by {type(self).__name__}",
        )

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Nothing: the repository is made with the first commit, when there is something to publish."""

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            unmark_checkpoint(folder)
        super()._save_checkpoint(model, trial)
        if self.args.should_save and self.plan is not None:
            mark_checkpoint(folder, self._run_identity())

    def _run_identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the first one, besides its options of speed."""
        assert self.plan is not None
        args = self.args
        return {
            "model": self.plan.original_weights[:16],
            "forget_dataset": data_fingerprint(self._forget_train)[:16],
            "retain_dataset": data_fingerprint(self._retain_train)[:16],
            "null_space": args.null_space,
            "subspace_rule": f"{args.subspace_rule} {args.energy} {args.subspace_rank} {args.subspace_ratio}",
            "pseudo_labels": f"{self.pseudo_label_strategy} {args.pseudo_label_temperature}",
            "objective": args.objective,
            "trained": len(self.plan.selection.layers),
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Read checkpoint weights as `from_pretrained` does.

        Upstream looks tensors up by the names in memory, but `save_pretrained` writes the names of older releases (for
        ViT, for one), and missing weights would only be warned about: the run would go on from the original model.
        """
        if model is not None or isinstance(self.model, PeftModel):  # sharded or adapters: upstream's own path
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = load_as(type(self.model), resume_from_checkpoint, "resume_from_checkpoint")
        self.model.load_state_dict(saved.state_dict())


@dataclass
class _Doubling:
    """Factor of the learning rate by step."""

    steps: int
    most: float = math.inf

    def __call__(self, step: int) -> float:
        return float(min(2.0 ** (step / self.steps), self.most))


def _forget_fraction(args: UNSCConfig, forget: Dataset) -> float:
    """`validation_fraction`, but of few rows more: a handful cannot show that a class is gone."""
    return max(args.validation_fraction, min(_MOST_HELD_OUT, _VALIDATION_ROWS / len(forget)))


def _cast_floats(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
