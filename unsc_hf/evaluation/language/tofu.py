"""TOFU's evaluation (arXiv 2401.06121) under the names and in the shape of open-unlearning (arXiv 2506.12618)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.dialogues import DialogueTransform, PromptFormat
from ...errors import UNSCError
from . import knowledge, membership
from .answering import generate
from .readings import AnswerReading, gradient_norms, read_rows

Result = dict[str, Any]  # `agg_value`, and `value_by_index` by row

# Columns of a set by the part of a metric's name.
_COLUMNS = {"Q_A_Prob": "answer", "Q_A_PARA_Prob": "paraphrased_answer", "Q_A_PERT_Prob": "perturbed_answer"}
_SETS = ("forget", "retain", "ra", "wf")


class MissingInputError(UNSCError):
    """What a metric needs was not given; the metric is left out."""


@dataclass
class TofuEvaluation:
    """Metrics of one model, each computed once and when it is asked for.

    Attributes:
        model, tokenizer: what is evaluated.
        sets: rows with `question` and `answer`: "forget", "retain", real authors as "ra", world facts as "wf", and
            "holdout", which no model was trained on. `paraphrased_answer` and `perturbed_answer` are used where they
            exist. Any set may be missing.
        prompt_format: how questions are put.
        load_reference: gives the model of the reference attack.
        retain_logs: the results of a model trained without the rows to forget.
        batch_size: rows at a time, in one process.
        max_new_tokens: longest answer.
        progress: show a progress bar.
        results: what is finished, by metric.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    sets: Mapping[str, Dataset]
    prompt_format: PromptFormat
    load_reference: Callable[[], PreTrainedModel] | None = None
    retain_logs: Mapping[str, Any] | None = None
    batch_size: int = 16
    max_new_tokens: int = 200
    progress: bool = False
    results: dict[str, Result] = field(default_factory=dict)
    _tokens: dict[tuple[str, str], list[list[tuple[list[int], list[int]]]]] = field(default_factory=dict)
    _readings: dict[tuple[str, str], list[list[AnswerReading]]] = field(default_factory=dict)
    _reference: dict[str, list[float]] = field(default_factory=dict)

    def result(self, metric: str) -> Result:
        """The result of a metric; those that it is made of are kept too.

        Raises:
            MissingInputError: something that it needs was not given.
        """
        if metric not in self.results:
            self.results[metric] = METRICS[metric](self)
        return self.results[metric]

    def rows(self, name: str) -> Dataset:
        """Rows of a set."""
        if name not in self.sets:
            raise MissingInputError(f"there are no rows of the set {name!r}")
        return self.sets[name]

    def tokens(self, name: str, column: str = "answer") -> list[list[tuple[list[int], list[int]]]]:
        """Token ids of the prompt, and of prompt and answer, of each answer in `column` to each question of a set."""
        if (name, column) not in self._tokens:
            self._tokens[name, column] = list(self._encode(self.rows(name), name, column))
        return self._tokens[name, column]

    def _encode(self, rows: Dataset, name: str, column: str) -> Iterator[list[tuple[list[int], list[int]]]]:
        encode = DialogueTransform(self.tokenizer).encode
        if column == "answer" and "question" not in rows.column_names:  # prompt and completion, or messages
            yield from ([encode(row)] for row in rows)
            return
        if column not in rows.column_names:
            raise MissingInputError(f"the set {name!r} has no column {column}")
        for question, answers in zip(rows["question"], rows[column], strict=True):
            several = [answers] if isinstance(answers, str) or not answers else answers
            yield [encode(self.prompt_format.row(question, answer)) for answer in several]

    def labelled(self, name: str, column: str = "answer") -> list[list[dict[str, list[int]]]]:
        """Rows for the model: `input_ids`, and `labels` on the answers alone."""
        return [
            [{"input_ids": ids, "labels": [-100] * len(start) + ids[len(start) :]} for start, ids in several]
            for several in self.tokens(name, column)
        ]

    def readings(self, name: str, column: str = "answer") -> list[list[AnswerReading]]:
        """What the model says of the tokens of these answers."""
        if (name, column) not in self._readings:
            self._readings[name, column] = self._read(self.model, name, column)
        return self._readings[name, column]

    def _read(self, model: PreTrainedModel, name: str, column: str = "answer") -> list[list[AnswerReading]]:
        rows = self.labelled(name, column)
        flat = [row for several in rows for row in several]
        description = f"Reading {name} {column}" if self.progress else None
        readings = iter(read_rows(model, flat, self.pad_token_id, self.batch_size, description))
        return [[next(readings) for _ in several] for several in rows]

    @property
    def pad_token_id(self) -> int:
        """Fills batches up; hidden from the model, so any token will do."""
        token = self.tokenizer.pad_token_id
        return int(token if token is not None else self.tokenizer.eos_token_id or 0)

    def own(self, name: str) -> list[AnswerReading]:
        """Readings of the true answers of a set, without the tokens that end them."""
        return [several[0].without_last() for several in self.readings(name)]

    def reference_losses(self, name: str) -> list[float]:
        """Losses of the reference model on the true answers of rows to forget, or of unseen ones."""
        if self.load_reference is None:
            raise MissingInputError("no reference_model was given")
        if not self._reference:
            model = self.load_reference()
            for part in ("forget", "holdout"):
                self._reference[part] = [several[0].loss for several in self._read(model, part)]
        return self._reference[name]

    def decode(self, ids: Sequence[int]) -> str:
        """A text without special tokens and outer white space."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return str(text).strip()


def _by_row(rows: Sequence[Result]) -> dict[str, Result]:
    return {str(i): row for i, row in enumerate(rows)}


def _scores(values: Sequence[float], aggregate: Callable[[knowledge.Floats], float] | None = None) -> Result:
    total = float(np.mean(values)) if aggregate is None else aggregate(values)
    return {"agg_value": total, "value_by_index": _by_row([{"score": value} for value in values])}


def _probability(evaluation: TofuEvaluation, name: str, column: str) -> Result:
    rows, means = [], []
    for several in evaluation.readings(name, column):
        values = [knowledge.probability(reading.log_probs) for reading in several]
        losses = [reading.loss for reading in several]
        single = column != "perturbed_answer" or isinstance(evaluation.rows(name)[column][0], str)
        rows.append({"prob": values[0] if single else values, "avg_loss": losses[0] if single else losses})
        means.append(float(np.mean(values)))
    return {"agg_value": float(np.mean(means)), "value_by_index": _by_row(rows)}


def _pairs(evaluation: TofuEvaluation, right: str, wrong: str, key: str) -> list[tuple[list[float], list[float]]]:
    """Values `key` of the right and of the wrong answers to each question."""
    both = [evaluation.result(metric)["value_by_index"] for metric in (right, wrong)]
    return [(_listed(both[0][i][key]), _listed(both[1][i][key])) for i in both[0]]


def _listed(value: Any) -> list[float]:
    return value if isinstance(value, list) else [value]


def _normalised(evaluation: TofuEvaluation, name: str) -> Result:
    pairs = _pairs(evaluation, f"{name}_Q_A_Prob", f"{name}_Q_A_PERT_Prob", "prob")
    values = [knowledge.normalised_probability(right[0], wrong) for right, wrong in pairs]
    return {"agg_value": float(np.mean(values)), "value_by_index": _by_row([{"prob": value} for value in values])}


def _truth_ratio(evaluation: TofuEvaluation, name: str, right: str) -> Result:
    pairs = _pairs(evaluation, f"{name}_{right}", f"{name}_Q_A_PERT_Prob", "avg_loss")
    ratios = [knowledge.truth_ratio(right, wrong) for right, wrong in pairs]
    kept = name != "forget"
    return _scores(ratios, knowledge.truth_ratio_of_kept if kept else knowledge.truth_ratio_of_forgotten)


def _rouge(
    evaluation: TofuEvaluation, name: str, score: str = "rougeL_recall", most: int | None = None,
    ends: Sequence[str] = (),
) -> Result:  # fmt: skip
    """Greedy answers to a set, of `most` new tokens and up to the first of the texts `ends`; their mean `score`."""
    tokens = [several[0] for several in evaluation.tokens(name)]
    answers = generate(
        evaluation.model, [start for start, _ in tokens], evaluation.pad_token_id, evaluation.tokenizer.eos_token_id,
        most or evaluation.max_new_tokens, evaluation.batch_size, f"Answering {name}" if evaluation.progress else None,
    )  # fmt: skip
    rows = []
    for (start, ids), answer in zip(tokens, answers, strict=True):
        truth, generation = evaluation.decode(ids[len(start) :]), evaluation.decode(answer)
        for end in ends:
            generation = generation.split(end)[0]
        generation = generation.strip()
        texts = {"input": evaluation.decode(start), "ground_truth": truth, "generation": generation}
        rows.append({**knowledge.rouge(generation, truth), **texts})
    return {"agg_value": float(np.mean([row[score] for row in rows])), "value_by_index": _by_row(rows)}


def _memorised(evaluation: TofuEvaluation, measure: Callable[[knowledge.Flags], float]) -> Result:
    name = "forget_verbmem" if "forget_verbmem" in evaluation.sets else "forget"
    return _scores([measure(reading.recited) for reading in evaluation.own(name)])


def _attack(evaluation: TofuEvaluation, score: Callable[[TofuEvaluation, str], list[float]]) -> Result:
    forget, unseen = (_scores(score(evaluation, name)) for name in ("forget", "holdout"))
    values = ([row["score"] for row in part["value_by_index"].values()] for part in (forget, unseen))
    auc = membership.auc(*values)
    return {"forget": forget, "holdout": unseen, "auc": auc, "agg_value": auc}


def _losses(evaluation: TofuEvaluation, name: str) -> list[float]:
    return [several[0].loss for several in evaluation.readings(name)]


def _min_k(evaluation: TofuEvaluation, name: str) -> list[float]:
    return [membership.min_k(reading.log_probs) for reading in evaluation.own(name)]


def _min_k_plus_plus(evaluation: TofuEvaluation, name: str) -> list[float]:
    own = evaluation.own(name)
    return [membership.min_k_plus_plus(reading.log_probs, reading.mean, reading.variance) for reading in own]


def _gradient_norms(evaluation: TofuEvaluation, name: str) -> list[float]:
    return gradient_norms(evaluation.model, [several[0] for several in evaluation.labelled(name)])


def _zlib(evaluation: TofuEvaluation, name: str) -> list[float]:
    endings = [several[0][1][len(several[0][0]) :] for several in evaluation.tokens(name)]
    texts = [str(evaluation.tokenizer.decode(ids, skip_special_tokens=True)) for ids in endings]
    return [membership.zlib_ratio(*pair) for pair in zip(_losses(evaluation, name), texts, strict=True)]


def _reference(evaluation: TofuEvaluation, name: str) -> list[float]:
    pairs = zip(_losses(evaluation, name), evaluation.reference_losses(name), strict=True)
    return [membership.reference_difference(*pair) for pair in pairs]


def _forget_quality(evaluation: TofuEvaluation) -> Result:
    if evaluation.retain_logs is None:
        raise MissingInputError("no retain_logs were given")
    logs = (evaluation.result("forget_truth_ratio"), evaluation.retain_logs["forget_truth_ratio"])
    ratios = ([row["score"] for row in part["value_by_index"].values()] for part in logs)
    return {"agg_value": knowledge.forget_quality(*ratios)}


def _privleak(evaluation: TofuEvaluation) -> Result:
    """Without retain logs the AUC of the retrained model is taken to be 0.5."""
    logs = (evaluation.retain_logs or {}).get("mia_min_k") or {"agg_value": 0.5}
    return {"agg_value": membership.privleak(evaluation.result("mia_min_k")["agg_value"], logs["agg_value"])}


_UTILITY = (
    "retain_Q_A_Prob", "retain_Q_A_ROUGE", "retain_Truth_Ratio", "ra_Q_A_Prob_normalised", "ra_Q_A_ROUGE",
    "ra_Truth_Ratio", "wf_Q_A_Prob_normalised", "wf_Q_A_ROUGE", "wf_Truth_Ratio",
)  # fmt: skip


def _utility(evaluation: TofuEvaluation) -> Result:
    return {"agg_value": knowledge.model_utility([evaluation.result(name)["agg_value"] for name in _UTILITY])}


Metric = Callable[[TofuEvaluation], Result]

METRICS: dict[str, Metric] = {
    **{
        f"{name}_{part}": partial(_probability, name=name, column=_COLUMNS[part]) for name in _SETS for part in _COLUMNS
    },
    **{f"{name}_Q_A_ROUGE": partial(_rouge, name=name) for name in _SETS},
    **{f"{name}_Q_A_Prob_normalised": partial(_normalised, name=name) for name in ("ra", "wf")},
    "forget_truth_ratio": partial(_truth_ratio, name="forget", right="Q_A_PARA_Prob"),
    "retain_Truth_Ratio": partial(_truth_ratio, name="retain", right="Q_A_PARA_Prob"),
    "ra_Truth_Ratio": partial(_truth_ratio, name="ra", right="Q_A_Prob"),
    "wf_Truth_Ratio": partial(_truth_ratio, name="wf", right="Q_A_Prob"),
    "exact_memorization": partial(_memorised, measure=knowledge.exact_memorization),
    "extraction_strength": partial(_memorised, measure=knowledge.extraction_strength),
    "mia_loss": partial(_attack, score=_losses),
    "mia_min_k": partial(_attack, score=_min_k),
    "mia_min_k_plus_plus": partial(_attack, score=_min_k_plus_plus),
    "mia_gradnorm": partial(_attack, score=_gradient_norms),
    "mia_zlib": partial(_attack, score=_zlib),
    "mia_reference": partial(_attack, score=_reference),
    "forget_quality": _forget_quality,
    "model_utility": _utility,
    "privleak": _privleak,
    # MUSE's (arXiv 2407.06460, section 3), with open-unlearning's lengths and ends of answers.
    "forget_verbmem_ROUGE": partial(_rouge, name="forget_verbmem", score="rougeL_f1", most=128),
    **{
        f"{name}_ROUGE": partial(
            _rouge, name=name, score="rougeL_f1", most=32, ends=("\n\n", "\nQuestion", "Question:")
        )
        for name in ("forget_knowmem", "retain_knowmem")
    },
}

# What open-unlearning summarises; the others are parts of these.
SUMMARY = (
    "exact_memorization", "extraction_strength", "forget_Q_A_Prob", "forget_Q_A_ROUGE", "forget_quality",
    "forget_truth_ratio", "mia_gradnorm", "mia_loss", "mia_min_k", "mia_min_k_plus_plus", "mia_reference", "mia_zlib",
    "model_utility", "privleak",
)  # fmt: skip
MUSE = (
    "exact_memorization", "extraction_strength", "forget_knowmem_ROUGE", "forget_verbmem_ROUGE", "mia_loss",
    "mia_min_k", "mia_min_k_plus_plus", "mia_zlib", "privleak", "retain_knowmem_ROUGE",
)  # fmt: skip
