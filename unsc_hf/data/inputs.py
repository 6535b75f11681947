"""Data sets: which rows to forget and which to keep, where the labels are, and how raw rows become model inputs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import PIL.Image
import torch
from datasets import Dataset, Image
from torch import Tensor, nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator
from transformers.image_processing_base import ImageProcessingMixin

from ..errors import UnreadableRowError, UNSCError, first_line
from .columns import _check_dataset, _is_text, find_label_column, find_text_columns


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


class CachedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Prepared rows that stay in memory once they were read: preparing them again takes as long as a small model.

    The rows must not be changed.

    Args:
        prepared: rows ready for the model.
        budget: bytes; once the cached rows take that many, all others are prepared anew each time.
    """

    def __init__(self, prepared: Dataset, budget: int = 512 * 2**20) -> None:
        self.prepared, self._rows = prepared, dict[int, dict[str, Any]]()
        sizes = [value.nbytes if isinstance(value, Tensor) else sys.getsizeof(value) for value in prepared[0].values()]
        self._most = budget // max(1, sum(sizes))

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        missing = [i for i in dict.fromkeys(indices) if i not in self._rows]
        read = dict(zip(missing, self.prepared.__getitems__(missing), strict=True)) if missing else {}
        for i in missing[: max(0, self._most - len(self._rows))]:
            self._rows[i] = read[i]
        return [read[i] if i in read else self._rows[i] for i in indices]
