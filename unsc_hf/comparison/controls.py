"""One request beside its controls: original, masked logit, random projector, unprojected, UNSC, retrained."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.trainer_utils import SaveStrategy

from ..config import UNSCConfig
from ..data.columns import check_labels_match, read_labels
from ..data.inputs import default_collator, prepare_dataset
from ..data.selection import Request, hold_out, split_dataset
from ..erasure.bands import ProbeBands
from ..errors import UNSCError, first_line
from ..evaluation.accuracy import macro_accuracy, per_class_accuracy
from ..evaluation.membership import membership_inference
from ..evaluation.probes import linear_probe, prototype_attack
from ..evaluation.verdict import LABELS, MethodResult, judge, mean_result
from ..models.head import head_weights
from ..models.loading import load_as, model_label_names, own_processor
from ..models.outputs import Outputs, RowOutputs, collect_outputs
from ..trainer.checkpoints import resume_from
from ..trainer.trainer import UNSCTrainer

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
    """Evaluates classifiers on the same rows: all test rows, and up to 500 rows of each class to forget and to keep.

    Attributes:
        forgotten: ids of the classes that are forgotten whole; empty when the request names rows of classes that remain.
    """

    def __init__(
        self, forget: Dataset, retain: Dataset, test: Dataset, forgotten: Sequence[int], label_column: str | None
    ) -> None:
        self._forget, self._retain = (sample_rows(rows, read_labels(rows, label_column)) for rows in (forget, retain))
        self._test = test
        self.forgotten = list(forgotten)

    def outputs(self, collect: Callable[[Dataset], Outputs]) -> RowOutputs:
        """Outputs of a model: `collect` runs it on raw rows."""
        return RowOutputs(collect(self._forget), collect(self._retain), collect(self._test))

    def evaluate(
        self,
        model: PreTrainedModel,
        outputs: RowOutputs,
        leak: float | None,
        seconds: float | None,
        same_features: MethodResult | None = None,
    ) -> MethodResult:
        """All metrics of a model from its outputs; the attacks on features are those of `same_features` where given."""
        forget, retain, test = outputs.forget, outputs.retain, outputs.test
        forgotten = self.forgotten
        kept = [c for c in range(test.logits.shape[1]) if c not in forgotten]
        of_test = torch.isin(test.labels, torch.tensor(forgotten, dtype=torch.long))
        auc = tpr = probe = attack = None
        finite = all(bool(torch.isfinite(part.need_features()).all()) for part in (forget, retain, test))
        if finite and bool(of_test.any()):  # a control may diverge
            membership = membership_inference(_rows(retain), _rows(test, ~of_test), _rows(forget), _rows(test, of_test))
            auc, tpr = membership.auc, membership.tpr_at_1pct_fpr
            if same_features is not None:
                probe, attack = same_features.probe_forget, same_features.prototype_attack_10
            else:
                probe, attack = self._depth(model, outputs, of_test)
        elif finite and not forgotten and len(test.labels) > 1:
            half = torch.arange(len(test.labels)) % 2 == 0  # one half teaches the attacker, the other is accused
            membership = membership_inference(_rows(retain), _rows(test, half), _rows(forget), _rows(test, ~half))
            auc, tpr = membership.auc, membership.tpr_at_1pct_fpr
        return MethodResult(
            AccDf=macro_accuracy(forget.logits, forget.labels) if forgotten else row_accuracy(forget),
            AccDr=macro_accuracy(retain.logits, retain.labels, kept),
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

    def _depth(self, model: PreTrainedModel, outputs: RowOutputs, of_test: Tensor) -> tuple[float | None, float | None]:
        """Linear probe and 10-shot prototype attack."""
        forget, retain, test = outputs.forget, outputs.retain, outputs.test
        features = torch.cat([forget.need_features(), retain.need_features()])
        labels = torch.cat([forget.labels, retain.labels])
        weight, bias = head_weights(model, model.config.num_labels)
        attack = prototype_attack(
            weight,
            bias,
            forget.need_features(),
            forget.labels,
            test.need_features()[of_test],
            test.labels[of_test],
            self.forgotten,
        )
        return linear_probe(features, labels, test.need_features(), test.labels, self.forgotten), attack


def row_accuracy(outputs: Outputs) -> float:
    """Share of rows whose label is the most likely one."""
    return float((outputs.logits.argmax(-1) == outputs.labels).float().mean())


def sample_rows(rows: Dataset, labels: np.ndarray, most: int | None = None) -> Dataset:
    """Up to 500 rows of each class, always the same ones; of many classes fewer, so that there are about `most` in all."""
    rng, classes = np.random.default_rng(0), np.unique(labels)
    each = _AUDIT_ROWS_PER_CLASS if most is None else min(_AUDIT_ROWS_PER_CLASS, -(-most // len(classes)))
    chosen = [rng.permutation(np.flatnonzero(labels == c))[:each] for c in classes]
    return rows.select(np.sort(np.concatenate(chosen)))


def _rows(outputs: Outputs, chosen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return (outputs.logits, outputs.labels) if chosen is None else (outputs.logits[chosen], outputs.labels[chosen])


def mask_logits(outputs: Outputs, forgotten: Sequence[int]) -> Outputs:
    """The trivial control: the same outputs with the forgotten logits at minus infinity."""
    logits = outputs.logits.clone()
    logits[:, list(forgotten)] = -torch.inf
    return replace(outputs, logits=logits)


def compare(
    model: PreTrainedModel,
    train: Dataset,
    test: Dataset,
    request: Request | Sequence[Any],
    config: UNSCConfig,
    processing_class: Any,
    retrained: Sequence[str | Path] = (),
    controls: bool = True,
    peft_config: PeftConfig | None = None,
    callbacks: Sequence[Any] = (),
    unseen: Dataset | None = None,
    statistics: Any = None,
) -> Comparison:
    """Unlearn with UNSC and put the result beside the original, trivial controls and retrained models.

    Args:
        model: the original, in float32; it becomes the unlearned model.
        train, test: data sets with images or texts, and labels.
        request: what to forget; a sequence is class names or ids.
        config: options of the UNSC run; the controls differ from it only in `null_space`, and have no leak budget.
        processing_class: image processor or tokenizer.
        retrained: folders or Hub ids of models trained without the forgotten rows.
        controls: also run the random projector and the unprojected update.
        peft_config: a `LoraConfig`, to unlearn in adapters only.
        callbacks: more Trainer callbacks for the UNSC run.
        unseen: rows that the original never saw, for requests of single rows; without them a fifth of the test rows is
            taken for that and left out of the results.
        statistics: `ActivationStatistics` of the retained rows, or their folder; else they are collected.
    """
    label_column = config.label_column
    if not isinstance(request, Request):
        request = Request(forget_classes=tuple(request))
    for folder in retrained:
        _check_reference(str(folder), model.config.num_labels)
    for split in (train, test):
        check_labels_match(split, label_column, model.config.num_labels, model_label_names(model))
    forget, retain = request.split(train, label_column)
    asked, kept = read_labels(forget, label_column), read_labels(retain, label_column)
    if len(np.intersect1d(asked, kept)) and unseen is None and config.target_forget_accuracy is None:
        test, unseen = hold_out(test, 0.2, read_labels(test, label_column), len(test), config.seed)
    gone = np.setdiff1d(asked, kept)
    eval_dataset = {"forget": forget, "retain": test}
    if len(gone):
        test_forget, test_retain = split_dataset(test, forget_classes=gone.tolist(), label_column=label_column)
        eval_dataset = {"forget": test_forget, "retain": test_retain}
    network_class = type(model)
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
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            statistics=statistics,
            unseen_dataset=unseen,
            peft_config=peft_config,
            callbacks=list(callbacks) if null_space == "retained" else None,
        )

    unsc = trainer("retained", model, statistics)
    evaluator = Evaluator(forget, retain, test, unsc.forgotten_classes, label_column)

    def outputs(network: PreTrainedModel, processor: Any = processing_class) -> RowOutputs:
        def collect(rows: Dataset) -> Outputs:
            prepared = prepare_dataset(rows, processor, network, label_column, config.text_columns)
            return collect_outputs(
                network,
                prepared,
                unsc.data_collator if processor is processing_class else default_collator(processor),
                features=True,
                batch_size=config.per_device_eval_batch_size,
                progress=not config.disable_tqdm,
            )

        return evaluator.outputs(collect)

    def result(control: UNSCTrainer) -> MethodResult:
        """Of a run; its cost includes the statistics, which the controls borrow from the UNSC run."""
        assert unsc.plan is not None
        network = control.accelerator.unwrap_model(control.model, keep_fp32_wrapper=False)
        seconds = sum(unsc.plan.seconds.values()) + control.unlearning_seconds
        return evaluator.evaluate(network, outputs(network), control.held_out_leak().total, seconds)

    unsc.prepare_unlearning()  # first: it refuses what cannot work
    collected = unsc.retained_statistics if controls else None
    original = outputs(unsc.model)
    methods = {"original": evaluator.evaluate(unsc.model, original, 0.0, None)}
    if unsc.forgotten_classes:
        masked = RowOutputs(
            *(mask_logits(part, unsc.forgotten_classes) for part in (original.forget, original.retain, original.test))
        )
        methods["masked"] = evaluator.evaluate(unsc.model, masked, 0.0, 0.0, same_features=methods["original"])
    if config.feature_erasure != "none" and unsc.whole_classes and len(retrained) > 1:
        loads = [partial(load_as, network_class, str(folder), "retrained_model_name_or_path") for folder in retrained]
        unsc.choose_erasure = ProbeBands(unsc.model, unsc.feature_rows(), loads)
    unsc.train(resume_from_checkpoint=resume_from(config.resume_from_checkpoint))
    certificate = unsc.certify()
    if pristine is not None:
        for null_space, name in (("random", "random_projector"), ("none", "unprojected")):
            control = trainer(null_space, deepcopy(pristine), collected)
            control.train()
            methods[name] = result(control)
    methods["unsc"] = result(unsc)

    references = []
    for folder in retrained:
        network = load_as(network_class, str(folder), "retrained_model_name_or_path").to(config.device)
        found = outputs(network, own_processor(str(folder), processing_class))
        references.append(evaluator.evaluate(network, found, None, _training_seconds(folder)))
        knows = references[-1].AccDut
        if knows is not None and knows > 0.05:
            logger.warning(
                "%s recognises %.0f %% of the forgotten classes: it was trained on them.", folder, 100 * knows
            )
    if references:
        methods["retrained"] = mean_result(references)
    verdict, reason = judge(methods["unsc"], references, unsc.forgotten_classes)
    if verdict == "removed" and unsc.erased:
        reason += (
            "; the features were erased against such a probe, so ask readers of another kind before you rely on it"
        )
    ordered = {name: methods[name] for name in LABELS if name in methods}
    return Comparison(ordered, references, certificate.to_dict(), verdict, reason, unsc)


def _check_reference(name: str, num_labels: int) -> None:
    """Refuse a reference that cannot be loaded or has other labels, before anything long begins."""
    try:
        found = AutoConfig.from_pretrained(name).num_labels
    except (OSError, ValueError) as error:
        raise UNSCError(f"retrained_model_name_or_path: cannot load {name!r}: {first_line(error)}") from error
    if found != num_labels:
        raise UNSCError(
            f"retrained_model_name_or_path: {name!r} has {found} labels, the original {num_labels}; "
            "a reference needs an output for the forgotten classes too."
        )


def _training_seconds(folder: str | Path) -> float | None:
    """Seconds that `train_classifier` noted, if this model was made by it."""
    file = Path(folder) / "training.json"
    if not file.is_file():
        return None
    seconds = json.loads(file.read_text(encoding="utf-8")).get("seconds")
    return None if seconds is None else float(seconds)
