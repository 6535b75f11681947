"""Originals and retrained references: trained once by a stated plan, and kept for the next run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from ...data.inputs import CachedRows
from ...models.head import classify
from ...utils.files import alone
from ...utils.fingerprint import data_fingerprint


@dataclass(frozen=True)
class TrainingPlan:
    """How an original or retrained model is made; equal plans on equal data are trained once and kept.

    A modality's plan says what to start from and how to batch.

    Attributes:
        size: name of a size to train from scratch, or None to fine-tune `base_model`.
        base_model: Hub id or folder to start from.
        epochs, learning_rate, batch_size, weight_decay: of AdamW with a linear schedule and 5 % warm-up.
        seed: of initial weights and order.
    """

    size: str | None = "tiny"
    base_model: str | None = None
    epochs: float = 10
    learning_rate: float = 1e-3
    batch_size: int = 128
    weight_decay: float = 0.05
    seed: int = 0

    inputs: ClassVar[int] = 0  # changes with how rows become numbers: models that were trained before read others

    def start(self, dataset: Dataset, labels: Sequence[str]) -> tuple[PreTrainedModel, Any]:
        """The model before training, and its image processor or tokenizer."""
        raise NotImplementedError

    def prepare(self, dataset: Dataset, processor: Any, model: PreTrainedModel, label_column: str | None) -> Any:
        """Rows ready for the model."""
        raise NotImplementedError

    def collator(self, processor: Any) -> Any:
        """Makes a training batch of prepared rows."""
        raise NotImplementedError


class _Trainer(Trainer):
    """Texts with one label each run in pieces of like length, where that spares padding: the same loss and gradient."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if return_outputs or "attention_mask" not in inputs or inputs["labels"].dim() != 1:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = {name: value for name, value in inputs.items() if name != "labels"}
        return nn.functional.cross_entropy(classify(model, given)[0].float(), inputs["labels"])


def train_model(
    dataset: Dataset,
    plan: TrainingPlan,
    folder: str | Path,
    name: str,
    labels: Sequence[str] = (),
    label_column: str | None = None,
    vocabulary: Dataset | None = None,
) -> Path:
    """Train by `plan` on `dataset`, or find the model that an equal call has left in `folder`; one that another process is training is
    waited for.

    Args:
        dataset: training rows.
        plan: how to train.
        folder: where trained models are kept.
        name: what the model is, for its folder's name; an equal model is found under any name.
        labels: names of all classes by id; a retrained model has an output for the forgotten ones too.
        label_column: found by itself when None.
        vocabulary: rows that an image processor's pixel statistics or a tokenizer is made from, where that is not
            `dataset`. References for a comparison must read the same inputs as the original.

    Returns:
        The model's folder, `folder/name-<hash of plan and data>`, or an equal model's under another name; it appears only when
        training has ended.

    Raises:
        UNSCError: a base model that cannot be loaded, an unknown size, or inputs that do not fit.
    """
    settings: dict[str, Any] = {"plan": asdict(plan), "labels": list(labels), "data": data_fingerprint(dataset)}
    if plan.inputs:
        settings["inputs"] = plan.inputs
    if label_column is not None:
        settings["label_column"] = label_column
    if vocabulary is not None:
        settings["vocabulary"] = data_fingerprint(vocabulary)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    found = _trained(Path(folder), key)
    if found is None:
        with _one_process(Path(folder) / key):
            found = _trained(Path(folder), key) or _train(
                dataset, plan, Path(folder) / f"{name}-{key}", name, labels, label_column, vocabulary, settings
            )
    return found


def _trained(folder: Path, key: str) -> Path | None:
    """The model of this key, whatever it was called then."""
    return next((found for found in sorted(folder.glob(f"*-{key}")) if (found / "config.json").is_file()), None)


def _one_process(target: Path) -> AbstractContextManager[None]:
    """Nobody else trains the same meanwhile; but processes that train it together must not wait for each other."""
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return nullcontext() if together else alone(target)


def _train(
    dataset: Dataset,
    plan: TrainingPlan,
    target: Path,
    name: str,
    labels: Sequence[str],
    label_column: str | None,
    vocabulary: Dataset | None,
    settings: dict[str, Any],
) -> Path:
    set_seed(plan.seed)
    model, processor = plan.start(dataset if vocabulary is None else vocabulary, labels)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=target.parent))
    try:
        trainer = _Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=str(scratch),
                num_train_epochs=plan.epochs,
                learning_rate=plan.learning_rate,
                per_device_train_batch_size=plan.batch_size,
                weight_decay=plan.weight_decay,
                warmup_steps=0.05,
                save_strategy="no",
                logging_strategy="epoch",
                report_to="none",
                use_cpu=not torch.accelerator.is_available(),  # said aloud, so that processes on CPUs find each other
                seed=plan.seed,
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=CachedRows(plan.prepare(dataset, processor, model, label_column)),
            data_collator=plan.collator(processor),
            processing_class=processor,
        )
        result = trainer.train()
        if trainer.is_world_process_zero():
            model.save_pretrained(scratch)
            processor.save_pretrained(scratch)
            settings["seconds"] = round(result.metrics["train_runtime"], 1)
            (scratch / "training.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
            scratch.rename(target)
        trainer.accelerator.wait_for_everyone()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target
