"""Training of image classifiers to compare with; the quickstart's data and plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTConfig

from ...data.inputs import open_image
from ...data.selection import evenly_spaced
from ...errors import UNSCError
from ...models.loading import load_image_processor
from . import networks  # noqa: F401  (so that a folder that holds one of them loads)
from .training import TrainingPlan

_STATISTICS_ROWS = 1000  # images that pixel mean and spread are computed from


@dataclass(frozen=True)
class ImagePlan(TrainingPlan):
    """How an image classifier is trained.

    Attributes:
        size: a ViT's, or None to fine-tune `base_model`.
        patch_size: side of a patch in pixels, for `size`; it must divide the image.
    """

    patch_size: int = 4

    auto_class: ClassVar[Any] = AutoModelForImageClassification
    load_processor: ClassVar[Callable[[str], Any]] = load_image_processor

    def untrained(self, dataset: Dataset, labels: Sequence[str]) -> tuple[PreTrainedModel, Any]:
        """A ViT for the images of `dataset`: size and channels are those of the first.

        Raises:
            UNSCError: unknown size, or a patch that does not divide the image.
        """
        processor, channels = fitting_processor(dataset, self.patch_size)
        model = self.from_scratch(
            ViTConfig, labels, image_size=processor.size["height"], patch_size=self.patch_size, num_channels=channels,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        return model, processor


def fitting_processor(dataset: Dataset, patch_size: int) -> tuple[Any, int]:
    """An image processor with the pixel mean and spread of `dataset`, and the number of channels.

    Raises:
        UNSCError: the first image is not square, or `patch_size` does not divide it.
    """
    from transformers import ViTImageProcessor  # here, because importing it warns where torchvision is missing

    column = next(name for name, feature in dataset.features.items() if isinstance(feature, Image))
    dataset = dataset.select_columns([column]).cast_column(column, Image(decode=False))
    first = open_image(dataset[0][column])
    side = first.height
    if first.width != side or side % patch_size:
        raise UNSCError(f"patch_size: {patch_size} does not divide images of {first.height} x {first.width} pixels.")
    channels = 1 if first.mode in ("L", "1", "I", "F") else 3
    mode = "L" if channels == 1 else "RGB"
    sample = dataset.select(evenly_spaced(np.arange(len(dataset)), _STATISTICS_ROWS))
    images = [np.asarray(open_image(row[column]).convert(mode)).reshape(side, side, channels) for row in sample]
    pixels = np.stack(images) / 255.0
    processor = ViTImageProcessor(
        do_resize=False,
        size={"height": side, "width": side},
        do_convert_rgb=None,
        image_mean=pixels.mean((0, 1, 2)).round(4).tolist(),
        image_std=pixels.std((0, 1, 2)).round(4).tolist(),
    )
    return processor, channels


# ---- quickstart -----------------------------------------------------------------------------------------------------
FORGET_CLASSES = ["8"]

# Chosen by validation accuracy on a part of the training rows.
PLAN = ImagePlan(size="nano", patch_size=2, epochs=100, learning_rate=1e-3, batch_size=64, seed=42)


def digits_dataset() -> DatasetDict:
    """Handwritten digits as images, with class names "0" to "9": 60 % train, 10 % validation, 30 % test, stratified."""
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    rest, test = train_test_split(np.arange(len(pixels)), test_size=0.3, stratify=digits.target, random_state=0)
    train, validation = train_test_split(rest, test_size=1 / 7, stratify=digits.target[rest], random_state=0)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    return DatasetDict(
        {
            name: Dataset.from_dict(
                {"image": [PILImage.fromarray(pixels[i]) for i in rows], "label": digits.target[rows].tolist()},
                features=features,
            )
            for name, rows in (("train", train), ("validation", validation), ("test", test))
        }
    )
