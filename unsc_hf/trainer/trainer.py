"""`UNSCTrainer`: unlearning by null-space calibration as a transformers `Trainer`."""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Callable
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
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, SchedulerType, TrainOutput
from transformers.utils import ModelOutput

from ..config import REFUSED, UNSCConfig, check_fsdp
from ..data.selection import evenly_spaced, hold_out
from ..erasure.eraser import Choose, Erased, erase_features
from ..erasure.feature_terms import FeatureTerms
from ..errors import UNSCError
from ..evaluation.certificate import Certificate, LogitDrift, logit_drift
from ..models.adapters import add_adapters
from ..models.hooks import quiet
from ..models.layers import find_layers
from ..models.loading import check_weights, load_as, load_model
from ..models.outputs import Outputs, collect_outputs
from ..nullspace.lora import LoraProjection, free_names
from ..nullspace.moments import Moment
from ..nullspace.projection import Leak
from ..nullspace.sketch import RowSample
from ..nullspace.statistics import ActivationStatistics
from ..objectives import OBJECTIVES, Terms
from ..objectives.pseudo_labels import MatchedTargets
from ..reporting.hub import publish
from ..reporting.model_card import CardContent, public_name, write_card
from ..reporting.run_folder import RESULTS
from ..tasks import make_task
from ..tasks.base import Measure
from ..utils.distributed import gathered, reshard, set_trained, units_to_shard
from ..utils.fingerprint import data_fingerprint, weight_digests, weight_hash
from ..utils.precision import full_float32
from .callbacks import Check, EpochCallback, ProjectionCallback, StoppingCallback
from .checkpoints import check_checkpoint, find_checkpoint, mark_checkpoint, unmark_checkpoint
from .plan import UnlearningPlan
from .preparation import MOST_LOGITS, PreparingTrainer
from .rehearsal import check_dropout, check_mixing, rehearse, special_tokens
from .rows import RelabelledDataset

logger = logging.getLogger(__name__)


_VALIDATION_ROWS = 50  # forget rows wanted for validation where whole classes are forgotten ...


_MOST_HELD_OUT = 0.4  # ... but never more than this share of them


_CURVE_ROWS = 300  # held-out retained rows that a check reads: they draw a curve, nothing is decided by them


_SETTLED = 10.0  # times the stated learning rate, where a run ends by settling


_MUCH_LOST = 0.02  # of the accuracy on held-out retained rows: worth a warning


class UNSCTrainer(PreparingTrainer):
    """Makes a classifier forget rows while its answers on retained rows stay where they were.

    Before the first step the original model is read once: second moments of the retained rows' activations give a null
    space for each layer, and every forget row gets the most similar remaining classes as its new label. Then the model is
    trained on the re-labelled forget rows alone, with gradients and weight changes confined to the null space.

    Args:
        model: a `PreTrainedModel` in float32 (under adapters also in bfloat16), or a Hub id or folder.
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
        check_weights(model, frozen=peft_config is not None)
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
        if args.pseudo_labels == "left_out" and (self.whole_classes or unseen_dataset is None):
            raise UNSCError(
                "pseudo_labels: 'left_out' is for single rows that share their class with retained ones, held against unseen_dataset; "
                + ("use 'soft' for whole classes." if self.whole_classes else "give rows that the model never saw.")
            )
        if args.retain_dropout:
            check_dropout(model, args)
        check_mixing(args)
        self._unseen, self._forgotten_rows = unseen_dataset, len(forget_dataset)
        self._unseen_read: list[Outputs] | None = None
        self._matched: MatchedTargets | None = None
        self._special_tokens = special_tokens(processing_class, model.config)
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
        self._base_dtype = str(model.dtype).removeprefix("torch.")
        if self._base_dtype != "float32":  # images come in float32, and some models do not cast them
            model.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
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
        if self._base_dtype != "float32":
            raise UNSCError(
                f"fsdp: the model is in {self._base_dtype}; load it in float32, or use one process or DDP (torchrun)."
            )
        plugin = self.accelerator.state.fsdp_plugin
        check_fsdp(plugin, self.args.objective, self.args.feature_erasure, self.args.pseudo_labels)
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = units_to_shard(self.model)
        grouped = [layer.name for layer in find_layers(self.model).layers if layer.geometry.groups > 1]
        if grouped:
            raise UNSCError(
                f"fsdp: {grouped[0]!r} is a grouped convolution, whose rows cannot be sharded; use one process or DDP (torchrun)."
            )
        fsdp2_prepare_model(self.accelerator, self.model)

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
        frozen = weight_digests(self.model, exclude=trained)
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
        objective = OBJECTIVES[args.objective]
        if objective.teacher:
            assert self._teacher is not None
            with torch.no_grad():
                taught = self.task.logits(self._teacher, inputs)
            more["teacher"] = self.task.positions(taught, labels, targets)[0]
        if retain is not None:
            more.update(rehearse(model, retain, self.task, args, self._teacher, self._special_tokens))
        if self.forgotten_classes and objective.retain_teacher:
            more["forgotten"] = torch.as_tensor(self.forgotten_classes)
        more.update(beta=args.objective_beta, gamma=args.objective_gamma, retain_weight=args.retain_weight)
        loss = objective.loss(Terms(logits, true, pseudo, samples, reference, **more))
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
            rows = [part.select(evenly_spaced(np.arange(len(part)), limit)) for part in rows]
        forget, retain = (self.task.measure(self._iterate(self.model, part, "Check")) for part in rows)
        unseen = None if self.plan is None else self._now_unseen() if self._follows else self.plan.unseen
        check = Check.of(forget, retain, self.held_out_leak().total, unseen, rehearsed=self._follows)
        # One process decides for all: rounding must not let them disagree on stopping.
        decided: Check = gathered(check, self.args.device)[0]
        return decided

    @property
    def _follows(self) -> bool:
        """Whether single rows are held against unseen ones as the model knows them now, not as the original did.

        A model that loses some accuracy while it forgets knows unseen rows less well, and so must forgotten ones be. Only where retained rows
        are rehearsed: nothing else would keep both from being forgotten together.
        """
        return self.plan is not None and self.plan.unseen is not None and OBJECTIVES[self.args.objective].retain

    def _now_unseen(self) -> Measure:
        """Unseen rows under the model as it is now, losses sorted; the targets of the forget rows follow them."""
        assert self._unseen is not None
        unseen = self._unseen.select(evenly_spaced(np.arange(len(self._unseen)), self.args.max_validation_rows))
        found = self.task.measure(self._iterate(self.model, unseen, "Unseen rows")).in_order()
        if self._matched is not None:
            assert found.losses is not None
            self._matched.follow(found.losses)
        return found

    def _check_outcome(self, frozen: dict[str, str], trained: set[str]) -> None:
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
        changed = [
            name for name, digest in weight_digests(self.model, exclude=trained).items() if frozen.get(name) != digest
        ]
        if changed:
            raise RuntimeError(f"{changed[0]}, a frozen weight or buffer, has changed while unlearning")
        if self.stop_reason != "target":
            logger.warning(
                "Unlearning ended (%s) before the target %s %.3g%s was reached.",
                self.stop_reason,
                "forget accuracy" if self.plan.unseen is None else "exposure",
                self.plan.target,
                ", at the accuracy of unseen rows," if self._follows else "",
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
        """Logit drift on held-out rows once the adapter is merged, in float32 and cast to bfloat16; on a copy.

        A bfloat16 model is merged in float32 too, and what that alone changes is not counted: it is held against itself in float32.
        """
        assert self.plan is not None
        merged: Any = copy.deepcopy(model).float()

        def logits(network: nn.Module, dtype: torch.dtype) -> Tensor:
            def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
                return _cast_floats(self._collate(rows), dtype)

            rows = self._prepared(self._retain_held_out)
            limit = None if self.task.label_column is not None else MOST_LOGITS
            options = self._reading("Merged", False)
            return collect_outputs(network.to(dtype), rows, collate, max_elements=limit, **options).logits

        held_out = before = self.plan.held_out_logits
        if self._base_dtype != "float32":
            with merged.disable_adapter():
                before = logits(merged, torch.float32)
        with full_float32():
            merged = merged.merge_and_unload()
        return {
            "float32": logit_drift(before, logits(merged, torch.float32)),
            "bfloat16": logit_drift(held_out, logits(merged, torch.bfloat16)),
        }

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
            base_dtype=self._base_dtype,
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
            "objective": f"{args.objective} {args.retain_weight} {args.retain_dropout} {args.retain_mixing}",
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


def _cast_inputs(
    model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: floating inputs in the precision the model is in at that moment."""
    given = {str(i): value for i, value in enumerate(args)} | kwargs
    tensors = _cast_floats({name: value for name, value in given.items() if isinstance(value, Tensor)}, model.dtype)
    found = {**given, **tensors}
    return tuple(found[str(i)] for i in range(len(args))), {name: found[name] for name in kwargs}


def _cast_floats(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
