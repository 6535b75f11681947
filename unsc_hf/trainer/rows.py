"""The rows that are trained on: forget rows with their targets, and with each a retained row where those are rehearsed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset


class RelabelledDataset(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows of a data set with their targets: what a task's `targets` gave for each.

    With `retained`, every row also brings one of those along, under "retain": drawn anew for each epoch from `seed`, so that a resumed run
    meets the same ones, however far batches were read ahead.
    """

    def __init__(
        self,
        dataset: Dataset,
        targets: Sequence[dict[str, torch.Tensor]],
        retained: Dataset | None = None,
        seed: int = 0,
    ) -> None:
        if len(targets) != len(dataset):
            raise RuntimeError(f"{len(targets)} targets for {len(dataset)} rows")
        self.dataset, self.targets, self.retained, self.seed = dataset, targets, retained, seed
        self.begin_epoch(0)

    def begin_epoch(self, epoch: int) -> None:
        """Draw the retained rows of an epoch."""
        if self.retained is not None:
            self._drawn = np.random.default_rng([self.seed, epoch]).integers(len(self.retained), size=len(self.dataset))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        rows = self.dataset.__getitems__(indices)
        result = [{**row, **self.targets[i]} for row, i in zip(rows, indices, strict=True)]
        if self.retained is not None:
            drawn = self._drawn[indices].tolist()
            for row, extra in zip(result, self.retained.__getitems__(drawn), strict=True):
                row["retain"] = extra
        return result
