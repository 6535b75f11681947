"""Batches for erasure."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset

Data = tuple[Dataset, Dataset]


def batch_of(rows: Dataset) -> dict[str, Any]:
    batch = dict(rows[:])
    return {("labels" if name == "label" else name): torch.as_tensor(value) for name, value in batch.items()}
