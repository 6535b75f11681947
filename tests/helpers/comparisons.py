"""Prepared data for comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, DatasetDict

from helpers.rows import tensor_dataset
from unsc_hf import UNSCConfig
from unsc_hf.comparison.arguments import ImageArguments


@dataclass
class Prepared(ImageArguments):
    """Rows that are ready for the model, instead of files."""

    data: Any = None

    def load(self, config: UNSCConfig) -> DatasetDict:
        return self.data

    def load_processor(self, name: str) -> Any:
        return None


def three_classes(*per_class: int) -> list[Dataset]:
    """Data sets of so many rows of each of three classes, which differ in their mean image."""
    means, sets = 2 * torch.randn(3, 3, 8, 8), []
    for count in per_class:
        labels = [c for c in range(3) for _ in range(count)]
        images = means[labels] + 0.5 * torch.randn(len(labels), 3, 8, 8)
        sets.append(tensor_dataset(images, labels, ["cat", "dog", "frog"]))
    return sets
