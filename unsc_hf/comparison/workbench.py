"""What every method works on: an original model, rows to forget and to keep, and a trainer with shared statistics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from ..config import UNSCConfig
from ..data.inputs import CachedRows
from ..errors import UNSCError
from ..models.hooks import NOT_INPUTS, evaluation_mode
from ..models.layers import LayerSelection, ProtectedLayer
from ..models.outputs import Outputs, classify
from ..nullspace.moments import SecondMoment
from ..nullspace.statistics import ActivationStatistics
from ..trainer.preparation import Preparation, Spaces, UnlearningPlan, retained_groups
from ..trainer.trainer import UNSCTrainer
from ..utils.fingerprint import weight_hash

_SUBSPACE_OPTIONS = (
    "subspace_rule", "energy", "subspace_size", "target_modules", "rows_per_direction",
    "max_statistics_memory", "seed",
)  # fmt: skip

# (model, batches of forget rows, their outputs) -> targets: ids (rows,) or distributions (rows, labels).
Relabel = Callable[[nn.Module, Iterator[dict[str, Any]], Outputs], Tensor]


class ExactPreparation(Preparation):
    """Multiplies rows in float64, so that one set of statistics serves every rule."""

    @property
    def product_dtype(self) -> torch.dtype:
        return torch.float64


class SharedPreparation(ExactPreparation):
    """Shares the original's statistics and subspaces between the runs of a workbench.

    So it does with outputs, where the run starts `from_original`. `relabel` gives the targets of the forget rows.
    """

    def __init__(self, *parts: Any, bench: Workbench, relabel: Relabel | None, from_original: bool) -> None:
        super().__init__(*parts)
        self._bench, self._relabel, self._from_original = bench, relabel, from_original

    def spaces(self, selection: LayerSelection) -> Spaces:
        if any(getattr(self.args, name) != getattr(self._bench.config, name) for name in _SUBSPACE_OPTIONS):
            return super().spaces(selection)
        shared = replace(self._bench.spaces, seconds=0.0)
        if self.args.null_space == "random":
            return replace(shared, subspace=shared.subspace.randomised(self.args.seed))
        return shared

    def iterate(self, dataset: Dataset, description: str, features: bool = False) -> Iterator[Outputs]:
        if not self._from_original:
            return super().iterate(dataset, description, features)
        return iter([self.outputs(dataset, description, features)])

    def outputs(self, dataset: Dataset, description: str, features: bool = False) -> Outputs:
        if not self._from_original:
            return super().outputs(dataset, description, features)
        key, known, started = (str(dataset._fingerprint), features), self._bench.outputs, time.perf_counter()
        if key in known:
            self._bench.spared += known[key][1]
        else:
            outputs = super().outputs(dataset, description, features)
            known[key] = outputs, time.perf_counter() - started
        return known[key][0]

    def targets(self, retain: Outputs | None) -> list[dict[str, Tensor]]:
        targets = super().targets(retain)
        if self._relabel is None:
            return targets
        outputs = self.outputs(self.rows.forget, "Forget rows")
        labels = self._relabel(self.model, self._bench.batches(self.rows.forget, shuffle=False), outputs)
        return [{**row, "pseudo_labels": label} for row, label in zip(targets, labels, strict=True)]


class Workbench:
    """An original model and a request of whole classes, for methods to work on; nothing here is changed by them.

    Attributes:
        original: the model before; take `fresh()` copies of it.
        forget, retain: training rows.
        forgotten: ids of the classes to forget.
        seconds: what the last run cost, with the statistics where it needs them.
        steps: optimiser steps of the last run, None where it used no trainer.
        stop_reason: what ended the last run of the trainer.
        outputs: what the original says of rows, with the seconds that reading took, by fingerprint of the rows and
            whether features were read.
        spared: seconds that reading would have taken in the current run.
    """

    def __init__(
        self, original: PreTrainedModel, forget: Dataset, retain: Dataset, config: UNSCConfig, processing_class: Any
    ) -> None:
        self.original, self.forget, self.retain, self.config = original, forget, retain, deepcopy(config)
        self._processor, self._cached = processing_class, dict[str, CachedRows]()
        self.outputs: dict[tuple[str, bool], tuple[Outputs, float]] = {}
        self.seconds = self.spared = 0.0
        self.steps: int | None = None
        self.stop_reason: str | None = None
        self._prepared_trainer = self._trainer(self.fresh(), {}, (), ExactPreparation)
        self.forgotten = list(self._prepared_trainer.task.forgotten_classes)
        if not self.forgotten:
            raise UNSCError(
                "forget_classes: methods are compared on whole classes; no class disappears with these rows."
            )

    @property
    def plan(self) -> UnlearningPlan:
        """Layers, subspaces and held-out moments that methods are measured with; collected when first asked for."""
        return self._prepared_trainer.prepare_unlearning()

    @property
    def spaces(self) -> Spaces:
        """Statistics and subspaces of the original."""
        self._prepared_trainer.prepare_unlearning()
        return self._prepared_trainer.spaces

    @property
    def collate(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Makes a batch of prepared rows."""
        return self._prepared_trainer.reader.collate

    def prepared(self, rows: Dataset) -> Dataset:
        """Rows ready for the model, prepared whenever they are read."""
        return self._prepared_trainer.task.prepare(rows)

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
        self, model: PreTrainedModel, options: dict[str, Any], callbacks: Sequence[TrainerCallback],
        make_preparation: Callable[..., Preparation], statistics: ActivationStatistics | None = None,
    ) -> UNSCTrainer:  # fmt: skip
        config = deepcopy(self.config)
        for name, value in options.items():
            if not hasattr(config, name):
                raise UNSCError(f"settings: {name!r} is no option of UNSCConfig.")
            setattr(config, name, value)
        config.save_strategy, config.push_to_hub = SaveStrategy.NO, False
        config.dataloader_pin_memory &= torch.cuda.is_available()  # otherwise torch warns
        more: dict[str, Any] = {"statistics": statistics, "callbacks": list(callbacks)}
        trainer = UNSCTrainer(model, config, self.forget, self.retain, processing_class=self._processor, **more)
        trainer.make_preparation, trainer.reader.prepare = make_preparation, self.cached
        return trainer

    def unlearn(
        self, model: PreTrainedModel | None = None, relabel: Relabel | None = None,
        callbacks: Sequence[TrainerCallback] = (), **options: Any,
    ) -> PreTrainedModel:  # fmt: skip
        """Run `UNSCTrainer` on a fresh copy; it stops when the held-out forget rows are no longer recognised.

        Args:
            model: another start than a fresh copy; it may differ from the original in its head alone.
            relabel: gives the targets of the forget rows; see `Relabel`.
            callbacks: Trainer callbacks.
            options: fields of `UNSCConfig`, such as `null_space`, `objective`, `pseudo_labels`, `learning_rate`.
        """
        plan, start = self.plan, model or self.fresh()
        # A start with another head has the same inputs of its layers.
        statistics = self.spaces.retained.bound_to(weight_hash(start), [])
        self.spared = 0.0
        preparation = partial(SharedPreparation, bench=self, relabel=relabel, from_original=model is None)
        trainer = self._trainer(start, options, callbacks, preparation, statistics)
        trainer.train()
        needed = {} if trainer.args.is_control else plan.seconds
        own = trainer.plan.seconds["pseudo_labels"] + self.spared + trainer.unlearning_seconds
        self.seconds = own + needed.get("statistics", 0.0) + needed.get("decomposition", 0.0)
        self.steps, self.stop_reason = trainer.state.global_step, trainer.stop_reason
        unlearned: PreTrainedModel = trainer.unwrapped()
        return unlearned

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
        for batch in islice(loader, None if limit is None else -(-limit // batch_size)):
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

    def retained_moments(self) -> dict[str, SecondMoment]:
        """Second moments of the retained rows' inputs, summed over classes, by key of the subspace."""
        retained, trainer = self.spaces.retained, self._prepared_trainer
        return retained.pooled(retained_groups(retained, trainer.task, trainer.rows))

    def leak(self, model: PreTrainedModel) -> float | None:
        """Held-out leak of a model with the original's shapes, None for another architecture."""
        theirs, layers = model.state_dict(), self.plan.selection.layers
        if any(
            layer.weight_name not in theirs or theirs[layer.weight_name].shape != layer.weight.shape for layer in layers
        ):
            return None
        with torch.no_grad():
            for layer in layers:
                layer.weight.copy_(theirs[layer.weight_name])
        try:
            return self._prepared_trainer.held_out_leak().total
        finally:
            self.plan.projection.restore()


def row_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Summed cross-entropy of a batch against its true labels."""
    logits, _ = classify(model, {name: value for name, value in batch.items() if name not in NOT_INPUTS})
    return nn.functional.cross_entropy(logits.float(), batch["labels"], reduction="sum")
