"""`UNSCTrainer`: unlearning by null-space calibration as a transformers `Trainer`.

Read it from top to bottom: constructor, prepare, train, step, check, certify, save.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, SchedulerType, TrainOutput
from transformers.utils import ModelOutput

from ..config import REFUSED, UNSCConfig
from ..errors import UNSCError
from ..evaluation.certificate import Certificate
from ..models.adapters import add_adapters
from ..models.hooks import quiet
from ..models.loading import check_weights, load_model
from ..nullspace.projection import Leak
from ..nullspace.statistics import ActivationStatistics
from ..objectives import OBJECTIVES
from ..reporting.finished_run import FinishedRun, Origin
from ..reporting.model_card import public_name
from ..tasks import make_task
from ..utils.distributed import gathered, reshard, set_trained
from ..utils.fingerprint import data_fingerprint, weight_digests, weight_hash
from .callbacks import EpochCallback, ProjectionCallback
from .certify import TRAINING_ROWS, certify, check_outcome, flips_budget, nothing_to_forget
from .checkpoints import check_checkpoint, find_checkpoint
from .checks import Check, StoppingCallback
from .goals import make_goal
from .preparation import Preparation, Spaces, UnlearningPlan
from .publishing import PublishingTrainer
from .rows import ModelReader, RelabelledDataset, UnlearningRows, cast_inputs, check_arguments, prepare_evaluation
from .sharding import shard_model
from .terms import TermsProvider


class UNSCTrainer(PublishingTrainer):
    """Makes a model forget rows while its answers on retained rows stay where they were.

    Before the first step the original model is read once. The second moments of the retained rows' activations give a
    null space for each layer, and every forget row gets the most similar remaining classes as its new label. Then the
    model is trained on the re-labelled forget rows alone, with gradients and weight changes confined to the null space.

    Args:
        model: a `PreTrainedModel` in float32 (under adapters also in bfloat16), or a Hub id or folder.
        args: a `UNSCConfig`.
        forget_dataset: rows to forget (`datasets.Dataset`, raw or ready for the model).
        retain_dataset: rows to keep. They are read for statistics; only some objectives train on them.
        eval_dataset: a dict such as `{"forget": ..., "retain": ...}` gives `eval_forget_*` and `eval_retain_*`.
        processing_class: image processor for raw images, tokenizer for raw texts; saved with the model.
        peft_config: a `LoraConfig`, to train adapters only.
        statistics: `ActivationStatistics` of the retained classes (or of all), or the folder they were saved in. If
            they include the rows that this trainer holds out, the certificate says so.
        unseen_dataset: rows that the original never saw, for requests whose rows share their classes with retained
            ones. Such rows count as forgotten once they are known no better than these.
        certificate_dataset: rows to keep that only the certificate reads. Rows that the original never saw say most;
            None holds out a part of `retain_dataset`.
        data_collator, compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs: as in `Trainer`.

    Attributes:
        task: what kind of model this is.
        goal: when the rows count as forgotten.
        rows: the rows that are trained on, and those that are held out.
        reader: runs the model on raw rows.
        original_weights: hash of the model as it was given.
        stop_reason: why unlearning ended: "target", "plateau", "leak_budget", "flips_budget", "max_steps" or "stopped".
        unlearning_seconds: time spent in `train`, without the preparation.

    Raises:
        UNSCError: for input that cannot work; the message names the argument and says what to do.

    Source: "Machine Unlearning via Null Space Calibration", IJCAI 2024, arXiv 2404.13588.
    """

    args: UNSCConfig
    data_collator: Any
    lr_scheduler: Any
    _tag_names = ["unsc", "machine-unlearning"]

    # What reads the original model; a workbench puts one in its place that shares what several trainers read.
    make_preparation: Callable[..., Preparation] = Preparation
    # The loss is a batch mean; Trainer divides it by the accumulation steps.
    loss_is_scaled_for_ga = False

    # ---- constructor ------------------------------------------------------------------------------------------------

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
        certificate_dataset: Dataset | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
    ) -> None:
        retain_dataset = check_arguments(args, forget_dataset, retain_dataset)
        model = load_model(model) if isinstance(model, str) else model
        check_weights(model, frozen=peft_config is not None)
        self.task = make_task(model, args, forget_dataset, retain_dataset, processing_class)
        self.goal = make_goal(self.task, args, unseen_dataset, OBJECTIVES[args.objective].rehearses)
        forget = self.goal.hold_out(forget_dataset)
        self.rows = UnlearningRows.of(forget, retain_dataset, self.task.strata, args, certificate_dataset)
        self.stop_reason: str | None = None
        self.unlearning_seconds = 0.0
        self._forgotten_rows = len(forget_dataset)
        self._given_statistics = statistics
        self._plan: UnlearningPlan | None = None
        self._spaces: Spaces | None = None

        model = self._adopt(model, peft_config)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or self.task.default_collator(),
            train_dataset=self.task.prepare(self.rows.forget),
            eval_dataset=prepare_evaluation(eval_dataset, self.task),
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
            shard_model(self.accelerator, self.model, args)
        self._set_signature_columns_if_needed()
        self.reader = ModelReader(self.task, args, self.data_collator, self._signature_columns or ())
        self.data_collator = self.reader.collate
        model.add_model_tags(self._tag_names)

    def _adopt(self, model: PreTrainedModel, peft_config: PeftConfig | None) -> Any:
        """Note what the model was, and add adapters where they are asked for."""
        self.original_weights, self.model_class = weight_hash(model), type(model).__name__
        self.base_dtype = str(model.dtype).removeprefix("torch.")
        self.base_model_name = public_name(str(model.config._name_or_path or ""))
        if self.base_dtype != "float32":  # images come in float32, and some models do not cast them
            model.register_forward_pre_hook(cast_inputs, with_kwargs=True)
        if peft_config is None:
            return model
        adapted = add_adapters(model, peft_config)
        # Written into adapter_config.json, where a Hub id is needed and a path is not.
        adapted.peft_config["default"].base_model_name_or_path = self.base_model_name or None
        return adapted

    # ---- prepare ----------------------------------------------------------------------------------------------------

    def prepare_unlearning(self) -> UnlearningPlan:
        """Read the original model once: statistics, subspaces, pseudo-labels. `train` calls it; a second call is free.

        Raises:
            UNSCError: no protectable layer, no layer with capacity left, or statistics of another model.
        """
        if self._plan is None:
            model, args, prepare = self.unwrapped(), self.args, self.reader.prepare
            parts = (model, self.goal, self.rows, self.reader, self.original_weights, self._given_statistics)
            self._plan, self._spaces = self.make_preparation(*parts).plan()
            retain = prepare(self.rows.retain) if OBJECTIVES[args.objective].rehearses else None
            self.train_dataset = RelabelledDataset(prepare(self.rows.forget), self._plan.targets, retain, args.seed)
            self.terms = TermsProvider(model, self.goal)
        return self._plan

    @property
    def plan(self) -> UnlearningPlan:
        """Everything that was fixed before the first step.

        Raises:
            UNSCError: before `prepare_unlearning`.
        """
        if self._plan is None:
            raise UNSCError("certify: nothing was unlearned yet; call train first.")
        return self._plan

    @property
    def spaces(self) -> Spaces:
        """Statistics and subspaces, between `prepare_unlearning` and `train`, which releases them.

        Raises:
            UNSCError: before or after that.
        """
        if self._spaces is None:
            raise UNSCError(
                "spaces: there are none before prepare_unlearning, and train releases them; read them in between, or "
                "collect statistics with ActivationStatistics.collect."
            )
        return self._spaces

    def unwrapped(self) -> Any:
        """The model without accelerate's wrappers, in its own precision."""
        return self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    # ---- train ------------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:
        """Unlearn. With `resume_from_checkpoint`, construct the trainer with the *original* model, as the first time.

        True takes the last whole checkpoint, or starts anew where a run was killed before its first.

        Raises:
            UNSCError: resuming with another model, data or options than the checkpoint's run began with.
        """
        checkpoint = find_checkpoint(resume_from_checkpoint, str(self.args.output_dir))
        self.prepare_unlearning()
        if checkpoint is not None:
            check_checkpoint(checkpoint, self.run_identity())
        plan = self._plan = self.plan.released(str(self.args.output_dir))
        self._spaces = None
        trained = plan.projection.trained_names()
        wanted = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        set_trained(self.model, trained)
        frozen = weight_digests(self.model, exclude=trained)
        max_flips = flips_budget(self.args, len(self.rows.retain_held_out))
        stopping = StoppingCallback(plan.projection, self.check, self.log, self.args, self.goal, max_flips)
        epochs = EpochCallback(self.train_dataset.begin_epoch)
        callbacks: list[TrainerCallback] = [
            ProjectionCallback(plan.projection, self.args.displacement_decay), stopping, epochs,
        ]  # fmt: skip
        for callback in callbacks:
            self.add_callback(callback)
        started = time.perf_counter()
        try:
            output = super().train(resume_from_checkpoint=checkpoint, **kwargs)
            plan.projection.project_displacements(torch.float64)
        finally:
            for callback in callbacks:
                self.remove_callback(callback)
            set_trained(self.model, wanted)
        self.unlearning_seconds = time.perf_counter() - started
        self.stop_reason = stopping.reason
        unchanged = weight_digests(self.model, exclude=trained)
        check_outcome(plan, self.goal, self.state, stopping.reason, frozen, unchanged)
        return output

    # ---- step -------------------------------------------------------------------------------------------------------

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As upstream; the gradients that clipping and logging see are already projected."""
        if "pseudo_labels" not in inputs:
            raise RuntimeError("a training batch carries no pseudo-labels: it would teach the true ones")
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
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
        terms, logits = self.terms(model, inputs)
        loss = self.terms.loss(terms)
        return (loss, ModelOutput(logits=logits)) if return_outputs else loss

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """With a constant schedule the learning rate doubles every `lr_doubling_steps` steps.

        So the target comes within reach whatever the model's scale, and the leak budget ends a run that goes too far. A
        goal that must settle, not be passed, limits the rate (`ForgettingGoal.rate_limit`).
        """
        doubling = self.args.lr_doubling_steps
        if doubling is None or self.lr_scheduler is not None or self.args.lr_scheduler_type != SchedulerType.CONSTANT:
            return super().create_scheduler(num_training_steps, optimizer)
        inner, limit = self.optimizer if optimizer is None else optimizer, self.goal.rate_limit
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: min(2.0 ** (step / doubling), limit))
        return self.lr_scheduler

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As upstream; a sharded model is sharded again afterwards."""
        output = super().evaluation_loop(*args, **kwargs)
        reshard(self.model)
        return output

    # ---- check ------------------------------------------------------------------------------------------------------

    def check(self) -> Check:
        """Forgetting and leak at this moment, on rows that are not trained on."""
        leak, before = self.held_out_leak().total, self.plan.held_out_logits
        check = self.goal.check(self.model, self.reader, self.rows, leak, before)
        # One process decides for all: rounding must not let them disagree on stopping.
        decided: Check = gathered(check, self.args.device)[0]
        return decided

    def held_out_leak(self) -> Leak:
        """Leak of the current weights on held-out retained rows, whatever the budget says."""
        return self.plan.projection.leak(self.plan.held_out, self.plan.subspace.module_keys)

    # ---- certify ----------------------------------------------------------------------------------------------------

    def certify(self) -> Certificate:
        """What changed for retained rows: decisions, logits and layer outputs, with a confidence bound.

        Raises:
            UNSCError: before `train`, or beyond `max_leak` or `max_flips`, or where `energy` 1.0 did not keep logits.
        """
        return certify(
            self.unwrapped(), self.plan, self.rows, self.reader, self.held_out_leak(), self.stop_reason,
            self.base_dtype, sharded=self.is_fsdp_enabled,
        )  # fmt: skip

    # ---- save -------------------------------------------------------------------------------------------------------

    def run_card(self, model_name: str, dataset: str) -> FinishedRun:
        """What the card says of this run alone; a recipe puts the card of its whole comparison into `card_content`."""
        return FinishedRun(
            Origin(self.base_model_name, dataset),
            self.model_class,
            self._forgotten_rows,
            self.task.forgotten_classes,
            self.task.class_names,
            model_name=model_name,
            adapter={} if isinstance(self.model, PeftModel) else None,
            base_dtype=self.base_dtype,
            certificate=self.certify().to_dict() if self._plan is not None else {},
            options={name: getattr(self.args, name) for name in ("energy", "learning_rate", "seed")},
            caveats=self.caveats(),
        )

    def caveats(self) -> list[str]:
        """What a reader of the results must know, in sentences."""
        trained = [] if self.rows.certificate_unseen else [TRAINING_ROWS]
        return [*self.rows.caveats, *trained, *nothing_to_forget(self.goal, self.state.log_history)]

    def run_identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the first one, besides its options of speed."""
        args = self.args
        return {
            "model": self.original_weights[:16],
            "forget_dataset": data_fingerprint(self.rows.forget)[:16],
            "retain_dataset": data_fingerprint(self.rows.retain)[:16],
            "null_space": args.null_space,
            "subspace_rule": f"{args.subspace_rule} {args.energy} {args.subspace_size}",
            "pseudo_labels": f"{self.goal.pseudo_labels} {args.pseudo_label_temperature}",
            "objective": f"{args.objective} {sorted(args.objective_options.items())}",
            "trained": len(self.plan.selection.layers),
        }
