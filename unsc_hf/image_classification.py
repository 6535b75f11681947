"""Image data sets and the models to compare with: loading, and training an original or a retrained classifier."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset, DatasetDict, Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
    set_seed,
)

from .data import find_label_column, prepare_dataset
from .errors import UNSCError
from .fingerprint import data_fingerprint

TEST_SPLITS = ("test", "validation", "valid", "val")


@dataclass(frozen=True)
class VitSize:
    """A ViT from scratch: depth, width, heads; the MLP is four times as wide."""

    layers: int
    width: int
    heads: int


VIT_SIZES = {
    "nano": VitSize(3, 64, 4),
    "tiny": VitSize(4, 128, 4),
    "small": VitSize(6, 192, 6),
    "medium": VitSize(12, 384, 6),
    "base": VitSize(12, 768, 12),
}


def load_image_dataset(
    name: str,
    config_name: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    cache_dir: str | None = None,
) -> DatasetDict:
    """Load `train` and `test` from a Hub id, a parquet file or folder, an imagefolder, or a `save_to_disk` folder.

    Raises:
        UNSCError: nothing loadable there, or no test split (the splits found are listed).
    """
    path = Path(name)
    try:
        if (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
        elif path.is_file() and path.suffix == ".parquet":
            loaded = datasets.load_dataset("parquet", data_files={"train": name}, cache_dir=cache_dir)
        elif path.is_dir() and (files := _parquet_files(path)):
            loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=cache_dir)
        elif path.is_dir():
            loaded = datasets.load_dataset("imagefolder", data_dir=name, cache_dir=cache_dir)
        else:
            loaded = datasets.load_dataset(name, config_name, cache_dir=cache_dir)
    except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UNSCError(f"dataset_name: cannot load {name!r}: {first}") from error
    wanted_test = test_split or next((split for split in TEST_SPLITS if split in loaded), None)
    for argument, split in (("train_split", train_split), ("test_split", wanted_test)):
        if split is None or split not in loaded:
            raise UNSCError(f"{argument}: no split {split!r} in {name!r}; splits found: {', '.join(sorted(loaded))}.")
    result = DatasetDict(train=loaded[train_split], test=loaded[wanted_test])
    for split, part in result.items():
        find_label_column(part, label_column)
        if not any(isinstance(feature, Image) for feature in part.features.values()):
            raise UNSCError(
                f"dataset_name: the {split} split of {name!r} has no image column; columns are {', '.join(part.column_names)}."
            )
    return result


def _parquet_files(folder: Path) -> dict[str, list[str]]:
    """Parquet files of a folder by split: `train.parquet`, `train-00000-of-00002.parquet`, or `train/*.parquet`."""
    found: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.parquet")):
        split = (file.parent.name if file.parent not in (folder, folder / "data") else file.stem).split("-")[0]
        found.setdefault(split, []).append(str(file))
    return found


def build_vit(dataset: Dataset, size: str, patch_size: int, labels: Sequence[str]) -> tuple[PreTrainedModel, Any]:
    """An untrained ViT for the images of `dataset` and the image processor that fits them.

    Args:
        dataset: training rows; image size and channels are read from the first, pixel mean and spread from up to 1,000.
        size: a name in `VIT_SIZES`.
        patch_size: side of a patch in pixels; must divide the image size.
        labels: names of all classes by id, whether or not `dataset` holds rows of them.

    Raises:
        UNSCError: unknown size, or a patch that does not divide the image.
    """
    from transformers import ViTImageProcessor  # here, because importing it warns where torchvision is missing

    if size not in VIT_SIZES:
        raise UNSCError(f"model_size: {size!r} does not exist; choose from {', '.join(VIT_SIZES)}.")
    column = next(name for name, feature in dataset.features.items() if isinstance(feature, Image))
    first = dataset[0][column]
    side = first.height
    if first.width != side or side % patch_size:
        raise UNSCError(f"patch_size: {patch_size} does not divide images of {first.height} x {first.width} pixels.")
    channels = 1 if first.mode in ("L", "1", "I", "F") else 3
    sample = dataset.select(np.linspace(0, len(dataset) - 1, min(1000, len(dataset))).astype(int))
    mode = "L" if channels == 1 else "RGB"
    pixels = np.stack([np.asarray(row[column].convert(mode)).reshape(side, side, channels) for row in sample]) / 255.0
    processor = ViTImageProcessor(
        do_resize=False,
        size={"height": side, "width": side},
        do_convert_rgb=None,
        image_mean=pixels.mean((0, 1, 2)).round(4).tolist(),
        image_std=pixels.std((0, 1, 2)).round(4).tolist(),
    )
    shape = VIT_SIZES[size]
    config = ViTConfig(
        image_size=side,
        patch_size=patch_size,
        num_channels=channels,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    return ViTForImageClassification(config), processor


@dataclass(frozen=True)
class AugmentingCollator:
    """Default batch, then a random crop after zero padding and a random mirror image, for every sample apart."""

    crop_padding: int = 0
    flip: bool = False

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        batch = default_data_collator(features)
        batch["pixel_values"] = self.augment(batch["pixel_values"])
        return batch

    def augment(self, images: Tensor) -> Tensor:
        """Images (n, channels, height, width) to augmented ones of the same shape."""
        n, _, height, width = images.shape
        if self.crop_padding:
            pad = self.crop_padding
            padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
            top, left = torch.randint(0, 2 * pad + 1, (2, n))
            rows = (top[:, None] + torch.arange(height))[:, :, None]
            columns = (left[:, None] + torch.arange(width))[:, None, :]
            images = padded[torch.arange(n)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
        if self.flip:
            mirrored = torch.rand(n) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        return images


@dataclass(frozen=True)
class TrainingPlan:
    """How an original or retrained model is made; equal plans on equal data are trained once and kept.

    Attributes:
        size: name in `VIT_SIZES`, or None to fine-tune `base_model`.
        base_model: Hub id or folder to start from.
        patch_size: for `size`.
        epochs, learning_rate, batch_size, weight_decay: of AdamW with a linear schedule and 5 % warm-up.
        crop_padding, flip: augmentation.
        seed: of initial weights and order.
    """

    size: str | None = "tiny"
    base_model: str | None = None
    patch_size: int = 4
    epochs: float = 10
    learning_rate: float = 1e-3
    batch_size: int = 128
    weight_decay: float = 0.05
    crop_padding: int = 0
    flip: bool = False
    seed: int = 0


def train_classifier(
    dataset: Dataset,
    plan: TrainingPlan,
    folder: str | Path,
    name: str,
    labels: Sequence[str],
    label_column: str | None = None,
) -> Path:
    """Train by `plan` on `dataset`, or find the model that an equal call has left in `folder`.

    Args:
        dataset: training rows with images.
        plan: how to train.
        folder: where trained models are kept.
        name: what the model is, for its folder's name.
        labels: names of all classes by id; a retrained model has an output for the forgotten ones too.
        label_column: found by itself when None.

    Returns:
        The model's folder, `folder/name-<hash of plan and data>`; it appears only when training has ended.

    Raises:
        UNSCError: a base model that cannot be loaded, an unknown size, or a patch that does not fit.
    """
    settings = {"plan": asdict(plan), "labels": list(labels), "data": data_fingerprint(dataset)}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
    target = Path(folder) / f"{name}-{key}"
    if (target / "config.json").is_file():
        return target
    set_seed(plan.seed)
    if plan.base_model is not None:
        try:
            processor = AutoImageProcessor.from_pretrained(plan.base_model)
            model = AutoModelForImageClassification.from_pretrained(
                plan.base_model,
                dtype=torch.float32,
                id2label=dict(enumerate(labels)),
                label2id={label: i for i, label in enumerate(labels)},
                ignore_mismatched_sizes=True,
            )
        except (OSError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise UNSCError(f"model_name_or_path: cannot load {plan.base_model!r}: {first}") from error
    else:
        assert plan.size is not None
        model, processor = build_vit(dataset, plan.size, plan.patch_size, labels)
    Path(folder).mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder))
    try:
        trainer = Trainer(
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
                seed=plan.seed,
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
            ),
            train_dataset=prepare_dataset(dataset, processor, model, label_column),
            data_collator=AugmentingCollator(plan.crop_padding, plan.flip),
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
