"""What every method works on: an original model, rows to forget and to keep, and a trainer with shared statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any, TypeVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from ..config import UNSCConfig
from ..data.inputs import CachedRows
from ..errors import UNSCError
from ..models.head import classify
from ..models.hooks import NOT_INPUTS, evaluation_mode
from ..models.layers import LayerSelection, ProtectedLayer
from ..models.outputs import Outputs
from ..nullspace.moments import Measurable, Moment
from ..nullspace.statistics import ActivationStatistics
from ..nullspace.subspace import Subspace, randomised
from ..trainer.plan import UnlearningPlan
from ..trainer.trainer import UNSCTrainer
from ..utils.fingerprint import weight_hash

_SUBSPACE_OPTIONS = (
    "subspace_rule", "energy", "subspace_rank", "subspace_ratio", "subspace_merge", "target_modules",
    "max_rows_per_class", "max_samples_per_class", "max_statistics_memory", "sketch_size", "statistics_dtype", "seed",
)  # fmt: skip

AnyTrainer = TypeVar("AnyTrainer", bound=UNSCTrainer)

# (model, batches of forget rows, their outputs) -> targets: ids (rows,) or distributions (rows, labels).
Relabel = Callable[[nn.Module, Iterator[dict[str, Any]], Outputs], Tensor]


class Workbench:
    """An original model and a request of whole classes, for methods to work on; nothing here is changed by them.

    Attributes:
        original: the model before; take `fresh()` copies of it.
        forget, retain: training rows.
        forgotten: ids of the classes to forget.
        seconds: what the last run cost, with the statistics where it needs them.
        steps: optimiser steps of the last run, None where it used no trainer.
        stop_reason: what ended the last run of the trainer.
    """

    def __init__(
        self, original: PreTrainedModel, forget: Dataset, retain: Dataset, config: UNSCConfig, processing_class: Any
    ) -> None:
        self.original, self.forget, self.retain, self.config = original, forget, retain, deepcopy(config)
        self.config.statistics_dtype = config.statistics_dtype or "float64"  # one set of statistics serves every rule
        self._processing_class = processing_class
        self._cached: dict[str, CachedRows] = {}
        self._read: dict[tuple[str, bool], tuple[Outputs, float]] = {}  # with the seconds that reading took
        self._statistics: ActivationStatistics | None = None
        self._gauge = self._trainer(self.fresh(), UNSCTrainer, {}, ())
        self._gauge._prepared = self.cached
        self.forgotten = self._gauge.forgotten_classes
        if not self.forgotten:
            raise UNSCError(
                "forget_classes: methods are compared on whole classes; no class disappears with these rows."
            )
        self.seconds = 0.0
        self.steps: int | None = None
        self.stop_reason: str | None = None

    @property
    def plan(self) -> UnlearningPlan:
        """Layers, subspaces and held-out moments that methods are measured with; collected when first asked for.

        Raises:
            UNSCError: as `UNSCTrainer.prepare_unlearning`.
        """
        if self._gauge.plan is None:
            self._gauge.prepare_unlearning()
            self._statistics = self._gauge.retained_statistics
        assert self._gauge.plan is not None
        return self._gauge.plan

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Makes a batch of prepared rows."""
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]] = self._gauge.data_collator
        return collate

    def prepared(self, rows: Dataset) -> Dataset:
        """Rows ready for the model, prepared whenever they are read."""
        prepared: Dataset = self._gauge.task.prepare(rows)
        return prepared

    def cached(self, rows: Dataset) -> CachedRows:
        """The same, prepared once. Equal selections of one data set have one fingerprint, and share their rows."""
        key = str(rows._fingerprint)
        if key not in self._cached:
            self._cached[key] = CachedRows(self.prepared(rows))
        return self._cached[key]

    def fresh(self) -> PreTrainedModel:
        """A copy of the original."""
        return deepcopy(self.original)

    def _trainer(
        self,
        model: PreTrainedModel,
        kind: type[AnyTrainer],
        options: dict[str, Any],
        callbacks: Sequence[TrainerCallback],
    ) -> AnyTrainer:
        config = deepcopy(self.config)
        for name, value in options.items():
            if not hasattr(config, name):
                raise UNSCError(f"settings: {name!r} is no option of UNSCConfig.")
            setattr(config, name, value)
        statistics = self._statistics
        if statistics is not None:  # a start with another head has the same inputs of its layers
            statistics = statistics.bound_to(weight_hash(model), [])
        config.save_strategy, config.push_to_hub = SaveStrategy.NO, False
        config.dataloader_pin_memory = config.dataloader_pin_memory and torch.cuda.is_available()  # else torch warns
        return kind(
            model=model,
            args=config,
            forget_dataset=self.forget,
            retain_dataset=self.retain,
            processing_class=self._processing_class,
            statistics=statistics,
            callbacks=list(callbacks),
        )

    def unlearn(
        self,
        model: PreTrainedModel | None = None,
        relabel: Relabel | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **options: Any,
    ) -> PreTrainedModel:
        """Run `UNSCTrainer` on a fresh copy; it stops when the held-out forget rows are no longer recognised.

        Args:
            model: another start than a fresh copy; it may differ from the original in its head alone.
            relabel: gives the targets of the forget rows; see `Relabel`.
            callbacks: Trainer callbacks.
            options: fields of `UNSCConfig`, such as `null_space`, `objective`, `pseudo_labels`, `learning_rate`.
        """
        bench, another, plan = self, model is not None, self.plan

        class Relabelling(UNSCTrainer):
            shared_seconds = 0.0  # what it would have taken to read what others had read before

            def _subspace(
                self, model: nn.Module, selection: LayerSelection, original: str
            ) -> tuple[Subspace, dict[str, Measurable]]:
                if not bench.same_subspace(self.args):
                    return super()._subspace(model, selection, original)
                self.retained_statistics, self._statistics_seconds = bench._gauge.retained_statistics, 0.0
                self._forget_moments = bench._gauge._forget_moments
                subspace = plan.subspace
                if self.args.null_space == "random":
                    subspace = randomised(subspace, self.args.seed)
                return subspace, plan.held_out

            def _iterate(
                self, model: nn.Module, dataset: Dataset, description: str, features: bool = False
            ) -> Iterator[Outputs]:
                if another or self.plan is not None:
                    return super()._iterate(model, dataset, description, features)
                return iter([self._outputs(model, dataset, description, features)])

            def _outputs(self, model: nn.Module, dataset: Dataset, description: str, features: bool = False) -> Outputs:
                """Until it has a plan, a trainer reads the original, which says the same of the same rows to every method."""
                if another or self.plan is not None:
                    return super()._outputs(model, dataset, description, features)
                key, started = (str(dataset._fingerprint), features), time.perf_counter()
                if key in bench._read:
                    self.shared_seconds += bench._read[key][1]
                else:
                    found = super()._outputs(model, dataset, description, features)
                    bench._read[key] = found, time.perf_counter() - started
                return bench._read[key][0]

            def _targets(self, model: nn.Module, strategy: str, retain: Outputs | None) -> list[dict[str, Tensor]]:
                targets = super()._targets(model, strategy, retain)
                if relabel is not None:
                    outputs = self._outputs(model, self._forget_train, "Forget rows")
                    labels = relabel(model, bench.batches(self._forget_train, shuffle=False), outputs)
                    targets = [{**row, "pseudo_labels": label} for row, label in zip(targets, labels, strict=True)]
                return targets

        trainer = self._trainer(model or self.fresh(), Relabelling, options, callbacks)
        trainer._prepared = self.cached
        trainer.train()
        assert trainer.plan is not None
        needed = plan.seconds if trainer.args.null_space == "retained" else {}
        own = trainer.plan.seconds["pseudo_labels"] + trainer.shared_seconds + trainer.unlearning_seconds
        self.seconds = own + needed.get("statistics", 0.0) + needed.get("decomposition", 0.0)
        self.steps, self.stop_reason = trainer.state.global_step, trainer.stop_reason
        unlearned: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
        return unlearned

    def same_subspace(self, args: UNSCConfig) -> bool:
        """Whether a run with these options reads the subspace that is already there."""
        return all(getattr(args, name) == getattr(self.config, name) for name in _SUBSPACE_OPTIONS)

    def run(self, run: Callable[..., PreTrainedModel], settings: dict[str, Any]) -> PreTrainedModel:
        """Run a method; `seconds` and `steps` tell what it cost."""
        self.seconds, self.steps = 0.0, None
        torch.manual_seed(int(self.config.seed))
        started = time.perf_counter()
        model = run(self, **settings)
        if self.steps is None:  # it did not use the trainer
            self.seconds = time.perf_counter() - started
        return model

    def batches(
        self, rows: Dataset, batch_size: int = 128, limit: int | None = None, shuffle: bool = True, seed: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Batches of rows on the model's device, with "labels"; at most about `limit` rows."""
        generator = torch.Generator().manual_seed(seed)
        loader = DataLoader(
            self.cached(rows), batch_size=batch_size, shuffle=shuffle, collate_fn=self.collate, generator=generator
        )
        seen = 0
        for batch in loader:
            if limit is not None and seen >= limit:
                return
            seen += len(batch["labels"])
            yield {name: value.to(self.original.device) for name, value in batch.items()}

    def layers(self, model: PreTrainedModel) -> list[ProtectedLayer]:
        """The layers of `model` whose weights methods train."""
        modules = dict(model.named_modules())
        return [ProtectedLayer(layer.name, modules[layer.name], layer.geometry) for layer in self.plan.selection.layers]

    def gradients(
        self, model: PreTrainedModel, rows: Dataset, limit: int, batch_size: int, squared: bool = False
    ) -> dict[str, Tensor]:
        """Mean gradient over rows of the loss of the trained weights, by name.

        With `squared` it is the diagonal of the empirical Fisher information instead: the squared gradient of each
        small batch's summed loss, divided by the number of rows. In expectation it equals the mean over rows, where the
        rows' gradients are independent with mean zero.
        """
        weights = {layer.weight_name: layer.weight for layer in self.layers(model)}
        total = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        seen = 0
        with evaluation_mode(model, gradients=True):
            for batch in self.batches(rows, batch_size, limit):
                gradients = torch.autograd.grad(row_loss(model, batch), list(weights.values()))
                for name, gradient in zip(weights, gradients, strict=True):
                    total[name] += gradient.detach() ** 2 if squared else gradient.detach()
                seen += len(batch["labels"])
        return {name: value / max(seen, 1) for name, value in total.items()}

    def retained_moments(self) -> dict[str, Moment]:
        """Second moments of the retained rows' inputs, summed over classes, by key of the subspace."""
        _ = self.plan  # the statistics are collected with it
        statistics = self._gauge.retained_statistics
        classes = [str(c) for c in self._gauge.remaining_classes]
        return statistics.pooled(classes if classes[0] in statistics.moments else None)

    def leak(self, model: PreTrainedModel) -> float | None:
        """Held-out leak of a model with the original's shapes, None for another architecture."""
        theirs = model.state_dict()
        for layer in self.plan.selection.layers:
            if layer.weight_name not in theirs or theirs[layer.weight_name].shape != layer.weight.shape:
                return None
        weights = {layer.name: theirs[layer.weight_name].to(layer.weight) for layer in self.plan.selection.layers}
        with torch.no_grad():
            for layer in self.plan.selection.layers:
                layer.weight.copy_(weights[layer.name])
        try:
            return self._gauge.held_out_leak().total
        finally:
            self.plan.projection.restore()


def row_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Summed cross-entropy of a batch against its true labels."""
    logits, _ = classify(model, {name: value for name, value in batch.items() if name not in NOT_INPUTS})
    return nn.functional.cross_entropy(logits.float(), batch["labels"], reduction="sum")
