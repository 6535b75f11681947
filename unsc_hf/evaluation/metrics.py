"""`evaluate` modules that `Trainer.evaluate` reports. They are used by class, so nothing is downloaded.

Importing `evaluate` takes seconds, so import this module where it is needed.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from .accuracy import macro_accuracy


class MacroAccuracy(evaluate.Metric):
    """`compute(predictions=ids, references=ids)` gives `accuracy`: the mean over classes of the accuracy on each."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        accuracy = macro_accuracy(predictions, references)
        return {"accuracy": float("nan") if accuracy is None else accuracy}


class TokenAccuracy(evaluate.Metric):
    """`compute(predictions=ids, references=ids)` gives `accuracy`: the share of tokens that are predicted rightly."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float((np.asarray(predictions) == np.asarray(references)).mean())}


def _info(metric: evaluate.Metric) -> evaluate.MetricInfo:
    """What `evaluate` asks of a metric of ids."""
    ids = datasets.Value("int64")
    return evaluate.MetricInfo(
        description=metric.__doc__ or "",
        citation="Chen et al., Machine Unlearning via Null Space Calibration, IJCAI 2024, arXiv 2404.13588",
        inputs_description=metric.__doc__ or "",
        features=datasets.Features({"predictions": ids, "references": ids}),
    )
