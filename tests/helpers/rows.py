"""Tiny data sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import ClassLabel, Dataset, Features, List, Value

ANIMALS = ["cat", "dog", "frog"]
Data = tuple[Dataset, Dataset]
Draw = Callable[[int], Dataset]  # so many rows of each class


def tensor_dataset(pixels: torch.Tensor, labels: list[int], names: list[str] | None = None) -> Dataset:
    """Rows ready for the model: `pixel_values` and `label`."""
    side: Any = Value("float32")
    for _ in range(pixels.dim() - 1):
        side = List(side)
    label = ClassLabel(names=names or [f"class {i}" for i in range(max(labels) + 1)])
    features = Features({"pixel_values": side, "label": label})
    return Dataset.from_dict({"pixel_values": pixels.tolist(), "label": labels}, features=features).with_format("torch")


def random_rows(rows: int, classes: int = 3) -> Dataset:
    """Images of noise, whose classes take turns."""
    return tensor_dataset(torch.randn(rows, 3, 8, 8), [i % classes for i in range(rows)])


def exact_rows(names: list[str]) -> Data:
    """Forget rows of class 2, and retained rows of classes 0 and 1 that repeat four images."""
    images = torch.randn(4, 3, 8, 8)
    retain = tensor_dataset(images.repeat(6, 1, 1, 1), [0, 0, 1, 1] * 6, names)
    return tensor_dataset(torch.randn(40, 3, 8, 8), [2] * 40, names), retain


def separable() -> Draw:
    """Three classes that differ in their mean image, so that a tiny model can learn them."""
    means = 2 * torch.randn(3, 3, 8, 8)

    def draw(per_class: int) -> Dataset:
        labels = [c for c in range(3) for _ in range(per_class)]
        return tensor_dataset(means[labels] + 0.5 * torch.randn(len(labels), 3, 8, 8), labels, ANIMALS)

    return draw


def with_odd_labels(data: Dataset, rows: int) -> Dataset:
    """The same rows, some with labels that no model would give."""
    odd = torch.randperm(len(data))[:rows].tolist()
    labels = [(int(label) + 1) % 3 if i in odd else int(label) for i, label in enumerate(data["label"][:])]
    return tensor_dataset(torch.stack(list(data["pixel_values"][:])), labels, ANIMALS)
