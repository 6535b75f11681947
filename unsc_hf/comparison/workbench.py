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
from ..models.hooks import evaluation_mode, model_inputs
from ..models.layers import LayerSelection, ProtectedLayer
from ..models.outputs import Outputs, classify
from ..nullspace.statistics import ActivationStatistics
from ..trainer.preparation import Preparation, Spaces, UnlearningPlan
from ..trainer.rows import ModelReader
from ..trainer.trainer import UNSCTrainer
from ..utils.fingerprint import weight_hash

_SUBSPACE_OPTIONS = (
    "subspace_rule", "energy", "subspace_size", "target_modules", "rows_per_direction",
    "max_statistics_memory", "seed",
)  # fmt: skip

# (model, batches of forget rows, their outputs) -> targets: ids (rows,) or distributions (rows, labels).
Relabel = Callable[[nn.Module, Iterator[dict[str, Any]], Outputs], Tensor]


class SharedPreparation(Preparation):
    """Takes the subspaces of a workbench, where the options that they depend on are its own.

    Rows are multiplied in float64, so that one set of statistics serves every rule.
    """

    def __init__(self, *parts: Any, bench: Workbench | None = None) -> None:
        super().__init__(*parts)
        self._bench = bench

    @property
    def product_dtype(self) -> torch.dtype:
        return torch.float64

    def spaces(self, selection: LayerSelection) -> Spaces:
        bench = self._bench
        if bench is None or any(getattr(self.args, o) != getattr(bench.config, o) for o in _SUBSPACE_OPTIONS):
            return super().spaces(selection)
        shared = replace(bench.spaces, seconds=0.0)
        if self.args.null_space == "random":
            return replace(shared, subspace=shared.subspace.randomised(self.args.seed))
        return shared


class Workbench:
    """An original model and a request of whole classes, for methods to work on; nothing here is changed by them.

    Attributes:
        original: the model before; take `fresh()` copies of it.
        forget, retain: training rows.
        forgotten: ids of the classes to forget.
        seconds: what the last run took, with the statistics where it needs them.
        steps: optimiser steps of the last run, None where it used no trainer.
        stop_reason: what ended the last run of the trainer.
    """

    def __init__(
        self, original: PreTrainedModel, forget: Dataset, retain: Dataset, config: UNSCConfig, processing_class: Any
    ) -> None:
        self.original, self.forget, self.retain, self.config = original, forget, retain, deepcopy(config)
        self._processor, self._prepared = processing_class, dict[str, CachedRows]()
        self.seconds = 0.0
        self.steps: int | None = None
        self.stop_reason: str | None = None
        self._prepared_trainer = self._trainer(self.fresh(), {}, SharedPreparation)
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
    def reader(self) -> ModelReader:
        """Prepares rows and makes batches."""
        return self._prepared_trainer.reader

    def fresh(self) -> PreTrainedModel:
        """A copy of the original."""
        return deepcopy(self.original)

    def _trainer(
        self, model: PreTrainedModel, options: dict[str, Any], make_preparation: Callable[..., Preparation],
        callbacks: Sequence[TrainerCallback] = (), statistics: ActivationStatistics | None = None,
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
        trainer.make_preparation, trainer.reader.prepared = make_preparation, self._prepared
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
        needed, start = self.plan.seconds, model or self.fresh()
        # A start with another head has the same inputs of its layers.
        statistics = self.spaces.retained.bound_to(weight_hash(start), [])
        trainer = self._trainer(start, options, partial(SharedPreparation, bench=self), callbacks, statistics)
        trainer.prepare_unlearning()
        started = time.perf_counter()
        if relabel is not None:
            rows, targets = trainer.rows.forget, trainer.train_dataset
            outputs = trainer.reader.outputs(start, rows, "Forget rows")
            labels = relabel(start, self.batches(rows, shuffle=False), outputs)
            targets.targets = [
                {**row, "pseudo_labels": label} for row, label in zip(targets.targets, labels, strict=True)
            ]
        relabelled = time.perf_counter() - started
        trainer.train()
        self.seconds = trainer.plan.seconds["pseudo_labels"] + relabelled + trainer.unlearning_seconds
        if not trainer.args.is_control:
            self.seconds += needed["statistics"] + needed["decomposition"]
        self.steps, self.stop_reason = trainer.state.global_step, trainer.stop_reason
        unlearned: PreTrainedModel = trainer.unwrapped()
        return unlearned

    def run(self, run: Callable[..., PreTrainedModel], settings: dict[str, Any]) -> PreTrainedModel:
        """Run a method; `seconds` and `steps` tell what it took."""
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
        ready, collate = self.reader.prepare(rows), self.reader.collate
        loader = DataLoader(ready, batch_size, shuffle=shuffle, collate_fn=collate, generator=generator)
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
                logits, _ = classify(model, model_inputs(batch))
                loss = nn.functional.cross_entropy(logits.float(), batch["labels"], reduction="sum")
                for name, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                    total[name] += gradient.detach() ** 2 if squared else gradient.detach()
                seen += len(batch["labels"])
        return {name: value / max(seen, 1) for name, value in total.items()}

    def leak(self, model: PreTrainedModel) -> float | None:
        """Held-out leak of a model with the original's shapes, None for another architecture."""
        theirs, layers = model.state_dict(), self.plan.selection.layers
        shapes = {name: weight.shape for name, weight in theirs.items()}
        if any(shapes.get(layer.weight_name) != layer.weight.shape for layer in layers):
            return None
        with torch.no_grad():
            for layer in layers:
                layer.weight.copy_(theirs[layer.weight_name])
        try:
            return self._prepared_trainer.held_out_leak().total
        finally:
            self.plan.projection.restore()

    def cost(self, model: PreTrainedModel) -> dict[str, Any]:
        """What the last run took, and the leak of the model that it made."""
        return {"seconds": self.seconds, "steps": self.steps, "leak": self.leak(model)}
