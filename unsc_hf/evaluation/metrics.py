"""`evaluate` modules over the pure functions of this package: load them by class, no download is needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from .accuracy import macro_accuracy
from .generation import extraction_strength, perplexity, rouge_l, truth_ratio
from .membership import membership_inference
from .probes import linear_probe, prototype_attack

_CITATION = "Chen et al., Machine Unlearning via Null Space Calibration, IJCAI 2024, arXiv 2404.13588"
_VECTOR = datasets.Sequence(datasets.Value("float32"))
_DOUBLES = datasets.Sequence(datasets.Value("float64"))


def _info(description: str, **features: Any) -> evaluate.MetricInfo:
    return evaluate.MetricInfo(
        description=description,
        citation=_CITATION,
        inputs_description=description,
        features=datasets.Features(features),
    )


class UnlearningAccuracy(evaluate.Metric):
    """`compute(predictions=ids, references=ids, forget_classes=[...])` gives `forget_accuracy` and `retain_accuracy`.

    On test rows these are AccDut and AccDrt, on training rows AccDf and AccDr (macro over classes; None without rows).
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(self.__doc__ or "", predictions=datasets.Value("int64"), references=datasets.Value("int64"))

    def _compute(self, predictions: Any, references: Any, forget_classes: list[int]) -> dict[str, float | None]:
        kept = set(references) - set(forget_classes)
        return {
            "forget_accuracy": macro_accuracy(predictions, references, forget_classes),
            "retain_accuracy": macro_accuracy(predictions, references, kept),
        }


class MembershipInference(evaluate.Metric):
    """`compute(predictions=logits, references=labels, member=..., forgotten=...)` gives `auc` and `tpr_at_1pct_fpr`.

    `member` is 1 for training rows, `forgotten` is 1 for rows of the forgotten classes; all four kinds are needed.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            self.__doc__ or "",
            predictions=_VECTOR,
            references=datasets.Value("int64"),
            member=datasets.Value("int64"),
            forgotten=datasets.Value("int64"),
        )

    def _compute(
        self, predictions: Any, references: Any, member: Any, forgotten: Any, seed: int = 0
    ) -> dict[str, float]:
        logits, labels = torch.as_tensor(predictions), torch.as_tensor(references)
        members, forgot = torch.as_tensor(member).bool(), torch.as_tensor(forgotten).bool()

        def rows(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return logits[chosen], labels[chosen]

        result = membership_inference(
            rows(members & ~forgot), rows(~members & ~forgot), rows(members & forgot), rows(~members & forgot), seed
        )
        return {"auc": result.auc, "tpr_at_1pct_fpr": result.tpr_at_1pct_fpr}


class LinearProbe(evaluate.Metric):
    """`compute(predictions=features, references=labels, train=..., forget_classes=[...])` gives `probe_forget`.

    `train` is 1 for rows the probe is fitted on; the others are tested.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            self.__doc__ or "", predictions=_VECTOR, references=datasets.Value("int64"), train=datasets.Value("int64")
        )

    def _compute(
        self, predictions: Any, references: Any, train: Any, forget_classes: list[int]
    ) -> dict[str, float | None]:
        features, labels = torch.as_tensor(predictions), torch.as_tensor(references)
        fit = torch.as_tensor(train).bool()
        return {"probe_forget": linear_probe(features[fit], labels[fit], features[~fit], labels[~fit], forget_classes)}


class PrototypeAttack(evaluate.Metric):
    """`compute(predictions=features, references=labels, train=..., weight=..., bias=..., forget_classes=[...], shots=k)`.

    `train` is 1 for rows the attacker draws examples from; `weight` and `bias` are the head's. Gives `prototype_attack_k`.
    """

    def _info(self) -> evaluate.MetricInfo:
        return _info(
            self.__doc__ or "", predictions=_VECTOR, references=datasets.Value("int64"), train=datasets.Value("int64")
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        train: Any,
        weight: Any,
        forget_classes: list[int],
        bias: Any = None,
        shots: int = 10,
    ) -> dict[str, float | None]:
        features, labels = torch.as_tensor(predictions), torch.as_tensor(references)
        forgotten = torch.isin(labels, torch.tensor(forget_classes))
        drawn, tested = torch.as_tensor(train).bool() & forgotten, ~torch.as_tensor(train).bool() & forgotten
        value = prototype_attack(
            torch.as_tensor(weight),
            None if bias is None else torch.as_tensor(bias),
            features[drawn],
            labels[drawn],
            features[tested],
            labels[tested],
            forget_classes,
            shots=shots,
        )
        return {f"prototype_attack_{shots}": value}


class RougeL(evaluate.Metric):
    """`compute(predictions=texts, references=texts)` gives `rouge_l`: mean ROUGE-L recall."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self.__doc__ or "", predictions=datasets.Value("string"), references=datasets.Value("string"))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"rouge_l": _mean(rouge_l(ours, true) for ours, true in zip(predictions, references, strict=True))}


class ExtractionStrength(evaluate.Metric):
    """`compute(predictions=ids, references=ids)`: most likely next token ids of each answer, after its true ones."""

    def _info(self) -> evaluate.MetricInfo:
        ids = datasets.Sequence(datasets.Value("int64"))
        return _info(self.__doc__ or "", predictions=ids, references=ids)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        return {"extraction_strength": _mean(extraction_strength(ours, true) for ours, true in pairs)}


class Perplexity(evaluate.Metric):
    """`compute(predictions=losses, references=tokens)`: mean loss of each answer's tokens, and how many they are."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self.__doc__ or "", predictions=datasets.Value("float64"), references=datasets.Value("int64"))

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        loss = sum(mean * count for mean, count in zip(predictions, references, strict=True)) / sum(references)
        return {"loss": loss, "perplexity": perplexity(loss)}


class TruthRatio(evaluate.Metric):
    """`compute(predictions=paraphrased, references=perturbed)`: log-likelihoods per token, of several wrong answers each."""

    def _info(self) -> evaluate.MetricInfo:
        return _info(self.__doc__ or "", predictions=datasets.Value("float64"), references=_DOUBLES)

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"truth_ratio": truth_ratio(predictions, references)}


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
