"""Relearning on the page: whether a few examples bring a forgotten class back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from ..data.columns import read_labels
from ..data.inputs import CachedRows, default_collator, prepare_dataset
from ..data.selection import at_most_per_class, split_dataset
from ..evaluation.accuracy import macro_accuracy
from ..evaluation.audits.registry import Examination
from ..evaluation.audits.relearning import few_of_each, fit, forgotten_rows, with_fresh_rows
from ..models.outputs import Outputs, RowOutputs, collect_outputs
from ..reporting.tables import percent
from .opening import OpenedRun

MOST = 50  # examples of a class


class Attacked(NamedTuple):
    """One model under attack: the share of forgotten test rows that it recognises."""

    title: str
    before: float  # as it is
    curve: list[float]  # while it relearns with new head rows for the forgotten classes, every 5 steps


def can_attack(run: OpenedRun) -> bool:
    """Whether whole classes of a classifier were forgotten, and its data are here."""
    return run.data is not None and bool(run.forgotten)


def relearn(run: OpenedRun, examples: int, learning_rate: float) -> Iterator[Attacked]:
    """Train a copy of each model on a few examples of every class; see `evaluation.audits.relearning`."""
    for title, model in run.models.items():
        exam = _examination(run, model, run.processors[title], examples)
        rows, few = forgotten_rows(exam), few_of_each(exam, examples)
        seen = exam.collect(model, rows)
        before = macro_accuracy(seen.logits, seen.labels, run.forgotten) or 0.0
        fresh = with_fresh_rows(model, run.forgotten)
        yield Attacked(title, before, fit(exam, fresh, few, rows, learning_rate))


def _examination(run: OpenedRun, model: PreTrainedModel, processor: Any, examples: int) -> Examination:
    """What the audit asks for, on no more rows than it needs."""
    assert run.data is not None
    label, texts = run.columns
    train = run.data["train"]
    classes: dict[str, Any] = {"forget_classes": run.forgotten, "label_column": label}
    few = at_most_per_class(read_labels(train, label), examples)
    forget, retain = split_dataset(train.select(few), **classes)
    test, _ = split_dataset(run.data["test"], **classes)
    collate = default_collator(processor)

    def prepared(rows: Dataset) -> CachedRows:
        return CachedRows(prepare_dataset(rows, processor, model, label, texts))

    def collect(model: PreTrainedModel, rows: Dataset) -> Outputs:
        return collect_outputs(model, prepared(rows), collate)

    def batches(rows: Dataset, size: int, seed: int) -> Iterator[dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        ready: Any = prepared(rows)
        while True:
            for batch in DataLoader(ready, size, shuffle=True, collate_fn=collate, generator=generator):
                yield {name: value.to(model.device) for name, value in batch.items()}

    outputs = RowOutputs(*(collect(model, rows) for rows in (forget, retain, test)))
    return Examination(model, outputs, outputs, [], run.forgotten, forget, retain, test, collect, batches)


def what_came_back(done: list[Attacked], examples: int) -> str:
    """The attack in a sentence a model."""
    said = [f"{one.title} {percent(one.before)} before, {percent(one.curve[-1])} after" for one in done]
    return f"Forgotten test rows that are recognised, with {examples} examples a class: {'; '.join(said)}."
