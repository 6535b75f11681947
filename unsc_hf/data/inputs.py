"""How raw images and texts become model inputs, and which rows cannot be read."""

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
from .columns import check_dataset, find_label_column, find_text_columns, is_text

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]  # makes a batch of rows

_LISTED = 10  # row numbers in an error message


def open_image(stored: Mapping[str, Any] | None) -> PIL.Image.Image:
    """Decode an image as the data set stores it.

    Raises:
        UnreadableRowError: there is none, or it cannot be decoded.
    """
    try:
        if stored is None:
            raise ValueError("there is none")
        image: PIL.Image.Image = Image().decode_example(stored)
        image.load()
    except Exception as error:  # decoders raise many kinds of errors at broken files
        raise UnreadableRowError(
            f"dataset: the image of a row cannot be read ({first_line(error)}); leave it out. "
            "unsc_hf.data.inputs.unreadable_rows lists such rows."
        ) from error
    return image


def unreadable_rows(dataset: Dataset, text_columns: Sequence[str] | None = None) -> list[int]:
    """Numbers of the rows whose image cannot be decoded, or that lack a text in the columns that are read."""
    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    texts = [] if images else list(find_text_columns(dataset, text_columns))
    stored = dataset.select_columns([*images, *texts])
    for name in images:
        stored = stored.cast_column(name, Image(decode=False))

    def readable(row: Mapping[str, Any]) -> bool:
        try:
            for name in images:
                open_image(row[name])
        except UnreadableRowError:
            return False
        return all(row[name] is not None for name in texts)

    return [i for i, row in enumerate(stored) if not readable(row)]


@contextmanager
def unreadable_rows_by_number(
    splits: Mapping[str, Dataset], text_columns: Sequence[str] | None = None
) -> Iterator[None]:
    """Name the rows that could not be read inside the block.

    Raises:
        UNSCError: the split and the first few row numbers.
    """
    try:
        yield
    except UnreadableRowError as error:
        for name, rows in splits.items():
            unreadable = unreadable_rows(rows, text_columns)
            if unreadable:
                listed = ", ".join(map(str, unreadable[:_LISTED])) + (", ..." if len(unreadable) > _LISTED else "")
                raise UNSCError(
                    f"dataset_name: {len(unreadable)} of {len(rows)} {name} rows hold no image or text that can be "
                    f"read: {listed}; leave them out."
                ) from error
        raise


@dataclass(frozen=True)
class ImageTransform:
    """Raw rows to model inputs, each time they are read; `mode` is the PIL mode of images ("RGB" or "L")."""

    processor: Any
    image_column: str
    label_column: str
    mode: str

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        images = [open_image(stored).convert(self.mode) for stored in rows[self.image_column]]
        inputs = {"pixel_values": self.processor(images, return_tensors="pt")["pixel_values"]}
        return _with_labels(inputs, rows, self.label_column)


@dataclass(frozen=True)
class TextTransform:
    """Raw texts, or pairs of them, to token ids; cut at `model_max_length`, and padded by the collator."""

    tokenizer: PreTrainedTokenizerBase
    text_columns: tuple[str, ...]
    label_column: str

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        if any(text is None for name in self.text_columns for text in rows[name]):
            raise UnreadableRowError(
                "dataset: a row holds no text; leave it out. unsc_hf.data.inputs.unreadable_rows lists such rows."
            )
        inputs = dict(self.tokenizer(*(rows[name] for name in self.text_columns), truncation=True))
        return _with_labels(inputs, rows, self.label_column)


def _with_labels(inputs: dict[str, Any], rows: dict[str, list[Any]], column: str) -> dict[str, Any]:
    return {**inputs, "labels": rows[column]} if column in rows else inputs


def prepare_dataset(
    dataset: Dataset,
    processing_class: Any,
    model: nn.Module,
    label_column: str | None = None,
    text_columns: Sequence[str] | None = None,
) -> Dataset:
    """Rows ready for the model. Raw images and texts are processed as they are read; other rows stay as they are.

    Raises:
        UNSCError: images without an image processor, or texts without a tokenizer.
    """
    check_dataset(dataset)
    if dataset.format["type"] == "custom":
        return dataset
    given = type(processing_class).__name__
    images = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    if images:
        if not isinstance(processing_class, ImageProcessingMixin):
            raise UNSCError(
                f"processing_class: column {images[0]!r} holds images, so an image processor is needed, got {given}."
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
    raw_text = any(is_text(feature) for feature in dataset.features.values())
    if raw_text and not {"input_ids", "pixel_values", "inputs_embeds"} & set(dataset.column_names):
        names = find_text_columns(dataset, text_columns)
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise UNSCError(f"processing_class: column {names[0]!r} holds text, so a tokenizer is needed, got {given}.")
        _check_padding(processing_class, model)
        label = find_label_column(dataset, label_column)
        return dataset.with_transform(TextTransform(processing_class, names, label))
    return dataset if dataset.format["type"] is not None else dataset.with_format("torch")


def _check_padding(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Batches of texts need a padding token. Models that pool the last token must know it too."""
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


def default_collator(processing_class: Any) -> Collator:
    """Pads texts when there is a tokenizer, stacks everything else."""
    if isinstance(processing_class, PreTrainedTokenizerBase) and processing_class.pad_token_id is not None:
        return DataCollatorWithPadding(processing_class)
    return default_data_collator


class CachedRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Prepared rows that stay in memory once they were read: preparing them again takes as long as a small model.

    The rows must not be changed. Once the cached ones take `budget` bytes, all others are prepared anew each time.
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
