"""Data sets from the Hub or from local files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, Image
from huggingface_hub import DatasetCard

from ..errors import UNSCError, first_line
from .columns import find_label_column, find_text_columns

_UNREADABLE = (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetsError)
TEST_SPLITS = ("test", "validation", "valid", "val")


def load_splits(
    name: str,
    config_name: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    cache_dir: str | None = None,
    folder_format: str | None = None,
) -> DatasetDict:
    """Load the splits `train` and `test`, and `validation` if there is a third.

    The source is a Hub id, a parquet, CSV or JSON file or folder, or a `save_to_disk` folder.

    Args:
        name: the source.
        config_name: configuration of a Hub data set.
        train_split, test_split: names of the splits; a test split is found by itself when None.
        cache_dir: where data sets are cached.
        folder_format: builder for a folder without data files, such as "imagefolder".

    Raises:
        UNSCError: nothing can be loaded from there, a split is missing (those that exist are listed), or both are one.
    """
    loaded = load_data(name, config_name, cache_dir, folder_format)
    wanted_test = test_split or next((split for split in TEST_SPLITS if split in loaded), None)
    for argument, split in (("train_split", train_split), ("test_split", wanted_test)):
        if split is None or split not in loaded:
            raise UNSCError(f"{argument}: no split {split!r} in {name!r}; splits found: {', '.join(sorted(loaded))}.")
    if wanted_test == train_split:
        raise UNSCError(f"test_split: {wanted_test!r} is the train_split too; name rows that no model was trained on.")
    spare = next((s for s in TEST_SPLITS[1:] if s in loaded and s not in (train_split, wanted_test)), None)
    result = DatasetDict(train=loaded[train_split], test=loaded[wanted_test])
    if spare is not None:
        result["validation"] = loaded[spare]
    return result


def load_data(
    name: str, config_name: str | None = None, cache_dir: str | None = None, folder_format: str | None = None
) -> DatasetDict:
    """All splits of a data set; the arguments are those of `load_splits`."""
    path = Path(name)
    try:
        if (path / "dataset_dict.json").is_file():
            return DatasetDict(datasets.load_from_disk(name))
        for ending, builder in ((".parquet", "parquet"), (".jsonl", "json"), (".json", "json"), (".csv", "csv")):
            files = _files_by_split(path, ending)
            if files:
                return datasets.load_dataset(builder, data_files=files, cache_dir=cache_dir)
        if path.is_dir() and folder_format is not None:
            return datasets.load_dataset(folder_format, data_dir=name, cache_dir=cache_dir)
        return datasets.load_dataset(name, config_name, cache_dir=cache_dir)
    except _UNREADABLE as error:
        raise UNSCError(f"dataset_name: cannot load {name!r}: {first_line(error)}") from error


def load_config(
    name: str, config_name: str, argument: str, split: str | None = None, cache_dir: str | None = None
) -> Dataset:
    """The rows of one configuration of a data set, as benchmarks of unlearning are published (TOFU, MUSE).

    Args:
        name: a Hub id, or a local folder that declares its configurations in README.md or has a folder for each.
        config_name: the configuration.
        argument: named in messages.
        split: of the configuration; may be left out where there is one, or one called "train".
        cache_dir: where data sets are cached.

    Raises:
        UNSCError: no such configuration or split (those that exist are listed), or nothing can be loaded from there.
    """
    known = config_names(name)
    if config_name not in known:
        raise UNSCError(f"{argument}: no configuration {config_name!r} in {name!r}; choose from {', '.join(known)}.")
    if _declared(name):
        try:
            loaded = datasets.load_dataset(name, config_name, cache_dir=cache_dir)
        except _UNREADABLE as error:
            raise UNSCError(f"{argument}: cannot load {config_name!r} of {name!r}: {first_line(error)}") from error
    else:
        loaded = load_data(str(Path(name, config_name)), cache_dir=cache_dir)
    chosen = split or ("train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else None)
    if chosen not in loaded:
        raise UNSCError(
            f"{argument.replace('config', 'split')}: no split {chosen!r} in {config_name!r}; splits found: "
            f"{', '.join(sorted(loaded))}."
        )
    return loaded[chosen]


def config_names(name: str) -> list[str]:
    """Configurations of a data set, see `load_config`; UNSCError when there is no such data set."""
    try:
        if _declared(name):
            return list(datasets.get_dataset_config_names(name))
        return sorted(path.name for path in Path(name).iterdir() if path.is_dir() and not path.name.startswith("."))
    except _UNREADABLE as error:
        raise UNSCError(f"dataset_name: cannot load {name!r}: {first_line(error)}") from error


def _declared(name: str) -> bool:
    """Whether `datasets` finds the configurations: on the Hub, or declared in a local README.md."""
    card = Path(name, "README.md")
    return not Path(name).is_dir() or (card.is_file() and bool(DatasetCard.load(card).data.get("configs")))


def _files_by_split(path: Path, ending: str) -> dict[str, list[str]]:
    """Data files by split: `train.parquet`, `train-00000-of-00002.parquet` or `train/*.parquet`.

    A single file is "train".
    """
    if path.is_file():
        return {"train": [str(path)]} if path.suffix == ending else {}
    files: dict[str, list[str]] = {}
    for file in sorted(path.rglob(f"*{ending}")):
        split = (file.parent.name if file.parent not in (path, path / "data") else file.stem).split("-")[0]
        files.setdefault(split, []).append(str(file))
    return files


def load_image_dataset(name: str, label_column: str | None = None, **options: Any) -> DatasetDict:
    """Load `train` and `test` of a source with images, or an imagefolder; `options` are those of `load_splits`.

    Raises:
        UNSCError: as `load_splits`, or a split has no labels or no images.
    """
    loaded = load_splits(name, folder_format="imagefolder", **options)
    for split, part in loaded.items():
        find_label_column(part, label_column)
        if not any(isinstance(feature, Image) for feature in part.features.values()):
            raise UNSCError(
                f"dataset_name: the {split} split of {name!r} has no image column; columns are "
                f"{', '.join(part.column_names)}."
            )
    return loaded


def load_text_dataset(
    name: str, label_column: str | None = None, text_columns: Sequence[str] | None = None, **options: Any
) -> DatasetDict:
    """Load `train` and `test` of a source with texts; `options` are those of `load_splits`.

    Raises:
        UNSCError: as `load_splits`, or a split has no labels or no text.
    """
    loaded = load_splits(name, **options)
    for part in loaded.values():
        find_label_column(part, label_column)
        find_text_columns(part, text_columns)
    return loaded
