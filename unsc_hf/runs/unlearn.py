"""`unlearn`: a whole job in one call."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from peft import PeftConfig
from transformers import PreTrainedModel

from ..config import UNSCConfig
from ..data.dialogues import PromptFormat
from ..data.inputs import unreadable_rows_by_number
from ..data.selection import Request
from ..data.sources import load_data, load_image_dataset, load_text_dataset
from ..errors import UNSCError
from ..models.loading import load_image_processor, load_model, load_tokenizer
from ..reporting.model_card import public_name
from ..reporting.run_folder import check_output_folder
from ..tasks.causal_lm import CausalLMTask
from .classification import ClassifierRows, names_in, unlearn_classifier
from .job import Job, UnlearningResult, job_folder, origin_of
from .language import LanguageRows, check_unseen, unlearn_language_model

_READY = ("pixel_values", "input_ids")  # columns of rows that need no image processor or tokenizer


def unlearn(
    model: PreTrainedModel | str | PathLike[str],
    dataset: DatasetDict | str | PathLike[str],
    *,
    forget_classes: Iterable[Any] | str | int | None = None,
    indices: Iterable[int] | None = None,
    where: Callable[[dict[str, Any]], bool] | None = None,
    processing_class: Any = None,
    retrained: Sequence[str] = (),
    config: UNSCConfig | None = None,
    output_dir: str | Path | None = None,
    peft_config: PeftConfig | None = None,
    controls: bool = True,
    unseen: Dataset | None = None,
    statistics_dir: str | None = None,
    license: str | None = None,
) -> UnlearningResult:
    """Make a model forget classes or rows, and compare it with its original, trivial controls and retrained models.

    Images, texts and language models are told apart by the model.

    Args:
        model: the original, or its Hub id or folder; a model that is given stays as it is.
        dataset: splits "train" and "test", or a Hub id, file or folder that holds them. A language model also takes
            splits "forget" and "retain"; every other split is reported on.
        forget_classes, indices, where: names or ids of classes, or numbers of training rows, or what says of a training
            row whether it is to be forgotten.
        processing_class: image processor or tokenizer; the model's own when None.
        retrained: folders or Hub ids of models trained without the forgotten rows; three allow a full verdict.
        config: options of unlearning.
        output_dir: where the result is saved; nothing is saved when None, see `UnlearningResult.save`.
        peft_config: a `LoraConfig`, to unlearn in adapters only.
        controls: also run the controls with a random subspace and with no projection.
        unseen: rows that the original never saw, instead of a split `validation`. They say when single rows or answers
            are forgotten, and a classifier's certificate reads them.
        statistics_dir: where activation statistics are kept for later requests (classifiers).
        license: of the unlearned model, as an SPDX id.

    Raises:
        UNSCError: input that cannot work; the message names the argument and says what to do.
    """
    options, workspace = _options(config, output_dir)
    model = str(model) if isinstance(model, PathLike) else model
    dataset = str(dataset) if isinstance(dataset, PathLike) else dataset
    original = load_model(model) if isinstance(model, str) else model
    name = model if isinstance(model, str) else str(model.config._name_or_path or "")
    task = hub_task(original)
    data = _load(dataset, task, options)
    request = _request(data["train"] if "train" in data else data["forget"], forget_classes, indices, where)
    named = "..." if forget_classes is None else f"forget_classes={forget_classes!r}"  # rows are not named
    command = f"unsc_hf.unlearn({public_name(name)!r}, dataset, {named})"
    origin = origin_of(name, dataset if isinstance(dataset, str) else None, license, command, unnamed="a data set")
    read = processing_class if processing_class is not None else _processor(name, data, task)
    job = Job(partial(deepcopy, original), read, options, origin, retrained, controls, peft_config)
    with job_folder(str(options.output_dir)), unreadable_rows_by_number(data, options.text_columns):
        if task == "text-generation":
            if forget_classes is not None or statistics_dir is not None:
                argument = "forget_classes" if forget_classes is not None else "statistics_dir"
                raise UNSCError(
                    f"{argument}: goes with classifiers; of a language model name rows, by indices or where."
                )
            if request is None and "train" in data:
                raise UNSCError("indices: not given; name the rows of 'train' to forget, by indices or where.")
            used = ("train",) if "train" in data else ("forget", "retain")
            others = {name: rows for name, rows in data.items() if name not in used}
            kept = None if used == ("train",) else data["retain"]
            dialogues = LanguageRows.of(data[used[0]], kept, request, unseen, others, PromptFormat.of(None, read))
            dialogues = dialogues.disjoint(options)
            check_unseen(unseen, options, "unseen")
            result = unlearn_language_model(job, dialogues)
        else:
            splits = data if unseen is None else {**data, "validation": unseen}
            rows = ClassifierRows.of(splits, request, names_in(original.config), options.label_column)
            result = unlearn_classifier(job, rows, task, statistics_dir)
        if output_dir is not None:
            result.save(output_dir)
    result.workspace = workspace
    return result


def _options(config: UNSCConfig | None, output_dir: str | Path | None) -> tuple[UNSCConfig, Any]:
    """The options of a job, and the temporary folder that the trainer works in where no other is named."""
    scratch = tempfile.TemporaryDirectory(prefix="unsc-", ignore_cleanup_errors=True)
    options = deepcopy(config) if config is not None else UNSCConfig(output_dir=scratch.name, report_to="none")
    if output_dir is not None:
        check_output_folder(output_dir)
        options.output_dir = str(output_dir)
    elif options.output_dir == "trainer_output":  # what transformers fills in
        options.output_dir = scratch.name
    return options, scratch


def hub_task(model: PreTrainedModel) -> str:
    """The Hub's name of what a model does."""
    if CausalLMTask.accepts(model):
        return "text-generation"
    return "image-classification" if model.main_input_name == "pixel_values" else "text-classification"


def _load(dataset: DatasetDict | str, task: str, config: UNSCConfig) -> DatasetDict:
    if not isinstance(dataset, DatasetDict | str):
        raise UNSCError(f"dataset: got {type(dataset).__name__}, expected a DatasetDict, a Hub id or a folder.")
    try:
        if isinstance(dataset, DatasetDict):
            data = dataset
        elif task == "text-generation":
            data = load_data(dataset)
        elif task == "image-classification":
            data = load_image_dataset(dataset, label_column=config.label_column)
        else:
            data = load_text_dataset(dataset, label_column=config.label_column, text_columns=config.text_columns)
    except UNSCError as error:
        raise UNSCError(str(error).replace("dataset_name:", "dataset:", 1)) from error
    splits = ("train", "test") if task != "text-generation" else ("train",) if "train" in data else ("forget", "retain")
    for split in splits:
        if split not in data:
            raise UNSCError(f"dataset: no split {split!r}; splits found: {', '.join(sorted(data))}.")
    return data


def _processor(name: str, data: DatasetDict, task: str) -> Any:
    """The image processor or tokenizer that was saved with the model; None for rows that are ready for it."""
    if any(column in part.column_names for part in data.values() for column in _READY):
        return None
    if not name:
        raise UNSCError("processing_class: not given, and the model names no folder; give its processor or tokenizer.")
    return load_image_processor(name) if task == "image-classification" else load_tokenizer(name)


def _request(
    rows: Dataset,
    forget_classes: Iterable[Any] | str | int | None,
    indices: Iterable[int] | None,
    where: Callable[[dict[str, Any]], bool] | None,
) -> Request | None:
    """What is to be forgotten; None where nothing was named."""
    given = {"forget_classes": forget_classes, "indices": indices, "where": where}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise UNSCError(f"{named[1]}: given beside {named[0]}; choose one way to name the rows.")
    if isinstance(forget_classes, str | int):
        return Request(forget_classes=(forget_classes,))
    if forget_classes is not None:
        return Request(forget_classes=tuple(forget_classes))
    if where is not None:
        return Request(indices=tuple(i for i, row in enumerate(rows) if where(row)), option="where")
    return None if indices is None else Request(indices=tuple(indices))
