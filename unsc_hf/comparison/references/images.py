"""Image data sets and the models to compare with: loading, and training an original or a retrained classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    default_data_collator,
)

from ...data.inputs import open_image, prepare_dataset
from ...errors import UNSCError
from ...models.loading import load_image_processor, load_to_finetune
from .training import TrainingPlan


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
    dataset = dataset.select_columns([column]).cast_column(column, Image(decode=False))
    first = open_image(dataset[0][column])
    side = first.height
    if first.width != side or side % patch_size:
        raise UNSCError(f"patch_size: {patch_size} does not divide images of {first.height} x {first.width} pixels.")
    channels = 1 if first.mode in ("L", "1", "I", "F") else 3
    sample = dataset.select(np.linspace(0, len(dataset) - 1, min(1000, len(dataset))).astype(int))
    mode = "L" if channels == 1 else "RGB"
    pixels = (
        np.stack([np.asarray(open_image(row[column]).convert(mode)).reshape(side, side, channels) for row in sample])
        / 255.0
    )
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
class ImagePlan(TrainingPlan):
    """How an image classifier is trained.

    Attributes:
        size: name in `VIT_SIZES`, or None to fine-tune `base_model`.
        patch_size: for `size`.
        crop_padding, flip: augmentation.
    """

    patch_size: int = 4
    crop_padding: int = 0
    flip: bool = False

    def start(self, dataset: Dataset, labels: Sequence[str]) -> tuple[PreTrainedModel, Any]:
        if self.base_model is None:
            assert self.size is not None
            return build_vit(dataset, self.size, self.patch_size, labels)
        processor = load_image_processor(self.base_model)
        return load_to_finetune(AutoModelForImageClassification, self.base_model, labels), processor

    def prepare(self, dataset: Dataset, processor: Any, model: PreTrainedModel, label_column: str | None) -> Any:
        return prepare_dataset(dataset, processor, model, label_column)

    def collator(self, processor: Any) -> Any:
        return AugmentingCollator(self.crop_padding, self.flip)
