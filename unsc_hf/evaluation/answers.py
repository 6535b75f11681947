"""How a language model answers the questions of several data sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from ..data.dialogues import IGNORED, AnswerCollator, DialogueTransform, answer_text, in_place_of, prepare_dialogues
from .language.answering import generate
from .language.flips import token_flips
from .language.knowledge import (
    exact_memorization,
    extraction_strength,
    perplexity,
    probability,
    rouge,
    truth_ratio,
    truth_ratio_of_forgotten,
    truth_ratio_of_kept,
)
from .language.readings import AnswerReading, read_rows


@dataclass(frozen=True)
class Answers:
    """Metrics of a language model's answers.

    Attributes:
        sets: by data set: loss, perplexity, probability, exact_memorization, extraction_strength, rouge_l, truth_ratio.
        leak: relative change of layer outputs on held-out retained rows.
        flips, flips_upper_95: share of the retained answers' tokens at which another token than the original's is the
            most likely one, and its upper bound; see `evaluation.language.flips`.
        drift: mean KL(original || model) of the next-token distributions at the same tokens.
        forget_quality, model_utility: TOFU's, where its configurations are there; see `evaluation.language.knowledge`.
        seconds, steps: what making this model cost, from the original.
        stopped_by: why unlearning ended.
    """

    sets: dict[str, dict[str, float]]
    leak: float | None = None
    flips: float | None = None
    flips_upper_95: float | None = None
    drift: float | None = None
    forget_quality: float | None = None
    model_utility: float | None = None
    seconds: float | None = None
    steps: int | None = None
    stopped_by: str | None = None


def mean_answers(several: Sequence[Answers]) -> Answers:
    """Mean of several models' metrics."""

    def mean(name: str) -> float | None:
        values = [value for value in (getattr(one, name) for one in several) if value is not None]
        return float(np.mean(values)) if values else None

    sets = {
        name: {key: float(np.mean([one.sets[name][key] for one in several])) for key in metrics}
        for name, metrics in several[0].sets.items()
    }
    names = ("flips", "flips_upper_95", "drift", "forget_quality", "model_utility")
    means: dict[str, Any] = {name: mean(name) for name in names}
    return Answers(sets, **means)


def evaluate_answers(
    model: PreTrainedModel,
    tokenizer: Any,
    sets: Mapping[str, Dataset],
    *,
    max_rows: int,
    max_new_tokens: int,
    batch_size: int,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """All metrics of a model on each set, means over rows; ROUGE-L is of the greedy answers to the first `max_rows`.

    Sets with columns `paraphrased_answer` and `perturbed_answer` also get a truth ratio. It is 1 at best on the set
    "forget", when right and wrong answers are equally likely, and on others when only right ones are likely.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; None where all rows are token ids.
        sets: dialogues or prepared rows, by name.
        max_rows: rows of each set that are answered.
        max_new_tokens: longest answer.
        batch_size: rows at a time, in one process.
        progress: show progress bars.
    """
    pad, end = AnswerCollator.of(tokenizer).pad_token_id, getattr(tokenizer, "eos_token_id", None)
    read = partial(_read, model, tokenizer, pad, batch_size)
    results = {}
    for name, rows in sets.items():
        readings = read(rows, f"Reading {name}" if progress else None)
        losses = [reading.loss for reading, _ in readings]
        own = [
            reading.without_last() if labels[-1] == end and len(labels) > 1 else reading for reading, labels in readings
        ]
        metrics = {
            "loss": float(np.mean(losses)),
            "perplexity": perplexity(float(np.mean(losses))),
            "probability": float(np.mean([probability(reading.log_probs) for reading, _ in readings])),
            "exact_memorization": float(np.mean([exact_memorization(reading.recited) for reading in own])),
            "extraction_strength": float(np.mean([extraction_strength(reading.recited) for reading in own])),
        }
        if "completion" in rows.column_names:
            part = rows.select(range(min(max_rows, len(rows))))
            encode = DialogueTransform(tokenizer).encode
            answers = generate(
                model, [encode(row)[0] for row in part], pad, end, max_new_tokens, max(1, batch_size),
                f"Answering {name}" if progress else None,
            )  # fmt: skip
            pairs = zip(tokenizer.batch_decode(answers, skip_special_tokens=True), part["completion"][:], strict=True)
            metrics["rouge_l"] = float(
                np.mean([rouge(text.strip(), answer_text(true))["rougeL_recall"] for text, true in pairs])
            )
        if {"paraphrased_answer", "perturbed_answer"} <= set(rows.column_names):
            aggregate = truth_ratio_of_forgotten if name == "forget" else truth_ratio_of_kept
            metrics["truth_ratio"] = aggregate(_truth_ratios(rows, read))
        results[name] = metrics
    return results


def compare_answers(
    original: PreTrainedModel, model: PreTrainedModel, tokenizer: Any, rows: Dataset, max_rows: int, batch_size: int
) -> dict[str, float]:
    """Flips, their upper bound and drift of a model against its original, on the answers of the first `max_rows`."""
    part = rows.select(range(min(max_rows, len(rows))))
    prepared = list(prepare_dialogues(part, tokenizer, completion_only=True))
    flips = token_flips(original, model, prepared, AnswerCollator.of(tokenizer).pad_token_id, batch_size)
    return {"flips": flips.share, "flips_upper_95": flips.upper_95, "drift": flips.drift}


Readings = list[tuple[AnswerReading, list[int]]]  # with the labelled token ids


def _read(
    model: PreTrainedModel, tokenizer: Any, pad: int, batch_size: int, rows: Dataset, description: str | None
) -> Readings:
    prepared = list(prepare_dialogues(rows, tokenizer, completion_only=True))
    readings = read_rows(model, prepared, pad, batch_size, description)
    return [
        (reading, [int(token) for token in row["labels"][1:] if token != IGNORED])
        for reading, row in zip(readings, prepared, strict=True)
    ]


def _truth_ratios(rows: Dataset, read: Callable[[Dataset, str | None], Readings]) -> list[float]:
    """Of each question, from the losses of its right and its wrong answers."""
    made: list[dict[str, Any]] = []
    counts: list[tuple[int, int]] = []
    for row in rows:
        right, wrong = (
            [given] if isinstance(given, str) else list(given)
            for given in (row["paraphrased_answer"], row["perturbed_answer"])
        )
        counts.append((len(right), len(wrong)))
        made += [{**row, "completion": in_place_of(row["completion"], answer)} for answer in [*right, *wrong]]
    losses = iter([reading.loss for reading, _ in read(Dataset.from_list(made, rows.features), None)])
    return [
        truth_ratio([next(losses) for _ in range(right)], [next(losses) for _ in range(wrong)])
        for right, wrong in counts
    ]
