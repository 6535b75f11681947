"""Originals and retrained references: each is trained once by a stated plan and kept for the next run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import nn
from transformers import BertConfig, LlamaConfig, PreTrainedModel, Trainer, TrainingArguments, ViTConfig, set_seed

from ...data.inputs import CachedRows, default_collator, prepare_dataset
from ...errors import UNSCError
from ...models.loading import load_to_finetune
from ...models.outputs import classify
from ...utils.files import alone
from ...utils.fingerprint import data_fingerprint

# Layers, width and attention heads of transformers whose MLPs are four times as wide.
SIZES: dict[Any, dict[str, tuple[int, int, int]]] = {
    ViTConfig: {
        "nano": (3, 64, 4), "tiny": (4, 128, 4), "small": (6, 192, 6), "medium": (12, 384, 6), "base": (12, 768, 12),
    },
    BertConfig: {
        "nano": (2, 64, 2), "tiny": (2, 128, 2), "mini": (4, 256, 4), "small": (4, 512, 8), "medium": (8, 512, 8),
        "base": (12, 768, 12),
    },
    LlamaConfig: {"nano": (2, 128, 4), "tiny": (4, 256, 4), "small": (6, 384, 6), "medium": (12, 768, 12)},
}  # fmt: skip


@dataclass(frozen=True)
class TrainingPlan:
    """How an original or retrained model is trained. Equal plans on equal data are trained once and kept.

    A subclass says what a model of its kind starts from and how its rows are batched.

    Attributes:
        size: name of a size to train from scratch, or None to fine-tune `base_model`.
        base_model: Hub id or folder to start from.
        epochs, learning_rate, batch_size, weight_decay: of AdamW with a linear schedule and 5 % warm-up.
        seed: of the initial weights and the order of the rows.
    """

    size: str | None = "tiny"
    base_model: str | None = None
    epochs: float = 10
    learning_rate: float = 1e-3
    batch_size: int = 128
    weight_decay: float = 0.05
    seed: int = 0

    inputs: ClassVar[int] = 0  # counts changes of how rows become inputs: a model trained before one reads others
    learns_tokens: ClassVar[bool] = False  # whether a tokenizer is learned for `size`
    auto_class: ClassVar[Any] = None  # makes a model of `size`, or loads `base_model`
    load_processor: ClassVar[Callable[[str], Any]]  # loads its image processor or tokenizer

    def start(self, dataset: Dataset, labels: Sequence[str] = ()) -> tuple[PreTrainedModel, Any]:
        """The model before training, and its image processor or tokenizer, which `dataset` serves to make for `size`.

        `labels` are names of a classifier's labels by id. UNSCError: an unknown size, or a base model that cannot be
        loaded.
        """
        if self.base_model is None:
            return self.untrained(dataset, labels)
        return load_to_finetune(self.auto_class, self.base_model, labels), type(self).load_processor(self.base_model)

    def untrained(self, dataset: Dataset, labels: Sequence[str]) -> tuple[PreTrainedModel, Any]:
        """A model of `size` with random weights, and its image processor or tokenizer."""
        raise NotImplementedError

    def from_scratch(self, config_class: Any, labels: Sequence[str] = (), **settings: Any) -> PreTrainedModel:
        """A model of `size` with random weights; `settings` are further fields of its config."""
        sizes = SIZES[config_class]
        if self.size not in sizes:
            raise UNSCError(f"model_size: {self.size!r} does not exist; choose from {', '.join(sizes)}.")
        depth, width, heads = sizes[self.size]
        if labels:
            by_name = {label: i for i, label in enumerate(labels)}
            settings |= {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": by_name}
        settings |= {"num_hidden_layers": depth, "num_attention_heads": heads, "hidden_size": width}
        model: PreTrainedModel = self.auto_class.from_config(config_class(intermediate_size=4 * width, **settings))
        return model

    def prepare(self, dataset: Dataset, processor: Any, model: PreTrainedModel, label_column: str | None) -> Dataset:
        """Rows ready for the model."""
        return prepare_dataset(dataset, processor, model, label_column)

    def collator(self, processor: Any) -> Any:
        """Makes a training batch of prepared rows."""
        return default_collator(processor)


class _Trainer(Trainer):
    """Runs texts with one label each in pieces of similar length. Loss and gradient are the same, with less padding."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
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
    """Train by `plan` on `dataset`, or return the model that an equal call has left in `folder`.

    While another process trains the same model, this one waits for it.

    Args:
        name: start of the folder's name; an equal model is found under any name.
        labels: names of all classes by id. A retrained model has an output for the forgotten ones too.
        label_column: found by itself when None.
        vocabulary: rows that a tokenizer is learned from, where that is not `dataset`: a reference in a comparison must
            read the same tokens as the original.

    Returns:
        The model's folder, `folder/name-<hash of plan and data>`. It appears only when training has ended.

    Raises:
        UNSCError: a base model that cannot be loaded, an unknown size, or inputs that do not fit.
    """
    if vocabulary is dataset or plan.base_model is not None or not plan.learns_tokens:
        vocabulary = None
    settings: dict[str, Any] = {"plan": asdict(plan), "labels": list(labels), "data": data_fingerprint(dataset)}
    tokens = None if vocabulary is None else data_fingerprint(vocabulary)
    more = {"inputs": plan.inputs or None, "label_column": label_column, "vocabulary": tokens}
    settings |= {name: value for name, value in more.items() if value is not None}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    target, trained = Path(folder) / f"{name}-{key}", _trained(Path(folder), key)
    if trained is not None:
        return trained
    # Processes of one run train together and must not wait for each other.
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1
    with nullcontext() if together else alone(Path(folder) / key):
        trained = _trained(Path(folder), key)
        if trained is None:
            set_seed(plan.seed)
            model, processor = plan.start(dataset if vocabulary is None else vocabulary, labels)
            _train(model, processor, plan.prepare(dataset, processor, model, label_column), plan, target, settings)
    return trained or target


def _trained(folder: Path, key: str) -> Path | None:
    """The finished model of this key, under any name."""
    return next((path for path in sorted(folder.glob(f"*-{key}")) if (path / "config.json").is_file()), None)


def _train(
    model: PreTrainedModel, processor: Any, rows: Dataset, plan: TrainingPlan, target: Path, settings: dict[str, Any]
) -> None:
    """Train in a hidden folder, which becomes `target` at the end."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        args = TrainingArguments(
            str(scratch), num_train_epochs=plan.epochs, learning_rate=plan.learning_rate, seed=plan.seed,
            per_device_train_batch_size=plan.batch_size, weight_decay=plan.weight_decay, warmup_steps=0.05,
            save_strategy="no", logging_strategy="epoch", report_to="none", remove_unused_columns=False,
            use_cpu=not torch.accelerator.is_available(),  # explicit, so that processes on CPUs connect
            dataloader_pin_memory=torch.cuda.is_available(),
        )  # fmt: skip
        collator = plan.collator(processor)
        trainer = _Trainer(model, args, collator, CachedRows(rows), processing_class=processor)
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
