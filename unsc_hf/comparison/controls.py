"""One request beside its controls: original, masked logits, random subspace, no projection, UNSC, retrained."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig
from transformers import PreTrainedModel

from ..config import UNSCConfig
from ..data.columns import check_labels_match, read_labels
from ..data.copies import without_overlap
from ..data.inputs import default_collator, prepare_dataset
from ..data.selection import Request, evenly_spaced, hold_out, split_dataset
from ..errors import UNSCError
from ..evaluation.engine import EvaluationRows, evaluate_outputs, output_metrics
from ..evaluation.verdict import LABELS, MethodResult, judge, mean_result
from ..models.loading import load_as, load_config, model_label_names, own_processor
from ..models.outputs import Outputs, RowOutputs, collect_outputs, head_weights
from ..trainer.checkpoints import resume_from
from ..trainer.trainer import UNSCTrainer
from ..utils.phases import phase

logger = logging.getLogger(__name__)

CONTROLS = {"random_projector": "random", "unprojected": "none"}  # `null_space` of the controls that are trained
CERTIFICATE_ROWS = 5_000  # more would take longer, and tell no more than some hundredths of a percent
KNOWN = 0.05  # a reference that recognises more than this of the forgotten classes was trained on them


@dataclass(frozen=True)
class Comparison:
    """Results of a run."""

    methods: dict[str, MethodResult]  # by name, in the order of `LABELS`; "retrained" is the mean of the references
    references: list[MethodResult]  # of each retrained model
    certificate: dict[str, Any]  # of the UNSC model
    verdict: str  # one of `evaluation.verdict.WORDS`
    reason: str  # why, in a sentence
    trainer: UNSCTrainer  # holds the unlearned model


def _goal_and_certificate(
    unseen: Dataset, single_rows: bool, classes: np.ndarray, config: UNSCConfig
) -> tuple[Dataset, Dataset | None]:
    """Rows that the original never saw: for single rows to be forgotten like them, and for the certificate.

    Nothing else may read the rows of the certificate, so the former get one half. They are of the `classes` that are
    kept: a class that is forgotten, now or by a request before, has no rows among those to keep.
    """
    certificate = unseen
    if single_rows or config.pseudo_labels == "matched":
        labels = read_labels(unseen, config.label_column)
        unseen, certificate = hold_out(unseen, 0.5, labels, len(unseen), config.seed)
    kept = np.flatnonzero(np.isin(read_labels(certificate, config.label_column), classes))
    if len(kept) < 2:
        return unseen, None
    return unseen, certificate.select(evenly_spaced(kept, CERTIFICATE_ROWS))


class _Runs:
    """What all runs of one request share, so that they differ in nothing but the null space.

    `forgotten` are the ids of the classes that are forgotten whole; none when rows of remaining classes are.
    """

    def __init__(
        self, train: Dataset, test: Dataset, request: Request, unseen: Dataset | None, config: UNSCConfig,
        processing_class: Any, peft_config: PeftConfig | None,
    ) -> None:  # fmt: skip
        self.config, column = config, config.label_column
        self.original: RowOutputs | None = None  # outputs of the original, once it was measured
        forget, retain = request.split(train, column)
        retain = without_overlap(forget, retain, config.drop_overlap, config.text_columns)
        asked, kept = read_labels(forget, column), read_labels(retain, column)
        self.forgotten: list[int] = np.setdiff1d(asked, kept).tolist()
        single_rows, certificate = len(np.intersect1d(asked, kept)) > 0, None
        if unseen is not None:
            unseen, certificate = _goal_and_certificate(unseen, single_rows, kept, config)
        elif single_rows and config.target_forget_accuracy is None:
            test, unseen = hold_out(test, 0.2, read_labels(test, column), len(test), config.seed)
        eval_dataset = {"forget": forget, "retain": test}
        if self.forgotten:
            test_forget, test_retain = split_dataset(test, forget_classes=self.forgotten, label_column=column)
            eval_dataset = {"forget": test_forget, "retain": test_retain}
        self._rows = EvaluationRows.sample(forget, retain, test, column)
        self._shared: dict[str, Any] = {
            "forget_dataset": forget, "retain_dataset": retain, "eval_dataset": eval_dataset, "unseen_dataset": unseen,
            "certificate_dataset": certificate, "processing_class": processing_class, "peft_config": peft_config,
        }  # fmt: skip

    def trainer(self, null_space: str, model: PreTrainedModel, statistics: Any) -> UNSCTrainer:
        """A trainer of `model`; see `UNSCConfig.null_space`."""
        return UNSCTrainer(model, self.config.control(null_space), statistics=statistics, **self._shared)

    def measure(
        self, model: PreTrainedModel, processor: Any, leak: float | None = None, seconds: float | None = None
    ) -> MethodResult:
        """All metrics of a model, whose tokenizer or image processor is `processor`; the original is measured first."""
        config = self.config

        def collect(rows: Dataset) -> Outputs:
            prepared = prepare_dataset(rows, processor, model, config.label_column, config.text_columns)
            size, progress = config.per_device_eval_batch_size, not config.disable_tqdm
            collator = default_collator(processor)
            return collect_outputs(model, prepared, collator, features=True, batch_size=size, progress=progress)

        outputs = self._rows.outputs(collect)
        self.original = self.original or outputs
        head = head_weights(model, model.config.num_labels)
        return evaluate_outputs(outputs, head, self.forgotten, leak, seconds, self.original)

    def masked_logits(self, original: MethodResult) -> MethodResult:
        """The trivial control: the original with the forgotten logits at minus infinity, and the same features."""

        def masked(part: Outputs) -> Outputs:
            columns = torch.tensor(self.forgotten)
            return replace(part, logits=part.logits.index_fill(1, columns, -torch.inf))

        parts = RowOutputs(**{name: masked(part) for name, part in vars(self.original).items()})
        return replace(original, **output_metrics(parts, self.forgotten), leak=0.0, seconds=0.0)


def compare(
    model: PreTrainedModel,
    train: Dataset,
    test: Dataset,
    request: Request,
    config: UNSCConfig,
    processing_class: Any,
    retrained: Sequence[str | Path] = (),
    controls: bool = True,
    peft_config: PeftConfig | None = None,
    unseen: Dataset | None = None,
    statistics: Any = None,
) -> Comparison:
    """Unlearn with UNSC, and put the result beside the original, trivial controls and retrained models.

    Args:
        model: the original, in float32; it becomes the unlearned model.
        train, test: data sets with images or texts, and labels.
        request: what to forget.
        config: options of the UNSC run; the controls differ from it only in `null_space`, and have no leak budget.
        processing_class: image processor or tokenizer.
        retrained: folders or Hub ids of models trained without the forgotten rows.
        controls: also run the controls with a random subspace and with no projection.
        peft_config: a `LoraConfig`, to unlearn in adapters only.
        unseen: rows that the original never saw, for the certificate. Half of them tell when single rows are forgotten;
            without them a fifth of the test rows is taken for that and left out of the results.
        statistics: `ActivationStatistics` of the retained rows, or their folder; without them they are collected.
    """
    names, network_class = [str(name) for name in retrained], type(model)
    for name in names:
        _check_reference(name, model.config.num_labels)
    for data in (train, test):
        check_labels_match(data, config.label_column, model.config.num_labels, model_label_names(model))
    runs = _Runs(train, test, request, unseen, config, processing_class, peft_config)
    pristine: Any = deepcopy(model) if controls else None

    phase("Statistics of the rows to keep")
    unsc = runs.trainer("retained", model, statistics)
    unsc.prepare_unlearning()  # first: it refuses what cannot work
    collected = unsc.spaces.retained if controls else None
    methods = {"original": runs.measure(unsc.model, processing_class, leak=0.0)}
    if runs.forgotten:
        methods["masked"] = runs.masked_logits(methods["original"])
    phase("Unlearning")
    unsc.train(resume_from_checkpoint=resume_from(config.resume_from_checkpoint))
    certificate = unsc.certify()
    preparation = sum(unsc.plan.seconds.values())  # the controls borrow the statistics, and share what they cost
    for name, null_space in {"unsc": "retained", **(CONTROLS if controls else {})}.items():
        trainer = unsc
        if name != "unsc":
            phase(f"Control: {LABELS[name]}")
            trainer = runs.trainer(null_space, deepcopy(pristine), collected)
            trainer.train()
        leak, seconds = trainer.held_out_leak().total, preparation + trainer.unlearning_seconds
        methods[name] = runs.measure(trainer.unwrapped(), processing_class, leak, seconds)
    references = []
    for name in names:
        phase("Audits of retrained models")
        retrained_model = load_as(network_class, name, "retrained_model_name_or_path").to(config.device)
        processor = own_processor(name, processing_class)
        references.append(runs.measure(retrained_model, processor, seconds=training_seconds(name)))
        share = references[-1].AccDut or 0.0
        if share > KNOWN:
            logger.warning("%s recognises %.0f %% of the forgotten classes: it was trained on them.", name, 100 * share)
    if references:
        methods["retrained"] = mean_result(references)
    retrained_evidence = [reference.evidence(runs.forgotten) for reference in references]
    verdict = judge(methods["unsc"].evidence(runs.forgotten), retrained_evidence, runs.forgotten)
    ordered = {name: methods[name] for name in LABELS if name in methods}
    return Comparison(ordered, references, certificate.to_dict(), verdict.word, verdict.reason, unsc)


def _check_reference(name: str, num_labels: int) -> None:
    """Refuse a reference that cannot be loaded or has other labels, before anything long begins."""
    labels = load_config(name, "retrained_model_name_or_path").num_labels
    if labels != num_labels:
        raise UNSCError(
            f"retrained_model_name_or_path: {name!r} has {labels} labels, the original {num_labels}; "
            "a reference needs an output for the forgotten classes too."
        )


def training_seconds(folder: str | Path) -> float | None:
    """Seconds that `train_model` noted, if this model was made by it."""
    file = Path(folder) / "training.json"
    noted = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return float(noted["seconds"]) if "seconds" in noted else None
