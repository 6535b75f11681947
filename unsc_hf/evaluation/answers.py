"""How a language model answers the questions of several data sets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.dialogues import AnswerCollator, prepare_dialogues
from ..models.outputs import Outputs, iterate_outputs, read_answers, token_losses
from .generation import generate_answers, rouge_l, token_metrics, truth_ratio


@dataclass(frozen=True)
class Answers:
    """Metrics of a language model's answers.

    Attributes:
        sets: by data set: loss, perplexity, token_accuracy, extraction_strength, rouge_l and truth_ratio.
        leak: relative change of layer outputs on held-out retained rows.
        seconds, steps: what making this model cost, from the original.
        stopped_by: why unlearning ended.
    """

    sets: dict[str, dict[str, float]]
    leak: float | None = None
    seconds: float | None = None
    steps: int | None = None
    stopped_by: str | None = None


def mean_answers(several: Sequence[Answers]) -> Answers:
    """Mean of several models' metrics."""
    sets = several[0].sets
    return Answers(
        {
            name: {key: float(np.mean([one.sets[name][key] for one in several])) for key in metrics}
            for name, metrics in sets.items()
        }
    )


def evaluate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Dataset],
    *,
    max_rows: int,
    max_new_tokens: int,
    batch_size: int,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """All metrics of a model on each set; ROUGE-L is of the greedy answers to the first `max_rows` rows.

    Sets with columns `paraphrased_answer` and `perturbed_answer` also get a truth ratio.
    """
    results = {}
    for name, rows in sets.items():
        metrics = token_metrics(_read(model, tokenizer, rows, batch_size))
        if "completion" in rows.column_names:
            part = rows.select(range(min(max_rows, len(rows))))
            answers = generate_answers(model, tokenizer, part["prompt"][:], max_new_tokens, progress=progress)
            scores = [rouge_l(answer, true) for answer, true in zip(answers, part["completion"][:], strict=True)]
            metrics["rouge_l"] = float(np.mean(scores))
        if {"paraphrased_answer", "perturbed_answer"} <= set(rows.column_names):
            metrics["truth_ratio"] = _truth_ratio(model, tokenizer, rows, batch_size)
        results[name] = metrics
    return results


def _read(model: PreTrainedModel, tokenizer: Any, rows: Dataset, batch_size: int) -> Iterable[Outputs]:
    prepared = prepare_dialogues(rows, tokenizer, completion_only=True)
    return iterate_outputs(model, prepared, AnswerCollator.of(tokenizer), batch_size=batch_size, read=read_answers)


def _mean_likelihoods(model: PreTrainedModel, tokenizer: Any, rows: Dataset, batch_size: int) -> list[float]:
    """Log-likelihood per token of each row's completion."""
    values: list[float] = []
    for part in _read(model, tokenizer, rows, batch_size):
        assert part.samples is not None
        each, samples = -token_losses(part).cpu(), part.samples.cpu()
        values += [float(each[samples == sample].mean()) for sample in range(int(samples.max()) + 1)]
    return values


def _truth_ratio(model: PreTrainedModel, tokenizer: Any, rows: Dataset, batch_size: int) -> float:
    def likelihoods(answers: Sequence[str], prompts: Sequence[str]) -> list[float]:
        texts = Dataset.from_dict({"prompt": list(prompts), "completion": [f" {answer.strip()}" for answer in answers]})
        return _mean_likelihoods(model, tokenizer, texts, batch_size)

    prompts = rows["prompt"][:]
    right = likelihoods(rows["paraphrased_answer"][:], prompts)
    wrong = []
    for prompt, answers in zip(prompts, rows["perturbed_answer"][:], strict=True):
        several = [answers] if isinstance(answers, str) else list(answers)
        wrong.append(likelihoods(several, [prompt] * len(several)))
    return truth_ratio(right, wrong)
