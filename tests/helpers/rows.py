"""Tiny data sets."""

from __future__ import annotations

from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, List, Value


def tensor_dataset(pixels: torch.Tensor, labels: list[int], names: list[str] | None = None) -> Dataset:
    """Rows ready for the model: `pixel_values` and `label`."""
    count = max(labels) + 1
    feature = ClassLabel(names=names or [f"class {i}" for i in range(count)])
    side: Any = Value("float32")
    for _ in range(pixels.dim() - 1):
        side = List(side)
    features = Features({"pixel_values": side, "label": feature})
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "label": labels}, features=features).with_format("torch")


def exact_rows(names: list[str]) -> tuple[Dataset, Dataset]:
    """Forget rows of class 2, and retained rows of classes 0 and 1 that repeat four images."""
    images = torch.randn(4, 3, 8, 8)
    retain = tensor_dataset(images.repeat(6, 1, 1, 1), [0, 0, 1, 1] * 6, names)
    return tensor_dataset(torch.randn(40, 3, 8, 8), [2] * 40, names), retain


def with_odd_labels(data: Dataset, rows: int) -> Dataset:
    """The same rows, some with labels that no model would give."""
    odd = torch.randperm(len(data))[:rows].tolist()
    labels = [(int(label) + 1) % 3 if i in odd else int(label) for i, label in enumerate(data["label"][:])]
    return tensor_dataset(torch.stack(list(data["pixel_values"][:])), labels, ["cat", "dog", "frog"])
