"""Data sets: which rows to forget and which to keep, where the labels are, and how raw rows become model inputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import PIL.Image
import pyarrow
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator
from transformers.image_processing_base import ImageProcessingMixin

from .errors import UnreadableRowError, UNSCError, closest, first_line

LABEL_COLUMNS = ("label", "labels", "fine_label", "intent")
TEXT_COLUMNS = (
    ("text",), ("sentence",), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"),
    ("question", "sentence"), ("content",), ("utterance",),
)  # fmt: skip
WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")
TEST_SPLITS = ("test", "validation", "valid", "val")


class Split(NamedTuple):
    """Rows to forget and rows to keep; both are views of the same data set."""

    forget: Dataset
    retain: Dataset


def load_splits(
    name: str,
    config_name: str | None,
    train_split: str,
    test_split: str | None,
    cache_dir: str | None,
    folder_format: str | None = None,
) -> DatasetDict:
    """Load `train`, `test` and, where there is one besides, `validation` from a Hub id, a parquet, CSV or JSON file or
    folder, or a `save_to_disk` folder.

    Args:
        name: where from.
        config_name: configuration of a Hub data set.
        train_split, test_split: names of the splits; a test split is found by itself when None.
        cache_dir: where data sets are cached.
        folder_format: builder for a folder without data files, such as "imagefolder".

    Raises:
        UNSCError: nothing loadable there, or no such split (the splits found are listed).
    """
    loaded = load_data(name, config_name, cache_dir, folder_format)
    wanted_test = test_split or next((split for split in TEST_SPLITS if split in loaded), None)
    for argument, split in (("train_split", train_split), ("test_split", wanted_test)):
        if split is None or split not in loaded:
            raise UNSCError(f"{argument}: no split {split!r} in {name!r}; splits found: {', '.join(sorted(loaded))}.")
    spare = next((s for s in TEST_SPLITS[1:] if s in loaded and s not in (train_split, wanted_test)), None)
    result = DatasetDict(train=loaded[train_split], test=loaded[wanted_test])
    if spare is not None:
        result["validation"] = loaded[spare]
    return result


def load_data(
    name: str, config_name: str | None = None, cache_dir: str | None = None, folder_format: str | None = None
) -> DatasetDict:
    """All splits of a data set: see `load_splits`."""
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
    except (FileNotFoundError, ConnectionError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UNSCError(f"dataset_name: cannot load {name!r}: {first_line(error)}") from error


def _files_by_split(path: Path, ending: str) -> dict[str, list[str]]:
    """Data files by split: `train.parquet`, `train-00000-of-00002.parquet`, or `train/*.parquet`; a single file is "train"."""
    if path.is_file():
        return {"train": [str(path)]} if path.suffix == ending else {}
    found: dict[str, list[str]] = {}
    for file in sorted(path.rglob(f"*{ending}")):
        split = (file.parent.name if file.parent not in (path, path / "data") else file.stem).split("-")[0]
        found.setdefault(split, []).append(str(file))
    return found


def find_text_columns(dataset: Dataset, given: Sequence[str] | None = None) -> tuple[str, ...]:
    """The column with the text, or the two columns of a pair.

    Raises:
        UNSCError: a named column is missing, or none can be found; the columns are listed.
    """
    columns = ", ".join(dataset.column_names)
    if given:
        for name in given:
            if name not in dataset.column_names:
                raise UNSCError(f"text_columns: no column {name!r} in the data set; columns are {columns}.")
        return tuple(given)
    for names in TEXT_COLUMNS:
        if all(name in dataset.column_names for name in names):
            return names
    strings = [name for name, feature in dataset.features.items() if _is_text(feature)]
    if len(strings) == 1:
        return (strings[0],)
    raise UNSCError(f"text_columns: cannot tell which of the columns {columns} hold the text; name them.")


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def find_label_column(dataset: Dataset, label_column: str | None = None) -> str:
    """Name of the column that holds class labels.

    Raises:
        UNSCError: when the named column is missing, or none can be found; the columns are listed.
    """
    _check_dataset(dataset)
    if label_column is not None:
        if label_column not in dataset.column_names:
            raise UNSCError(
                f"label_column: no column {label_column!r} in the data set; columns are {', '.join(dataset.column_names)}."
            )
        return label_column
    for name in LABEL_COLUMNS:
        if name in dataset.column_names:
            return name
    typed = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    if len(typed) == 1:
        return typed[0]
    raise UNSCError(f"label_column: none of the columns {', '.join(dataset.column_names)} looks like labels; name one.")


def read_labels(dataset: Dataset, label_column: str | None = None) -> np.ndarray:
    """Class ids of all rows, int64 of shape (rows,); string labels are refused with advice.

    Raises:
        UNSCError: missing column or non-integer labels.
    """
    column = find_label_column(dataset, label_column)
    found = dataset.select_columns([column]).with_format("arrow")[:].column(0)
    if pyarrow.types.is_integer(found.type) and not found.null_count:
        return found.to_numpy().astype(np.int64)
    values = found.to_pylist()
    if any(not isinstance(value, int) or isinstance(value, bool) for value in values):
        odd = next(v for v in values if not isinstance(v, int) or isinstance(v, bool))
        raise UNSCError(
            f"label_column: column {column!r} holds {odd!r}, not class ids; use dataset.class_encode_column({column!r})."
        )
    return np.asarray(values, dtype=np.int64)


def class_names(dataset: Dataset, label_column: str | None = None) -> list[str] | None:
    """Names of the classes when the label column is a ClassLabel, else None."""
    feature = dataset.features[find_label_column(dataset, label_column)]
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def group_labels(dataset: Dataset, label_column: str | None = None) -> tuple[np.ndarray, dict[str, str]]:
    """Class of each row as text, and the readable name of each class."""
    labels = read_labels(dataset, label_column).astype(str)
    names = class_names(dataset, label_column) or []
    return labels, {str(i): name for i, name in enumerate(names)}


def resolve_classes(
    classes: Iterable[Any] | str | int, names: Sequence[str] | None, present: Iterable[int]
) -> list[int]:
    """Class ids of `classes`, given by name or id.

    Args:
        classes: names, ids, or ids as text.
        names: class names by id, if known.
        present: ids that occur in the data.

    Raises:
        UNSCError: unknown name (the closest are listed), id out of range, class absent from the data, or an empty list.
    """
    if isinstance(classes, str | int):
        classes = [classes]
    present = sorted(set(present))
    ids: list[int] = []
    for item in classes:
        text = str(item)
        if names is not None and text in names:
            ids.append(list(names).index(text))
            continue
        known = [str(i) for i in present] if names is None else list(names)
        if not WHOLE_NUMBER.fullmatch(text):
            raise UNSCError(f"forget_classes: no class {text!r}; closest: {closest(text, known)}.")
        number = int(text)
        if names is not None and not 0 <= number < len(names):
            raise UNSCError(
                f"forget_classes: id {number} is out of range; the data set has classes 0 to {len(names) - 1}."
            )
        ids.append(number)
    if not ids:
        raise UNSCError("forget_classes: empty; name at least one class.")
    for number in ids:
        if number not in present:
            label = names[number] if names is not None else number
            raise UNSCError(
                f"forget_classes: class {label!r} ({number}) has no rows in the data; present ids: {present[:20]}."
            )
    return sorted(set(ids))


def split_dataset(
    dataset: Dataset,
    forget_classes: Iterable[Any] | str | int | None = None,
    indices: Iterable[int] | None = None,
    where: Callable[[dict[str, Any]], bool] | None = None,
    column_values: Mapping[str, Any] | None = None,
    label_column: str | None = None,
) -> Split:
    """Split into rows to forget and rows to keep.

    Args:
        dataset: a `datasets.Dataset`.
        forget_classes: class names or ids.
        indices: row numbers.
        where: predicate on a row.
        column_values: `{"author": [3, 7]}` takes the rows whose column holds one of the values.
        label_column: found by itself when None.

    Exactly one of `forget_classes`, `indices`, `where` and `column_values` must be given.

    Raises:
        UNSCError: bad selection, or one of the two sides would be empty.
    """
    _check_dataset(dataset)
    selections = {
        "forget_classes": forget_classes,
        "indices": indices,
        "where": where,
        "column_values": column_values,
    }
    given = [name for name, value in selections.items() if value is not None]
    if len(given) != 1:
        raise UNSCError(f"split_dataset: got {given or 'nothing'}; give exactly one of {', '.join(selections)}.")
    if forget_classes is not None:
        labels = read_labels(dataset, label_column)
        ids = resolve_classes(forget_classes, class_names(dataset, label_column), labels.tolist())
        chosen = np.isin(labels, ids)
        if chosen.all():
            raise UNSCError(
                f"forget_classes: all {len(ids)} classes of the data would be forgotten; keep at least one."
            )
    elif indices is not None:
        chosen = _rows_by_index(indices, len(dataset))
    elif column_values is not None:
        chosen = _rows_by_value(dataset, column_values)
    else:
        assert where is not None
        chosen = np.fromiter((bool(where(row)) for row in dataset), dtype=bool, count=len(dataset))
    if not chosen.any():
        raise UNSCError(f"{given[0]}: selects no row of {len(dataset)}; there is nothing to forget.")
    if chosen.all():
        raise UNSCError(f"{given[0]}: selects all {len(dataset)} rows; there is nothing left to retain.")
    return Split(dataset.select(np.flatnonzero(chosen)), dataset.select(np.flatnonzero(~chosen)))


def _rows_by_index(indices: Iterable[int], count: int) -> np.ndarray:
    rows = np.asarray(list(indices), dtype=np.int64)
    outside = rows[(rows < 0) | (rows >= count)]
    if len(outside):
        raise UNSCError(f"indices: {int(outside[0])} is out of range; the data set has rows 0 to {count - 1}.")
    values, counts = np.unique(rows, return_counts=True)
    if (counts > 1).any():
        raise UNSCError(f"indices: row {int(values[counts > 1][0])} is given more than once.")
    chosen = np.zeros(count, dtype=bool)
    chosen[rows] = True
    return chosen


def _rows_by_value(dataset: Dataset, column_values: Mapping[str, Any]) -> np.ndarray:
    """Rows where every named column holds one of its values; values are compared as text, so "3" finds 3."""
    chosen = np.ones(len(dataset), dtype=bool)
    for column, wanted in column_values.items():
        if column not in dataset.column_names:
            raise UNSCError(
                f"column_values: no column {column!r} in the data set; columns are {', '.join(dataset.column_names)}."
            )
        accepted = {str(value) for value in ([wanted] if isinstance(wanted, str | int | float) else wanted)}
        found = np.asarray(
            [str(v) for v in dataset.select_columns([column]).with_format("arrow")[:][column].to_pylist()]
        )
        absent = sorted(accepted - set(found.tolist()))
        if absent:
            raise UNSCError(
                f"column_values: no row has {column} {absent[0]!r}; closest: {closest(absent[0], set(found.tolist()))}."
            )
        chosen &= np.isin(found, sorted(accepted))
    return chosen


@dataclass(frozen=True)
class Request:
    """What is to be forgotten: one of the selections that `split_dataset` takes.

    Attributes:
        forget_classes: names or ids.
        indices: row numbers in the training data.
        column_values: values by column.
        option: what the command line calls the selection, for errors; its name above when None.
    """

    forget_classes: tuple[Any, ...] | None = None
    indices: tuple[int, ...] | None = None
    column_values: Mapping[str, Any] | None = None
    option: str | None = field(default=None, compare=False)

    def split(self, dataset: Dataset, label_column: str | None = None) -> Split:
        """Rows to forget and rows to keep.

        Raises:
            UNSCError: as `split_dataset`; it names `option`.
        """
        try:
            return split_dataset(
                dataset,
                forget_classes=self.forget_classes,
                indices=self.indices,
                column_values=self.column_values,
                label_column=label_column,
            )
        except UNSCError as error:
            argument, _, what = str(error).partition(": ")
            if self.option is None or getattr(self, argument, None) is None:
                raise
            raise UNSCError(f"{self.option}: {what}") from None


def hold_out(dataset: Dataset, fraction: float, labels: np.ndarray, limit: int, seed: int) -> tuple[Dataset, Dataset]:
    """Split off a validation part, stratified by class, of at most `limit` rows; returns (rest, held out).

    Each class gives at least one row if it has two or more. With a single row in all, the two parts are the same row.
    """
    if len(dataset) == 1:
        return dataset, dataset
    rng = np.random.default_rng(seed)
    wanted = min(fraction, limit / len(dataset))
    held: list[int] = []
    for value in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == value))
        held.extend(members[: min(max(1, round(wanted * len(members))), len(members) - 1)].tolist())
    if not held:
        held = [int(rng.integers(len(dataset)))]
    mask = np.zeros(len(dataset), dtype=bool)
    mask[held] = True
    return dataset.select(np.flatnonzero(~mask)), dataset.select(np.flatnonzero(mask))


def open_image(stored: Mapping[str, Any] | None) -> PIL.Image.Image:
    """Decode what the data set holds."""
    try:
        if stored is None:
            raise ValueError("there is none")
        image: PIL.Image.Image = Image().decode_example(stored)
        image.load()
    except Exception as error:  # whatever a decoder raises at bytes that anybody may have written
        raise UnreadableRowError(
            f"dataset: the image of a row cannot be read ({first_line(error)}); unsc_hf.data.unreadable_rows tells which, leave it out."
        ) from error
    return image


def unreadable_rows(dataset: Dataset, text_columns: Sequence[str] | None = None) -> list[int]:
    """Numbers of the rows that lack an image that can be decoded, or a text in the columns that are read."""
    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    texts = [] if images else list(find_text_columns(dataset, text_columns))
    bare = dataset.select_columns([*images, *texts])
    for name in images:
        bare = bare.cast_column(name, Image(decode=False))
    found = []
    for i, row in enumerate(bare):
        try:
            for name in images:
                open_image(row[name])
        except UnreadableRowError:
            found.append(i)
        else:
            if any(row[name] is None for name in texts):
                found.append(i)
    return found


@contextmanager
def unreadable_rows_by_number(
    splits: Mapping[str, Dataset], text_columns: Sequence[str] | None = None
) -> Iterator[None]:
    """Name the rows that could not be read.

    Raises:
        UNSCError: the split and the first few row numbers.
    """
    try:
        yield
    except UnreadableRowError as error:
        for name, rows in splits.items():
            found = unreadable_rows(rows, text_columns)
            if found:
                listed = ", ".join(map(str, found[:10])) + (", ..." if len(found) > 10 else "")
                raise UNSCError(
                    f"dataset_name: {len(found)} of {len(rows)} {name} rows hold no image or text that can be read: {listed}; leave them out."
                ) from error
        raise


@dataclass(frozen=True)
class ImageTransform:
    """Raw rows to model inputs: `datasets` calls it on a batch of rows each time they are read.

    Attributes:
        processor: an image processor.
        image_column, label_column: names in the raw data.
        mode: PIL mode images are converted to ("RGB" or "L"), from the model's number of channels.
    """

    processor: Any
    image_column: str
    label_column: str
    mode: str

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        images = [open_image(stored).convert(self.mode) for stored in rows[self.image_column]]
        inputs: dict[str, Any] = {"pixel_values": self.processor(images, return_tensors="pt")["pixel_values"]}
        if self.label_column in rows:
            inputs["labels"] = rows[self.label_column]
        return inputs


@dataclass(frozen=True)
class TextTransform:
    """Raw texts to token ids, without padding: the collator pads each batch.

    Attributes:
        tokenizer: a tokenizer; texts are cut at its `model_max_length`.
        text_columns: one column, or two that make a pair.
        label_column: name in the raw data.
    """

    tokenizer: PreTrainedTokenizerBase
    text_columns: tuple[str, ...]
    label_column: str

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        if any(text is None for name in self.text_columns for text in rows[name]):
            raise UnreadableRowError(
                "dataset: a row holds no text; unsc_hf.data.unreadable_rows tells which, leave it out."
            )
        inputs = dict(self.tokenizer(*(rows[name] for name in self.text_columns), truncation=True))
        if self.label_column in rows:
            inputs["labels"] = rows[self.label_column]
        return inputs


def prepare_dataset(
    dataset: Dataset,
    processing_class: Any,
    model: nn.Module,
    label_column: str | None = None,
    text_columns: Sequence[str] | None = None,
) -> Dataset:
    """Rows ready for the model: raw images and texts are processed as they are read, others are left alone.

    Raises:
        UNSCError: images without an image processor, or texts without a tokenizer.
    """
    _check_dataset(dataset)
    if dataset.format["type"] == "custom":
        return dataset
    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    if images:
        if not isinstance(processing_class, ImageProcessingMixin):
            raise UNSCError(
                f"processing_class: column {images[0]!r} holds images, so an image processor is needed, got {type(processing_class).__name__}."
            )
        if len(images) > 1:
            raise UNSCError(
                f"dataset: has {len(images)} image columns ({', '.join(images)}); keep one with select_columns."
            )
        channels = getattr(getattr(model, "config", None), "num_channels", 3)
        label = find_label_column(dataset, label_column)
        return dataset.cast_column(images[0], Image(decode=False)).with_transform(
            ImageTransform(processing_class, images[0], label, "L" if channels == 1 else "RGB")
        )
    raw_text = any(_is_text(feature) for feature in dataset.features.values())
    if raw_text and not {"input_ids", "pixel_values", "inputs_embeds"} & set(dataset.column_names):
        names = find_text_columns(dataset, text_columns)
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise UNSCError(
                f"processing_class: column {names[0]!r} holds text, so a tokenizer is needed, got {type(processing_class).__name__}."
            )
        check_padding(processing_class, model)
        label = find_label_column(dataset, label_column)
        return dataset.with_transform(TextTransform(processing_class, names, label))
    return dataset if dataset.format["type"] is not None else dataset.with_format("torch")


def check_padding(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Batches of texts need a padding token, and the model must know it where it pools the last token.

    Raises:
        UNSCError: there is none, or the model's config names another.
    """
    if tokenizer.pad_token_id is None:
        raise UNSCError(
            "processing_class: the tokenizer has no padding token; set tokenizer.pad_token = tokenizer.eos_token "
            "and model.config.pad_token_id = tokenizer.pad_token_id."
        )
    config = getattr(model, "config", None)
    known = getattr(config, "pad_token_id", None)
    if known is None and config is not None and not getattr(config, "is_encoder_decoder", False):
        raise UNSCError(
            f"model: config.pad_token_id is not set, the tokenizer pads with {tokenizer.pad_token_id}; set it to that."
        )


def default_collator(processing_class: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Pads texts when there is a tokenizer, stacks everything else."""
    if isinstance(processing_class, PreTrainedTokenizerBase) and processing_class.pad_token_id is not None:
        return DataCollatorWithPadding(processing_class)
    return default_data_collator


def check_labels_match(
    dataset: Dataset, label_column: str | None, num_labels: int, model_names: Sequence[str] | None
) -> None:
    """Refuse a data set whose labels are not the model's.

    Raises:
        UNSCError: an id the model has no output for, or names that stand in another order.
    """
    labels = read_labels(dataset, label_column)
    worst = int(labels.max()) if len(labels) else 0
    if worst >= num_labels or (len(labels) and int(labels.min()) < 0):
        bad = worst if worst >= num_labels else int(labels.min())
        raise UNSCError(
            f"model: has {num_labels} labels, but the data set holds label {bad}; load the model trained on this data."
        )
    names = class_names(dataset, label_column)
    generic = model_names is None or all(name == f"LABEL_{i}" for i, name in enumerate(model_names))
    if names is None or generic:
        return
    assert model_names is not None
    if len(names) != len(model_names):
        raise UNSCError(
            f"model: has {len(model_names)} labels, the data set {len(names)}; load the model trained on this data."
        )
    for i, (ours, theirs) in enumerate(zip(names, model_names, strict=True)):
        if _plain(ours) != _plain(theirs):
            raise UNSCError(
                f"model: calls label {i} {theirs!r}, the data set {ours!r}; load the model trained on this data."
            )


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _check_dataset(dataset: Any) -> None:
    if not isinstance(dataset, Dataset):
        raise UNSCError(
            f"dataset: got {type(dataset).__name__}, expected a datasets.Dataset; choose a split, or use Dataset.from_dict."
        )
