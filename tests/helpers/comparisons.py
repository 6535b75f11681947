"""Prepared data for comparisons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import DatasetDict

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
