"""What differs between classifiers and causal language models: labels, targets, and what forgetting is measured by.

For a language model every answer token is a position of its own, with the next token as its label: pseudo-labels,
accuracy and loss are then those of a classifier over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .causal_lm_data import AnswerCollator, prepare_dialogues
from .config import UNSCConfig
from .data import (
    check_labels_match,
    class_names,
    default_collator,
    find_label_column,
    group_labels,
    prepare_dataset,
    read_labels,
)
from .errors import UNSCError
from .evaluation.accuracy import macro_accuracy
from .loading import model_label_names
from .outputs import Outputs, classify
from .pseudo_labels import AS_UNSEEN, Matching, pseudo_labels, sparse

_LOGITS_AT_ONCE = 2**26  # that are made float64
SOFT_TOKENS = 64  # next tokens kept of a soft pseudo-label over a vocabulary


def is_causal_lm(model: nn.Module) -> bool:
    """Whether the model predicts next tokens."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return type(base).__name__ in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


@dataclass(frozen=True)
class Measure:
    """Forgetting or keeping on some rows, against the true labels.

    Attributes:
        accuracy, loss: means.
        losses: of each row of a classifier, (rows,).
    """

    accuracy: float
    loss: float
    losses: Tensor | None = None

    def in_order(self) -> Measure:
        """With its losses sorted."""
        return self if self.losses is None else replace(self, losses=self.losses.sort().values)


class ClassificationTask:
    """Rows with one label each.

    Attributes:
        whole_classes: whether no retained row shares a class with a forget row.
        forgotten_classes: ids that occur among the forget rows but not among the retained ones.
        remaining_classes: ids that occur among the retained rows.
        class_names: by id.
        label_column: where labels are.
    """

    def __init__(
        self, model: PreTrainedModel, args: UNSCConfig, forget: Dataset, retain: Dataset, processing_class: Any
    ) -> None:
        label_names = model_label_names(model)
        for dataset in (forget, retain):
            check_labels_match(dataset, args.label_column, model.config.num_labels, label_names)
        self._model, self._args, self._processing_class = model, args, processing_class
        self.class_names = class_names(forget, args.label_column) or label_names
        self.label_column: str | None = find_label_column(forget, args.label_column)
        wanted = set(read_labels(forget, args.label_column).tolist())
        kept = set(read_labels(retain, args.label_column).tolist())
        if len(wanted | kept) < 2:
            raise UNSCError(
                "retain_dataset: holds a single class, the one to forget; pseudo-labels need another class."
            )
        self.forgotten_classes, self.remaining_classes = sorted(wanted - kept), sorted(kept)
        self.whole_classes = not wanted & kept

    def default_collator(self) -> Any:
        """Batches of prepared rows."""
        return default_collator(self._processing_class)

    def prepare(self, dataset: Dataset) -> Dataset:
        """Rows ready for the model."""
        args = self._args
        return prepare_dataset(dataset, self._processing_class, self._model, args.label_column, args.text_columns)

    def strata(self, dataset: Dataset) -> np.ndarray:
        """Classes, to hold out rows of each."""
        return read_labels(dataset, self._args.label_column)

    def groups(self, dataset: Dataset) -> np.ndarray:
        """Group of each row in the statistics."""
        return group_labels(dataset, self._args.label_column)[0]

    def logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Of a batch, (batch, labels)."""
        return classify(model, inputs)[0]

    def outputs(self, logits: Tensor, labels: Tensor) -> Outputs:
        """One position per row."""
        if logits.dim() != 2:
            raise UNSCError(f"model: logits have shape {tuple(logits.shape)}, expected (batch, labels).")
        return Outputs(logits, None, labels)

    def targets(
        self, strategy: str, forget: Outputs, retain: Outputs | None, matching: Matching | None
    ) -> list[dict[str, Tensor]]:
        """Pseudo-label and log-likelihood under the original of each row."""
        found = pseudo_labels(
            strategy,
            forget,
            self.remaining_classes,
            retain=retain,
            matching=matching,
            temperature=self._args.pseudo_label_temperature,
            seed=self._args.seed,
        )
        hard = found if found.dim() == 1 else found.argmax(1)
        if strategy not in AS_UNSEEN and bool((hard == forget.labels).any()):
            raise RuntimeError("a pseudo-label equals the row's own label")
        reference = -F.cross_entropy(forget.logits, forget.labels, reduction="none")
        return [{"pseudo_labels": label, "reference": value} for label, value in zip(found, reference, strict=True)]

    def collate_targets(self, batch: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
        """Add the targets of `rows` to their batch."""
        for name in ("pseudo_labels", "reference", "target_row"):
            if name in rows[0]:
                batch[name] = torch.stack([row[name] for row in rows])

    def positions(self, logits: Tensor, labels: Tensor, pseudo: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits, labels, targets and sample numbers of the labelled positions of a training batch."""
        return logits, labels, pseudo, torch.arange(len(labels), device=labels.device)

    def measure(self, outputs: Iterator[Outputs]) -> Measure:
        """Accuracy: mean over classes where whole classes are forgotten, over rows otherwise."""
        parts = list(outputs)
        logits, labels = torch.cat([p.logits for p in parts]), torch.cat([p.labels for p in parts])
        accuracy = (
            macro_accuracy(logits, labels)
            if self.whole_classes
            else float((logits.argmax(-1) == labels).float().mean())
        )
        losses = F.cross_entropy(logits.double(), labels, reduction="none")
        return Measure(accuracy or 0.0, float(losses.mean()), losses)

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """`accuracy` and `loss` for `Trainer.evaluate`. Upstream's loss is a mean over batches, of which several processes fill up the
        last; this one is the mean over rows, the same for any number of processes."""
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        given, labels = torch.as_tensor(np.asarray(logits)), torch.as_tensor(np.asarray(prediction.label_ids))
        accuracy = macro_accuracy(given, labels)
        loss = float(F.cross_entropy(given.double(), labels))
        return {"accuracy": float("nan") if accuracy is None else accuracy, "loss": loss}

    preprocess_logits: Any = None


def read_answers(logits: Tensor, labels: Tensor) -> Outputs:
    """One position per labelled token of (batch, tokens) labels: the logits that predict it, and which sample it is of."""
    if logits.dim() != 3:
        raise UNSCError(f"model: logits have shape {tuple(logits.shape)}, expected (batch, tokens, vocabulary).")
    following = labels[:, 1:]
    chosen = following != -100
    samples = torch.arange(len(labels), device=labels.device)[:, None].expand_as(following)
    return Outputs(logits[:, :-1][chosen], None, following[chosen], samples[chosen])


def token_losses(rows: Outputs) -> Tensor:
    """Cross-entropy of each position, (rows,), float64; some positions at a time, since a vocabulary is wide."""
    pieces = max(1, -(-rows.logits.numel() // _LOGITS_AT_ONCE))
    parts = zip(rows.logits.tensor_split(pieces), rows.labels.tensor_split(pieces), strict=True)
    return torch.cat([F.cross_entropy(logits.double(), labels, reduction="none") for logits, labels in parts])


class CausalLMTask:
    """Rows of tokens; labels are the next tokens, -100 where there is none to learn."""

    whole_classes = False
    label_column: str | None = None

    def __init__(
        self, model: PreTrainedModel, args: UNSCConfig, forget: Dataset, retain: Dataset, processing_class: Any
    ) -> None:
        if args.pseudo_labels in ("nearest_mean", "left_out"):
            raise UNSCError(
                f"pseudo_labels: {args.pseudo_labels!r} needs classes; a language model has 'top1', 'soft', 'second', 'random', 'matched'."
            )
        if args.subspace_merge == "concat" or args.subspace_rule == "released_ramp":
            raise UNSCError(
                "subspace_merge: class bases need classes; use subspace_merge='sum' and another subspace_rule."
            )
        self._args, self._processing_class = args, processing_class
        self.forgotten_classes: list[int] = []
        self.remaining_classes: list[int] = []
        self.class_names: list[str] = []
        self._vocabulary = int(model.get_output_embeddings().weight.shape[0])
        self._random = torch.Generator().manual_seed(args.seed)  # goes on from batch to batch, however they are cut

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
        found: Tensor = model(**inputs).logits
        return found

    def outputs(self, logits: Tensor, labels: Tensor) -> Outputs:
        """One position per labelled token: the logits that predict it."""
        return read_answers(logits, labels)

    def targets(
        self, strategy: str, forget: Outputs, retain: Outputs | None, matching: Matching | None
    ) -> list[dict[str, Tensor]]:
        """Pseudo-labels of each sample's positions, and the log-likelihood of its labels under the original."""
        found = pseudo_labels(
            strategy,
            forget,
            range(self._vocabulary),
            matching=matching,
            temperature=self._args.pseudo_label_temperature,
            seed=self._random,
        )
        packed = (found[:, None] if found.dim() == 1 else sparse(found, SOFT_TOKENS)).cpu()
        each = -F.cross_entropy(forget.logits, forget.labels, reduction="none").cpu()
        assert forget.samples is not None
        samples, result = forget.samples.cpu(), []
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
        assert flat.samples is not None
        if packed.shape[1] == 1:
            return flat.logits, flat.labels, packed[:, 0], flat.samples
        ids, shares = packed[:, :SOFT_TOKENS].long(), packed[:, SOFT_TOKENS:]
        dense = torch.zeros_like(flat.logits, dtype=torch.float32).scatter_add(1, ids, shares.float())
        return flat.logits, flat.labels, dense, flat.samples

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
        predicted, labels = np.asarray(prediction.predictions)[:, :-1], np.asarray(prediction.label_ids)[:, 1:]
        return {"accuracy": float((predicted == labels)[labels != -100].mean())}

    @staticmethod
    def preprocess_logits(logits: Any, labels: Tensor) -> Tensor:
        """Token ids instead of logits: an evaluation would not fit in memory otherwise."""
        return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


Task = ClassificationTask | CausalLMTask


def make_task(
    model: PreTrainedModel, args: UNSCConfig, forget: Dataset, retain: Dataset, processing_class: Any
) -> Task:
    """The task of a model, after checking that the data fit it."""
    kind = CausalLMTask if is_causal_lm(model) else ClassificationTask
    return kind(model, args, forget, retain, processing_class)
