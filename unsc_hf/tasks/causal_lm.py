"""Rows of tokens: every answer token is a position of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..config import UNSCConfig
from ..data.dialogues import IGNORED, AnswerCollator, prepare_dialogues
from ..errors import UNSCError
from ..models.outputs import Outputs, read_answers, token_losses
from ..objectives.pseudo_labels import Matching, pseudo_labels, sparse
from .base import Measure, Task, register

REFUSALS = (
    "I don't know.", "I'm not sure about that.", "I have no information on that.", "I can't answer this question.",
    "That is something I don't know.", "I'm afraid I don't have the answer.",
)  # fmt: skip
SOFT_TOKENS = 64  # next tokens kept of a soft pseudo-label over a vocabulary


@register
class CausalLMTask(Task):
    """Rows of tokens; labels are the next tokens, -100 where there is none to learn."""

    specificity = 1

    @classmethod
    def accepts(cls, model: nn.Module) -> bool:
        """Models that predict next tokens."""
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        return type(base).__name__ in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())

    def __init__(
        self, model: PreTrainedModel, args: UNSCConfig, forget: Dataset, retain: Dataset, processing_class: Any
    ) -> None:
        if args.pseudo_labels == "nearest_mean":
            raise UNSCError(
                "pseudo_labels: 'nearest_mean' needs classes; a language model has 'top1', 'soft', 'second', "
                "'random', 'matched'."
            )
        if args.per_class_statistics:
            raise UNSCError(f"subspace_rule: {args.subspace_rule!r} needs classes; use 'energy', 'rank' or 'ratio'.")
        self._args, self._processing_class = args, processing_class
        self._vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self._refused = 0
        self._random = torch.Generator().manual_seed(args.seed)  # one stream for all batches, however they are cut

    def default_collator(self) -> Any:
        """Pads token ids, masks and labels of prepared rows."""
        return AnswerCollator.of(self._processing_class)

    def prepare(self, dataset: Dataset) -> Dataset:
        """Rows of token ids, mask and labels."""
        return prepare_dialogues(dataset, self._processing_class, self._args.completion_only_loss)

    def strata(self, dataset: Dataset) -> np.ndarray:
        """One stratum."""
        return np.zeros(len(dataset), dtype=np.int64)

    def groups(self, dataset: Dataset) -> np.ndarray:
        """One group: a language model has no classes."""
        return np.full(len(dataset), "all")

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Of a batch, (batch, tokens, vocabulary)."""
        logits: Tensor = model(**inputs).logits
        return logits

    def outputs(self, logits: Tensor, labels: Tensor) -> Outputs:
        """One position per labelled token: the logits that predict it."""
        return read_answers(logits, labels)

    def targets(
        self, strategy: str, forget: Outputs, retain: Outputs | None, matching: Matching | None
    ) -> list[dict[str, Tensor]]:
        """Pseudo-labels of each sample's positions, and the log-likelihood of its labels under the original."""
        labels = pseudo_labels(
            strategy,
            forget,
            range(self._vocabulary),
            matching=matching,
            temperature=self._args.pseudo_label_temperature,
            seed=self._random,
        )
        packed = (labels[:, None] if labels.dim() == 1 else sparse(labels, SOFT_TOKENS)).cpu()
        each = -F.cross_entropy(forget.logits, forget.labels, reduction="none").cpu()
        samples, result = forget.need_samples().cpu(), []
        for sample in torch.unique(samples).tolist():
            mine = samples == sample
            result.append({"pseudo_labels": packed[mine], "reference": each[mine].sum()})
        return result

    def collate_targets(self, batch: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        """Add the targets of `rows` to their batch, at the positions that predict labels."""
        labelled = batch["labels"][:, 1:] != -100
        packed = torch.cat([row["pseudo_labels"] for row in rows])
        pseudo = torch.zeros(*labelled.shape, packed.shape[1], dtype=packed.dtype)
        pseudo[labelled] = packed
        batch["pseudo_labels"] = pseudo
        batch["reference"] = torch.stack([row["reference"] for row in rows])

    def positions(self, logits: Tensor, labels: Tensor, pseudo: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits, labels, targets and sample numbers of the labelled positions of a training batch."""
        flat = self.outputs(logits, labels)
        packed = pseudo[labels[:, 1:] != -100]
        if packed.shape[1] == 1:
            return flat.logits, flat.labels, packed[:, 0], flat.need_samples()
        ids, shares = packed[:, :SOFT_TOKENS].long(), packed[:, SOFT_TOKENS:]
        dense = torch.zeros_like(flat.logits, dtype=torch.float32).scatter_add(1, ids, shares.float())
        return flat.logits, flat.labels, dense, flat.need_samples()

    def refusals(self, inputs: dict[str, Tensor], labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """A batch with a refusal in place of each answer; the refusals are taken in turn."""
        tokenizer = self._processing_class
        if tokenizer is None:
            raise UNSCError(
                "processing_class: not given; objective 'idk_dpo' writes refusals, so it needs the rows' tokenizer."
            )
        rows = []
        for ids, true in zip(inputs["input_ids"].tolist(), labels.tolist(), strict=True):
            start = next(i for i, token in enumerate(true) if token != IGNORED)
            space = " " if tokenizer.decode(true[start : start + 1]).startswith(" ") else ""
            refusal = tokenizer(space + REFUSALS[self._refused % len(REFUSALS)], add_special_tokens=False)["input_ids"]
            refusal += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
            rows.append({"input_ids": ids[:start] + refusal, "labels": [IGNORED] * start + refusal})
            self._refused += 1
        batch = {name: value.to(labels.device) for name, value in self.default_collator()(rows).items()}
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]

    def measure(self, outputs: Iterator[Outputs]) -> Measure:
        """Share of answer tokens predicted rightly from the true tokens before them, and the mean loss of a token."""
        right = total = 0
        loss = 0.0
        for part in outputs:
            right += int((part.logits.argmax(-1) == part.labels).sum())
            loss += float(token_losses(part).sum())
            total += len(part.labels)
        return Measure(right / max(total, 1), loss / max(total, 1))

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """`accuracy` of next tokens for `Trainer.evaluate`."""
        from ..evaluation.metrics import TokenAccuracy  # `evaluate` takes seconds to import

        predicted, labels = np.asarray(prediction.predictions)[:, :-1], np.asarray(prediction.label_ids)[:, 1:]
        labelled = labels != -100
        metric = TokenAccuracy(keep_in_memory=True)
        accuracy: dict[str, float] = metric.compute(predictions=predicted[labelled], references=labels[labelled])
        return accuracy

    @staticmethod
    def preprocess_logits(logits: Any, labels: Tensor) -> Tensor:
        """Token ids instead of logits: an evaluation would not fit in memory otherwise."""
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
