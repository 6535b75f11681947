"""The quickstart's data and plan: scikit-learn's handwritten digits, 1,797 images of 8 x 8 pixels."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from .images import ImagePlan

FORGET_CLASSES = ["8"]


# Chosen by validation accuracy on training rows alone: benchmarks/quickstart.py choose.
PLAN = ImagePlan(size="nano", patch_size=2, epochs=100, learning_rate=1e-3, batch_size=64)


def digits_dataset() -> DatasetDict:
    """Handwritten digits as images with class names "0" to "9", 70 % train and 30 % test, stratified."""
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(pixels)), test_size=0.3, stratify=digits.target, random_state=0)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})
    return DatasetDict(
        {
            name: Dataset.from_dict(
                {"image": [PILImage.fromarray(pixels[i]) for i in rows], "label": digits.target[rows].tolist()},
                features=features,
            )
            for name, rows in (("train", train), ("test", test))
        }
    )
