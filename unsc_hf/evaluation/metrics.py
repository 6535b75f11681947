"""`evaluate` modules that `Trainer.evaluate` reports. They are used by class, so nothing is downloaded.

Importing `evaluate` takes seconds, so import this module where it is needed.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from .accuracy import macro_accuracy


class _MetricOfIds(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Value("int64")
        return evaluate.MetricInfo(
            description=self.__doc__ or "",
            citation="Chen et al., Machine Unlearning via Null Space Calibration, IJCAI 2024, arXiv 2404.13588",
            inputs_description=self.__doc__ or "",
            features=datasets.Features({"predictions": ids, "references": ids}),
        )


class MacroAccuracy(_MetricOfIds):
    """`compute(predictions=ids, references=ids)` gives `accuracy`: the mean over classes of the accuracy on each."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        accuracy = macro_accuracy(predictions, references)
        return {"accuracy": float("nan") if accuracy is None else accuracy}


class TokenAccuracy(_MetricOfIds):
    """`compute(predictions=ids, references=ids)` gives `accuracy`: the share of tokens that are predicted rightly."""

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float((np.asarray(predictions) == np.asarray(references)).mean())}
