"""One request beside its controls: original, masked logit, random projector, unprojected, UNSC, retrained."""

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
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.trainer_utils import SaveStrategy

from .adapters import head_weights
from .config import UNSCConfig
from .data import check_labels_match, prepare_dataset, read_labels, split_dataset
from .errors import UNSCError
from .evaluation.accuracy import macro_accuracy, per_class_accuracy
from .evaluation.membership import membership_inference
from .evaluation.probes import linear_probe, prototype_attack
from .evaluation.report import LABELS, MethodResult, judge, mean_result
from .loading import load_classifier, model_label_names
from .outputs import Outputs, collect_outputs
from .trainer import UNSCTrainer

logger = logging.getLogger(__name__)

_AUDIT_ROWS_PER_CLASS = 500


@dataclass(frozen=True)
class Comparison:
    """Everything a run found out.

    Attributes:
        methods: results by name, in the order of `LABELS`; "retrained" is the mean when there are several references.
        references: results of each retrained model.
        certificate: of the UNSC model.
        verdict: "removed", "suppressed" or "not forgotten".
        reason: why, in a sentence.
        trainer: the trainer that holds the unlearned model.
    """

    methods: dict[str, MethodResult]
    references: list[MethodResult]
    certificate: dict[str, Any]
    verdict: str
    reason: str
    trainer: UNSCTrainer


class Evaluator:
    """Evaluates classifiers on the same rows: all test rows, and up to 500 training rows of each class."""

    def __init__(
        self,
        train: Dataset,
        test: Dataset,
        forgotten: Sequence[int],
        processing_class: Any,
        label_column: str | None,
        batch_size: int,
    ) -> None:
        labels = read_labels(train, label_column)
        rng = np.random.default_rng(0)
        chosen = [rng.permutation(np.flatnonzero(labels == c))[:_AUDIT_ROWS_PER_CLASS] for c in np.unique(labels)]
        self._train = train.select(np.sort(np.concatenate(chosen)))
        self._test = test
        self.forgotten = list(forgotten)
        self._processing_class, self._label_column, self._batch_size = processing_class, label_column, batch_size

    def outputs(self, model: PreTrainedModel, collate_fn: Any) -> tuple[Outputs, Outputs]:
        """Outputs on the training rows and on the test rows."""
        train, test = (
            collect_outputs(
                model,
                prepare_dataset(rows, self._processing_class, model, self._label_column),
                collate_fn,
                features=True,
                batch_size=self._batch_size,
                progress=True,
            )
            for rows in (self._train, self._test)
        )
        return train, test

    def evaluate(
        self, model: PreTrainedModel, outputs: tuple[Outputs, Outputs], leak: float | None, seconds: float | None
    ) -> MethodResult:
        """All metrics of a model from its outputs."""
        train, test = outputs
        forgotten = self.forgotten
        kept = [c for c in range(train.logits.shape[1]) if c not in forgotten]
        of_train = torch.isin(train.labels, torch.tensor(forgotten))
        of_test = torch.isin(test.labels, torch.tensor(forgotten))
        auc = tpr = probe = attack = None
        finite = all(bool(torch.isfinite(part.need_features()).all()) for part in outputs)  # a control may diverge
        if bool(of_test.any()) and finite:
            membership = membership_inference(
                _rows(train, ~of_train), _rows(test, ~of_test), _rows(train, of_train), _rows(test, of_test)
            )
            auc, tpr = membership.auc, membership.tpr_at_1pct_fpr
            features, test_features = train.need_features(), test.need_features()
            probe = linear_probe(features, train.labels, test_features, test.labels, forgotten)
            weight, bias = head_weights(model, model.config.num_labels)
            attack = prototype_attack(
                weight,
                bias,
                features[of_train],
                train.labels[of_train],
                test_features[of_test],
                test.labels[of_test],
                forgotten,
            )
        return MethodResult(
            AccDf=macro_accuracy(train.logits, train.labels, forgotten),
            AccDr=macro_accuracy(train.logits, train.labels, kept),
            AccDut=macro_accuracy(test.logits, test.labels, forgotten),
            AccDrt=macro_accuracy(test.logits, test.labels, kept),
            mia_auc=auc,
            mia_tpr_at_1pct_fpr=tpr,
            probe_forget=probe,
            prototype_attack_10=attack,
            leak=leak,
            seconds=seconds,
            per_class=per_class_accuracy(test.logits, test.labels),
        )


def _rows(outputs: Outputs, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return outputs.logits[chosen], outputs.labels[chosen]


def mask_logits(outputs: Outputs, forgotten: Sequence[int]) -> Outputs:
    """The trivial control: the same outputs with the forgotten logits at minus infinity."""
    logits = outputs.logits.clone()
    logits[:, list(forgotten)] = -torch.inf
    return replace(outputs, logits=logits)


def compare(
    model: PreTrainedModel,
    train: Dataset,
    test: Dataset,
    forget_classes: Sequence[Any],
    config: UNSCConfig,
    processing_class: Any,
    retrained: Sequence[str | Path] = (),
    controls: bool = True,
    peft_config: PeftConfig | None = None,
    callbacks: Sequence[Any] = (),
) -> Comparison:
    """Unlearn with UNSC and put the result beside the original, trivial controls and retrained models.

    Args:
        model: the original, in float32; it becomes the unlearned model.
        train, test: data sets with images and labels.
        forget_classes: names or ids.
        config: options of the UNSC run; the controls differ from it only in `null_space`, and have no leak budget.
        processing_class: image processor.
        retrained: folders or Hub ids of models trained without the forgotten classes.
        controls: also run the random projector and the unprojected update.
        peft_config: a `LoraConfig`, to unlearn in adapters only.
        callbacks: more Trainer callbacks for the UNSC run.
    """
    label_column = config.label_column
    forget, retain = split_dataset(train, forget_classes=forget_classes, label_column=label_column)
    test_forget, test_retain = split_dataset(test, forget_classes=forget_classes, label_column=label_column)
    pristine = deepcopy(model) if controls else None

    def trainer(null_space: str, network: PreTrainedModel, statistics: Any) -> UNSCTrainer:
        options = deepcopy(config)
        options.null_space = null_space
        options.push_to_hub = False  # no repository is made before there is something to publish
        if null_space != "retained":
            options.save_strategy = SaveStrategy.NO  # its checkpoints would take the place of the real ones
        return UNSCTrainer(
            model=network,
            args=options,
            forget_dataset=forget,
            retain_dataset=retain,
            eval_dataset={"forget": test_forget, "retain": test_retain},
            processing_class=processing_class,
            statistics=statistics,
            peft_config=peft_config,
            callbacks=list(callbacks) if null_space == "retained" else None,
        )

    for folder in retrained:
        _check_reference(str(folder), model.config.num_labels)
    for split in (train, test):
        check_labels_match(split, label_column, model.config.num_labels, model_label_names(model))
    unsc = trainer("retained", model, None)
    evaluator = Evaluator(
        train, test, unsc.forgotten_classes, processing_class, label_column, config.per_device_eval_batch_size
    )
    unsc.prepare_unlearning()  # first: it refuses what cannot work
    original = evaluator.outputs(unsc.model, unsc.data_collator)
    masked = [mask_logits(outputs, unsc.forgotten_classes) for outputs in original]
    methods = {
        "original": evaluator.evaluate(unsc.model, original, 0.0, None),
        "masked": evaluator.evaluate(unsc.model, (masked[0], masked[1]), 0.0, 0.0),
    }
    unsc.train(resume_from_checkpoint=_resume_from(config.resume_from_checkpoint))
    certificate = unsc.certify()
    if pristine is not None:
        for null_space, name in (("random", "random_projector"), ("none", "unprojected")):
            control = trainer(null_space, deepcopy(pristine), unsc.retained_statistics)
            control.train()
            methods[name] = _trained_result(evaluator, control, unsc)
    methods["unsc"] = _trained_result(evaluator, unsc, unsc)

    references = []
    for folder in retrained:
        network = load_classifier(str(folder), "retrained_model_name_or_path").to(config.device)
        references.append(
            evaluator.evaluate(network, evaluator.outputs(network, unsc.data_collator), None, _training_seconds(folder))
        )
        knows = references[-1].AccDut
        if knows is not None and knows > 0.05:
            logger.warning(
                "%s recognises %.0f %% of the forgotten classes: it was trained on them.", folder, 100 * knows
            )
    if references:
        methods["retrained"] = mean_result(references)
    verdict, reason = judge(methods["unsc"], references, unsc.forgotten_classes)
    ordered = {name: methods[name] for name in LABELS if name in methods}
    return Comparison(ordered, references, certificate.to_dict(), verdict, reason, unsc)


def _resume_from(value: str | None) -> str | bool | None:
    """`--resume_from_checkpoint true` means the last one in the output folder."""
    return True if value is not None and value.lower() in ("true", "last") else value


def _check_reference(name: str, num_labels: int) -> None:
    """Refuse a reference that cannot be loaded or has other labels, before anything long begins."""
    try:
        found = AutoConfig.from_pretrained(name).num_labels
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UNSCError(f"retrained_model_name_or_path: cannot load {name!r}: {first}") from error
    if found != num_labels:
        raise UNSCError(
            f"retrained_model_name_or_path: {name!r} has {found} labels, the original {num_labels}; "
            "a reference needs an output for the forgotten classes too."
        )


def _trained_result(evaluator: Evaluator, trainer: UNSCTrainer, unsc: UNSCTrainer) -> MethodResult:
    """Result of a run; its cost includes the statistics, which the controls borrow from the UNSC run."""
    assert unsc.plan is not None
    network = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    seconds = sum(unsc.plan.seconds.values()) + trainer.unlearning_seconds
    outputs = evaluator.outputs(network, trainer.data_collator)
    return evaluator.evaluate(network, outputs, trainer.held_out_leak().total, seconds)


def _training_seconds(folder: str | Path) -> float | None:
    """Seconds that `train_classifier` noted, if this model was made by it."""
    file = Path(folder) / "training.json"
    if not file.is_file():
        return None
    seconds = json.loads(file.read_text(encoding="utf-8")).get("seconds")
    return None if seconds is None else float(seconds)
