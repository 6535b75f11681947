"""Rows that are prepared once and kept: decoding images and cutting texts into tokens again for every pass takes as long as a small model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

BUDGET = 512 * 2**20  # bytes of rows kept by one process


class Memory:
    """Prepared rows of several data sets, up to a number of bytes in all; beyond it rows are prepared anew each time.

    Args:
        budget: bytes.
    """

    def __init__(self, budget: int = BUDGET) -> None:
        self.left = budget
        self._known: dict[str, RememberedRows] = {}

    def of(self, rows: Dataset, prepare: Callable[[Dataset], Dataset]) -> RememberedRows:
        """What `prepare`, always the same function, makes of `rows`; equal selections of one data set are known by their fingerprint."""
        key = str(rows._fingerprint)
        if key not in self._known:
            self._known[key] = RememberedRows(prepare(rows), self)
        return self._known[key]


class RememberedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Prepared rows that are read from `prepared` when they are first asked for. Whoever takes one must not change it."""

    def __init__(self, prepared: Dataset, memory: Memory) -> None:
        self.prepared, self._memory = prepared, memory
        self._rows: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        missing = [i for i in dict.fromkeys(indices) if i not in self._rows]
        read = dict(zip(missing, self.prepared.__getitems__(missing), strict=True)) if missing else {}
        for i, row in read.items():
            size = sum(_bytes(value) for value in row.values())
            if size > self._memory.left:
                break
            self._memory.left -= size
            self._rows[i] = {name: value.clone() if isinstance(value, Tensor) else value for name, value in row.items()}
        return [read[i] if i in read else self._rows[i] for i in indices]


def _bytes(value: Any) -> int:
    """About how much memory a value takes."""
    if isinstance(value, Tensor):
        return value.element_size() * value.numel()
    return 8 * len(value) + 56 if isinstance(value, list | tuple | str) else 64
