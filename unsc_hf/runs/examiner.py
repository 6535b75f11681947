"""Measures every model of a run on language models in the same way."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..evaluation.answers import Answers
from ..evaluation.language.tofu import SUMMARY, MissingInputError, TofuEvaluation
from ..utils.files import write_text
from .language_evaluation import EVAL, SUMMARY_FILE, summarise

Measure = Callable[[PreTrainedModel], Mapping[str, Any]]

_SLOW = ("mia_gradnorm", "mia_reference")  # a gradient for each row, and a second model


@dataclass
class Examiner:
    """Answers, flips, and TOFU's metrics where its configurations are there.

    Attributes:
        evaluate: metrics of a model on each set.
        compare: its flips against the original.
        tofu: TOFU's evaluation of a model, or None.
        results: TOFU's results, by model. The first retrained model's are the retain logs of those that follow.
    """

    evaluate: Measure
    compare: Measure
    tofu: Callable[..., TofuEvaluation] | None = None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __call__(self, name: str, model: PreTrainedModel, **details: Any) -> Answers:
        """Everything about one model; `details` are fields of `Answers`."""
        answers = Answers(dict(self.evaluate(model)), **self.compare(model), **details)
        if self.tofu is None:
            return answers
        evaluation = self.tofu(model, retain_logs=self.results.get("retrained"))
        for metric in SUMMARY:
            if metric not in _SLOW:
                try:
                    evaluation.result(metric)
                except MissingInputError:
                    continue  # the data has no such rows or columns
        self.results.setdefault(name, evaluation.results)
        summary = summarise(evaluation.results)
        quality, utility = summary.get("forget_quality"), summary.get("model_utility")
        return replace(answers, forget_quality=quality, model_utility=utility)


def write_evaluations(evaluations: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
    """Each model's results in open-unlearning's files, in a folder of its own; never published."""
    for name, results in evaluations.items():
        place = folder / "evaluations" / name.replace(" ", "-")
        write_text(place / EVAL, json.dumps(dict(sorted(results.items())), indent=4))
        write_text(place / SUMMARY_FILE, json.dumps(summarise(results), indent=4))
