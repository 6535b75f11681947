"""A finished run with everything that belongs to it: its models, and the data they were trained on."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import DatasetDict
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import PreTrainedModel

from ..comparison.references.images import digits_dataset
from ..data.columns import check_labels_match, class_names
from ..data.selection import resolve_classes
from ..data.sources import load_image_dataset, load_text_dataset
from ..errors import UNSCError, first_line
from ..models.loading import load_image_processor, load_model, load_tokenizer, model_label_names, own_processor
from ..reporting.run_folder import read_results
from ..runs.job import DIGITS
from ..runs.unlearn import hub_task

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_T = TypeVar("_T")


@dataclass(frozen=True)
class OpenedRun:
    """A finished run.

    Attributes:
        folder: where it is.
        results: its `results.json`.
        task: the Hub's name of what its models do.
        models: "original", "unlearned" and "retrained", those that were found.
        processors: image processor or tokenizer of each.
        data: splits "train" and "test" of a classifier's data, where they were found.
        forgotten: ids of the classes that were forgotten whole.
        missing: what was not found, a sentence each.
        prompt_template: prompt of a language model's question; see `data.dialogues.PromptFormat`.
    """

    folder: Path
    results: dict[str, Any]
    task: str
    models: dict[str, PreTrainedModel]
    processors: dict[str, Any]
    data: DatasetDict | None
    forgotten: list[int]
    missing: list[str]
    prompt_template: str | None = None

    @property
    def names(self) -> list[str]:
        """The labels by id."""
        return model_label_names(self.models["unlearned"])

    @property
    def columns(self) -> tuple[str | None, list[str] | None]:
        """The columns with labels and texts that the run was given; None where it found them by itself."""
        options = self.results["hyperparameters"]
        return options.get("label_column"), options.get("text_columns")


def open_run(
    folder: str | Path,
    original: str | None = None,
    retrained: str | None = None,
    dataset: str | None = None,
    prompt_template: str | None = None,
) -> OpenedRun:
    """Open a finished run.

    Its results name the original and the data by Hub id or by the last part of a folder. Such folders are looked for
    where runs put them: beside the run, in `references`, and in the current folder.

    Args:
        folder: the output folder, or its Hub id.
        original, retrained: folders or Hub ids of these models.
        dataset: Hub id, file or folder of a classifier's data.
        prompt_template: see `OpenedRun`.

    Raises:
        UNSCError: no finished run, or something that was named and cannot be loaded.
    """
    place = _fetch(str(folder))
    results, missing = read_results(place), list[str]()

    def attempt(load: Callable[[str], _T], given: str | None, found: str | None, what: str, option: str) -> _T | None:
        """What was named, or what was found; None, and a sentence in `missing`, where that fails."""
        try:
            if given or found:
                return load(str(given or found))
            missing.append(f"The {what} was not found; name it with {option}.")
        except UNSCError as error:
            if given:
                raise UNSCError(f"{option.strip('-')}: {str(error).partition(': ')[2] or error}") from error
            missing.append(f"The {what} cannot be loaded ({first_line(error)}); name it with {option}.")
        return None

    adapter = place / "adapter_config.json"
    base = str(_read(adapter)["base_model_name_or_path"]) if adapter.is_file() else None
    found = _look_for(base or str(results["request"]["model"]), place)
    before = attempt(load_model, original, found, "original", "--original")
    if base is None:
        unlearned = load_model(str(place))
    elif before is None:
        raise UNSCError(f"original: the adapter in {place} changes {base!r}, which was not found; name it.")
    else:
        unlearned = PeftModel.from_pretrained(deepcopy(before), str(place)).merge_and_unload()
    task = hub_task(unlearned)
    own = (load_image_processor if task == "image-classification" else load_tokenizer)(str(place))
    data = None
    if task != "text-generation":
        rows = _look_for(str(results["request"]["dataset"]), place)
        load_rows = partial(_load_rows, unlearned, results["hyperparameters"])
        data = attempt(load_rows, dataset, rows, "data set", "--dataset")
    forgotten = _forgotten(results, unlearned, data)
    beside = _trained_beside(original or found, forgotten)
    after = attempt(load_model, retrained, beside, "retrained model", "--retrained")
    named = {"original": before, "unlearned": unlearned, "retrained": after}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {title: model.to(device) for title, model in named.items() if model is not None}
    processors = dict.fromkeys(models, own)
    if after is not None:
        processors["retrained"] = own_processor(str(retrained or beside), own)
    return OpenedRun(place, results, task, models, processors, data, forgotten, missing, prompt_template)


def _fetch(folder: str) -> Path:
    """The folder, or a copy of what the Hub has under this id."""
    if Path(folder).exists() or not _HUB_ID.fullmatch(folder):
        return Path(folder)
    try:
        return Path(snapshot_download(folder))
    except (OSError, ValueError, RuntimeError) as error:
        raise UNSCError(f"folder: {folder} is no folder here, and no run on the Hub ({first_line(error)}).") from error


def _look_for(name: str, folder: Path) -> str | None:
    """A Hub id, or a folder of this name where runs put it."""
    if name == DIGITS or _HUB_ID.fullmatch(name):
        return name
    around = (Path(), folder.parent, folder.parent.parent)
    places = [here / sub / name for here in around for sub in ("", "references", "data")]
    return next((str(place) for place in places if place.exists()), None)


def _load_rows(model: PreTrainedModel, options: dict[str, Any], name: str) -> DatasetDict:
    """The data of a classifier; UNSCError where their labels are not the model's."""
    label, texts = options.get("label_column"), options.get("text_columns")
    if name == DIGITS:
        return digits_dataset()
    images = hub_task(model) == "image-classification"
    data = load_image_dataset(name, label) if images else load_text_dataset(name, label, texts)
    for split in data.values():
        check_labels_match(split, label, model.config.num_labels, model_label_names(model))
    return data


def _forgotten(results: dict[str, Any], model: PreTrainedModel, data: DatasetDict | None) -> list[int]:
    """Ids of the classes that were forgotten whole."""
    names, known = results["request"].get("forget_classes"), model_label_names(model)
    if not names:
        return []
    if data is not None and not set(names) <= set(known):
        known = class_names(data["train"], results["hyperparameters"].get("label_column")) or known
    return resolve_classes(names, known if set(names) <= set(known) else None, range(len(known)))


def _trained_beside(original: str | None, forgotten: list[int]) -> str | None:
    """The newest model that was trained in the same way as the original, without the forgotten classes."""
    training = "training.json"  # what this package writes beside the models that it trains
    if not forgotten or original is None or not Path(original, training).is_file():
        return None
    plan, name = _read(Path(original, training))["plan"], f"retrained-without-{'-'.join(map(str, forgotten[:10]))}-*"
    files = Path(original).parent.glob(f"{name}/{training}")
    alike = [file for file in files if _read(file)["plan"] == plan]
    return str(max(alike, key=lambda file: file.stat().st_mtime).parent) if alike else None


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content
