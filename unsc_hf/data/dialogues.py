"""Prompts and completions as token ids with labels, and their batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import UNSCError

IGNORED = -100


@dataclass(frozen=True)
class DialogueTransform:
    """Rows with `prompt` and `completion`, or with `text`, to token ids and labels.

    Prompt and completion are tokenised separately, so the completion has the same tokens after any prompt. It ends with
    the tokenizer's end-of-text token.

    Attributes:
        tokenizer: a tokenizer; rows are cut at its `model_max_length`.
        completion_only: label only the completion's tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    completion_only: bool

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        completions = rows["completion"] if "completion" in rows else rows["text"]
        prompts = rows["prompt"] if "completion" in rows else [""] * len(completions)
        encoded: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, completion in zip(prompts, completions, strict=True):
            start = self.encode_prompt(prompt)
            end = self.tokenizer(completion, add_special_tokens=False)["input_ids"]
            if self.tokenizer.eos_token_id is not None:
                end = [*end, self.tokenizer.eos_token_id]
            ids = [*start, *end][: self.tokenizer.model_max_length]
            hidden = len(start) if self.completion_only else 1
            labels = ([IGNORED] * hidden + ids[hidden:])[: len(ids)]
            encoded["input_ids"].append(ids)
            encoded["attention_mask"].append([1] * len(ids))
            encoded["labels"].append(labels)
        return encoded

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a prompt, at least one, so that the completion's first token can be predicted."""
        ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
        start = self.tokenizer.bos_token_id
        if start is None and not ids:
            start = self.tokenizer.eos_token_id
        return ids if start is None else [start, *ids]


def to_dialogues(dataset: Dataset, template: str = "Question: {question}\nAnswer:") -> Dataset:
    """Turn `question` and `answer` into `prompt` and `completion` by `template`; other columns stay.

    Rows that have `prompt` and `completion`, or `text`, are returned as they are.

    Raises:
        UNSCError: none of these columns, or a row without a question or an answer.
    """
    columns = set(dataset.column_names)
    if _holds_dialogues(columns):
        return dataset
    if not {"question", "answer"} <= columns:
        raise UNSCError(
            f"dataset_name: columns are {', '.join(dataset.column_names)}; expected prompt and completion, question "
            "and answer, or text."
        )

    def convert(row: dict[str, Any]) -> dict[str, str]:
        if row["question"] is None or row["answer"] is None:
            raise UNSCError("dataset_name: a row has no question or no answer; leave it out.")
        return {"prompt": template.format(question=row["question"]), "completion": " " + row["answer"].strip()}

    return dataset.map(convert, remove_columns=["question", "answer"], load_from_cache_file=False)


def _holds_dialogues(columns: set[str]) -> bool:
    return {"prompt", "completion"} <= columns or "text" in columns


def prepare_dialogues(dataset: Dataset, tokenizer: Any, completion_only: bool) -> Dataset:
    """Rows of `input_ids`, `attention_mask` and `labels`. Raw rows are tokenised as they are read.

    The data set has columns `prompt` and `completion`, or `text`, or already `input_ids` and `labels`. With
    `completion_only` only the completion's tokens are labelled.

    Raises:
        UNSCError: other columns, no tokenizer, or rows without any labelled token.
    """
    if dataset.format["type"] == "custom":
        return dataset
    columns = set(dataset.column_names)
    if "input_ids" in columns:
        if "labels" not in columns:
            raise UNSCError("dataset: has input_ids but no labels; a language model needs both (-100 hides a token).")
        return dataset if dataset.format["type"] is not None else dataset.with_format("torch")
    if not _holds_dialogues(columns):
        raise UNSCError(
            f"dataset: columns are {', '.join(dataset.column_names)}; a language model needs prompt and completion, or "
            "text."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UNSCError(f"processing_class: rows hold text, so a tokenizer is needed, got {type(tokenizer).__name__}.")
    if tokenizer.pad_token_id is None:
        raise UNSCError(
            "processing_class: the tokenizer has no padding token; set tokenizer.pad_token = tokenizer.eos_token."
        )
    return dataset.with_transform(DialogueTransform(tokenizer, completion_only))


@dataclass(frozen=True)
class AnswerCollator:
    """Makes a batch of rows, padded on the right: `input_ids` with `pad_token_id`, labels with -100."""

    pad_token_id: int

    @classmethod
    def of(cls, tokenizer: Any) -> AnswerCollator:
        """For a tokenizer. Without one, token 0 pads, which the attention mask hides."""
        pad_token_id = getattr(tokenizer, "pad_token_id", None)
        return cls(0 if pad_token_id is None else int(pad_token_id))

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        batch = {}
        for name, value in fill.items():
            rows = [
                torch.as_tensor(row[name] if name in row else [1] * len(row["input_ids"]), dtype=torch.long)
                for row in features
            ]
            batch[name] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
        if not bool((batch["labels"][:, 1:] != IGNORED).any(1).all()):
            raise UNSCError(
                "dataset: a row has no labelled token (its completion is empty, or beyond model_max_length); leave it "
                "out."
            )
        return batch
