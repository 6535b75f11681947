"""`evaluate` modules that `Trainer.evaluate` reports. They are used by class, so nothing is downloaded.

Importing `evaluate` takes seconds, so import this module where it is needed.
"""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from .accuracy import macro_accuracy
from .language.knowledge import exact_memorization, extraction_strength, rouge


class _MetricOfIds(evaluate.Metric):
    values: Any = datasets.Value("int64")

    def _info(self) -> evaluate.MetricInfo:
        ids = self.values
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


class AnswerRouge(_MetricOfIds):
    """`compute(predictions=texts, references=texts)` gives `rouge1_recall`, `rougeL_f1` and `rougeL_recall`."""

    values = datasets.Value("string")

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        scores = [rouge(*pair) for pair in zip(predictions, references, strict=True)]
        return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


class Memorisation(_MetricOfIds):
    """`compute(predictions=answers, references=answers)` gives `exact_memorization` and `extraction_strength`.

    An answer is a list of token ids without the end-of-text token. The predicted ones are the model's most likely
    tokens, each after the true tokens before it.
    """

    values = datasets.Sequence(datasets.Value("int64"))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        recited = [np.equal(*pair) for pair in zip(predictions, references, strict=True)]
        metrics = {"exact_memorization": exact_memorization, "extraction_strength": extraction_strength}
        return {name: float(np.mean([metric(row) for row in recited])) for name, metric in metrics.items()}
