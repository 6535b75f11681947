"""What comparisons and studies work from: the models of each seed, the rows of one request, and records that outlive a kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from ..config import UNSCConfig
from ..data.columns import class_names, read_labels
from ..data.selection import Request, hold_out
from ..errors import UNSCError
from ..evaluation.engine import accuracies
from ..models.loading import load_as
from ..models.outputs import Outputs, RowOutputs, collect_outputs
from ..reporting.results import finite
from ..utils.files import alone, write_text
from .arguments import ClassificationArguments
from .methods import Workbench
from .references.texts import TextPlan
from .references.training import TrainingPlan, train_model

_VALIDATION_SHARE = 0.2  # of the test rows, where the data set has no validation split


@dataclass(frozen=True)
class Splits:
    """Rows to train, choose and test with, and the class names by id."""

    train: Dataset
    validation: Dataset
    test: Dataset
    names: list[str]


def read_splits(arguments: ClassificationArguments, config: UNSCConfig) -> Splits:
    """The data set's splits; without a validation split, a fifth of the test rows becomes one."""
    data = arguments.load(config)
    train = data["train"]
    names = class_names(train, config.label_column)
    if names is None:  # bare ids
        names = [str(i) for i in range(int(read_labels(train, config.label_column).max()) + 1)]
    if "validation" in data:
        return Splits(data["train"], data["validation"], data["test"], names)
    labels = read_labels(data["test"], config.label_column)
    test, validation = hold_out(data["test"], _VALIDATION_SHARE, labels, len(labels), seed=0)
    return Splits(data["train"], validation, test, names)


class Desk:
    """One request: its models, its rows, and the records of its runs.

    Args:
        seeds: one run for each.
        originals: a model for each seed, or one for all; None takes `model_name_or_path` or trains them.
        arguments, config: what to load and how to unlearn.
        splits: rows.
        request: what to forget.
        folder: where records are kept.
        benches: where the workbench is kept that was used last; desks that share it keep one in all.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        originals: Sequence[str] | None,
        arguments: ClassificationArguments,
        config: UNSCConfig,
        splits: Splits,
        request: Request,
        folder: Path,
        benches: dict[str, Workbench] | None = None,
    ) -> None:
        self.seeds, self.originals, self.arguments, self.config = seeds, originals, arguments, config
        self.train, self.test, self.validation, self.names = splits.train, splits.test, splits.validation, splits.names
        self.splits, self.request, self.folder = splits, request, folder
        self.forget, self.retain = request.split(splits.train, config.label_column)
        self.forgotten = sorted(set(read_labels(self.forget, config.label_column).tolist()))
        self._benches = {} if benches is None else benches

    # ---- models -----------------------------------------------------------------------------------------------------

    def original(self, seed: int) -> str:
        """Folder or id of the original of a seed."""
        given, seeds = self.originals, list(self.seeds)
        given = given or ([self.arguments.model_name_or_path] if self.arguments.model_name_or_path else None)
        if given and not self.arguments.train_original:
            return str(given[seeds.index(seed) if len(given) > 1 else 0])
        if not self.arguments.train_original and not self.arguments.quickstart:
            raise UNSCError("originals: not given; name the models to unlearn, or use train_original.")
        plan = self.arguments.plan(self._seeded(seed))
        folder, column = self.arguments.references_dir, self.config.label_column
        return str(train_model(self.train, plan, folder, "original", self.names, column))

    @property
    def trains_originals(self) -> bool:
        """Whether originals are trained where they are not there yet."""
        given = self.originals or self.arguments.model_name_or_path
        return self.arguments.train_original or (self.arguments.quickstart and not given)

    @property
    def trains_references(self) -> bool:
        """Whether retrained models are."""
        wanted = self.arguments.train_retrained or self.arguments.quickstart
        return wanted and not self.arguments.retrained_model_name_or_path

    def reference_numbers(self) -> list[int]:
        """Of the retrained models: places in the list that was given, or the seeds they are trained with."""
        if self.trains_references:
            return list(dict.fromkeys(self.seeds))
        return list(range(len(self.arguments.retrained_model_name_or_path or ())))

    def reference(self, number: int) -> str:
        """Folder or id of a retrained model."""
        if not self.trains_references:
            return str((self.arguments.retrained_model_name_or_path or ())[number])
        plan, folder = self.arguments.plan(self._seeded(number)), self.arguments.references_dir
        column, vocabulary = self.config.label_column, self.vocabulary(plan)
        return str(train_model(self.retain, plan, folder, "retrained", self.names, column, vocabulary))

    def references(self) -> list[str]:
        """Folders or ids of the retrained models."""
        return [self.reference(number) for number in self.reference_numbers()]

    def vocabulary(self, plan: TrainingPlan) -> Dataset | None:
        """Rows that a tokenizer is learned from: a reference must read the same tokens as the original."""
        return self.train if isinstance(plan, TextPlan) and plan.base_model is None else None

    def _seeded(self, seed: int) -> UNSCConfig:
        config = deepcopy(self.config)
        config.seed, config.output_dir = seed, str(self.folder / "_scratch")
        return config

    def bench(self, seed: int, **options: Any) -> Workbench:
        """The workbench of a seed, with other options of `UNSCConfig` where they are given; one at a time is kept."""
        key = json.dumps([str(self.folder), seed, options], sort_keys=True, default=str)
        if key not in self._benches:
            self._benches.clear()
            name = self.original(seed)
            model = load_as(self.arguments.auto_class, name, "originals").to(self.config.device)
            config = self._seeded(seed)
            for option, value in options.items():
                setattr(config, option, value)
            self._benches[key] = Workbench(model, self.forget, self.retain, config, self.arguments.load_processor(name))
        return self._benches[key]

    # ---- examining --------------------------------------------------------------------------------------------------

    def collect(self, bench: Workbench, model: PreTrainedModel, rows: Dataset, features: bool = True) -> Outputs:
        """Outputs of a model on raw rows."""
        size = self.config.per_device_eval_batch_size
        return collect_outputs(model, bench.remembered(rows), bench.collate, features=features, batch_size=size)

    def accuracies(self, outputs: RowOutputs) -> dict[str, Any]:
        """AccDut, AccDrt, AccDf, AccDr and test accuracy by class."""
        return accuracies(outputs, self.forgotten)

    def record(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, kept in a file: made once, by one process."""
        file = self.folder / f"{name}.json"
        if not file.is_file():
            with alone(file):
                if not file.is_file():
                    write_text(file, json.dumps(finite(make())))
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return record
