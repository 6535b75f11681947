"""Whole jobs on image and text classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from ..comparison.arguments import ClassificationArguments, ImageArguments, check_model_dtype
from ..comparison.controls import compare
from ..config import UNSCConfig
from ..data.columns import class_names, read_labels
from ..data.copies import without_overlap
from ..data.inputs import unreadable_rows_by_number
from ..data.selection import Request, Split, resolve_classes
from ..errors import UNSCError
from ..models.loading import load_config
from ..reporting.run_folder import check_output_folder
from ..reporting.screen import Screen
from ..reporting.tables import classifier_table
from ..trainer.sequence import StoredRequest
from ..utils.phases import phase
from .job import Job, UnlearningResult, finished_run, job_folder


@dataclass(frozen=True)
class ClassifierRows:
    """The rows of a request."""

    train: Dataset
    test: Dataset
    unseen: Dataset | None  # rows that no model was trained on
    request: Request  # what to forget, classes by id
    names: list[str]  # of the classes, by id
    label_column: str | None

    @classmethod
    def of(
        cls, data: Mapping[str, Dataset], request: Request | None, model_names: list[str] | None, column: str | None
    ) -> ClassifierRows:
        """From splits "train", "test" and perhaps "validation"; `model_names` serve data that hold bare ids.

        UNSCError where there is nothing to forget, or classes that the training or test rows lack.
        """
        if request is None:
            raise UNSCError(
                "forget_classes: not given; name the classes to forget, by name or id (or single rows instead)."
            )
        names = class_names(data["train"], column) or model_names
        present = read_labels(data["train"], column).tolist()
        if request.forget_classes is not None:
            request = Request(forget_classes=tuple(resolve_classes(request.forget_classes, names, present)))
            request.split(data["test"], column)  # refuses classes that the test rows lack
        names = names or [str(i) for i in range(max(present) + 1)]
        return cls(data["train"], data["test"], data.get("validation"), request, names, column)

    def split(self, config: UNSCConfig) -> Split:
        """Training rows to forget and to keep, without copies of the former where `drop_overlap` says so.

        Raises:
            UNSCError: rows on both sides.
        """
        forget, retain = self.request.split(self.train, self.label_column)
        return Split(forget, without_overlap(forget, retain, config.drop_overlap, config.text_columns))


def run(
    arguments: ClassificationArguments, config: UNSCConfig, screen: Screen | None = None, command: str = ""
) -> UnlearningResult:
    """Unlearn, compare, and write everything into `config.output_dir`; after a UNSCError nothing is written.

    `screen` keeps its log there; `command` is what makes the run again, for the card.
    """
    if arguments.dataset_name is None and (arguments.model_name_or_path or arguments.retrained_model_name_or_path):
        raise UNSCError(
            "dataset_name: not given; a model needs the data it was trained on (without both, the quickstart runs)."
        )
    check_model_dtype(arguments)
    check_output_folder(str(config.output_dir))
    phase("Loading the data")
    data = arguments.load(config)
    with job_folder(str(config.output_dir), screen), unreadable_rows_by_number(data, config.text_columns):
        name = arguments.model_name_or_path
        names = None if name is None else names_in(load_config(name, "model_name_or_path"))
        rows = ClassifierRows.of(data, arguments.request(), names, config.label_column)
        without = "-".join(map(str, (rows.request.forget_classes or ["rows"])[:10]))
        job = Job.of(
            arguments, config, arguments.plan(config), rows.train, rows.split(config).retain, command,
            f"retrained-without-{without}", rows.names, rows.label_column,
        )  # fmt: skip
        task = "image-classification" if isinstance(arguments, ImageArguments) else "text-classification"
        result = unlearn_classifier(job, rows, task, arguments.statistics_dir)
        result.deliver(config)
    return result


def unlearn_classifier(job: Job, rows: ClassifierRows, task: str, statistics_dir: str | None) -> UnlearningResult:
    """Unlearn a classifier and compare it with the original, the controls and retrained models.

    `task` is the Hub's name of what the model does; activation statistics are kept in `statistics_dir` for later
    requests.
    """
    forget, retain = rows.split(job.config)
    model, stored = job.load(), None
    if statistics_dir is not None:
        if job.peft_config is not None:
            raise UNSCError(
                "statistics_dir: goes with full weights; adapters leave the model the statistics belong to as it was."
            )
        stored = StoredRequest(statistics_dir, model, job.config, forget, retain, job.processor)
    compared = compare(
        model, rows.train, rows.test, rows.request, job.config if stored is None else stored.args, job.processor,
        job.retrained, statistics=None if stored is None else stored.statistics, controls=job.controls,
        peft_config=job.peft_config, unseen=rows.unseen,
    )  # fmt: skip
    run = finished_run(
        job, compared.trainer, forget, task, rows.names, methods=compared.methods, references=compared.references,
        certificate=compared.certificate, verdict=compared.verdict, reason=compared.reason,
        table=classifier_table(compared.methods),
    )  # fmt: skip
    return UnlearningResult(compared.trainer, run, stored)


def names_in(config: Any) -> list[str] | None:
    """Class names of a model's config by id; None where they are only LABEL_0, LABEL_1, ..."""
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names
