"""Prompts and completions as token ids with labels, and their batches."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..errors import UNSCError

IGNORED = -100

DEFAULT_TEMPLATE = "Question: {prompt}\nAnswer:"

Text = Any  # a string, or a list of messages, which are dicts with `role` and `content`


@dataclass(frozen=True)
class PromptFormat:
    """How a question and an answer become a prompt and a completion.

    Attributes:
        template: text with `{prompt}` (or `{question}`), in which \\n is a line break. The answer follows after a space
            unless the template ends with white space or with `{completion}`, which stands for the answer as it is. None
            makes messages for the tokenizer's chat template.
        system_prompt: the first message, for chat templates.
        chat_template_kwargs: more arguments of `apply_chat_template`, such as a date.

    Raises:
        UNSCError: a template without a place for the question.
    """

    template: str | None = DEFAULT_TEMPLATE
    system_prompt: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.template is not None and "{prompt}" not in self.template.replace("{question}", "{prompt}"):
            raise UNSCError(f"prompt_template: {self.template!r} has no {{prompt}}, where the question goes; add it.")
        if self.template is not None and "{completion}" in self.template.removesuffix("{completion}"):
            raise UNSCError(f"prompt_template: {self.template!r} goes on after {{completion}}; let it end there.")

    @classmethod
    def of(
        cls, template: str | None, tokenizer: Any, system_prompt: str | None = None,
        chat_template_kwargs: str | None = None,
    ) -> PromptFormat:  # fmt: skip
        """With the tokenizer's chat template when no other is given, or the default where it has none.

        Args:
            template, system_prompt: see the attributes.
            tokenizer: a tokenizer, or None.
            chat_template_kwargs: a JSON object.

        Raises:
            UNSCError: options of a chat template where there is none, or something else than a JSON object.
        """
        if template is None and getattr(tokenizer, "chat_template", None) is None:
            template = DEFAULT_TEMPLATE
        for name, value in (("system_prompt", system_prompt), ("chat_template_kwargs", chat_template_kwargs)):
            if value and template is not None:
                raise UNSCError(
                    f"{name}: got {value!r}, but no chat template is used; leave it or prompt_template out."
                )
        return cls(template, system_prompt, _object(chat_template_kwargs))

    def row(self, question: str, answer: str) -> dict[str, Text]:
        """`prompt` and `completion`, and `chat_template_kwargs` where there are some.

        Raises:
            UNSCError: no question or no answer.
        """
        if not question or not answer:
            raise UNSCError("dataset_name: a row has no question or no answer; leave it out.")
        if self.template is None:
            system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
            more = {"chat_template_kwargs": dict(self.chat_template_kwargs)} if self.chat_template_kwargs else {}
            completion = [{"role": "assistant", "content": answer}]
            return {"prompt": [*system, {"role": "user", "content": question}], "completion": completion, **more}
        template = self.template.replace("\\n", "\n").replace("\\t", "\t").replace("{question}", "{prompt}")
        text = template.removesuffix("{completion}")
        space = "" if text != template or text[-1:].isspace() else " "
        return {"prompt": text.replace("{prompt}", question), "completion": space + answer}


def _object(text: str | None) -> dict[str, Any] | None:
    """The options of a chat template, from the command line."""
    try:
        options = None if text is None else json.loads(text)
    except ValueError:
        options = text
    if options is not None and not isinstance(options, dict):
        raise UNSCError(
            f'chat_template_kwargs: got {text!r}; write a JSON object, such as {{"date_string": "10 Apr 2025"}}.'
        )
    return options


def in_place_of(completion: Text, answer: str) -> Text:
    """Another answer as a row's completion: with the same white space before it, or as a message of the same role."""
    if isinstance(completion, str):
        return completion[: len(completion) - len(completion.lstrip())] + answer.strip()
    return [{**completion[-1], "content": answer}]


def answer_text(completion: Text) -> str:
    """A completion without outer white space."""
    return str(completion if isinstance(completion, str) else completion[-1]["content"]).strip()


@dataclass(frozen=True)
class DialogueTransform:
    """Rows to token ids and labels: `prompt` and `completion`, `messages` (the last one is the completion), or `text`.

    Strings are tokenised together, with the special tokens that the tokenizer adds, and an end-of-text token follows.
    Messages go through the tokenizer's chat template. A prompt is labelled nowhere, and there is one token of
    beginning.

    Attributes:
        tokenizer: a tokenizer.
        completion_only: label only the completion's tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    completion_only: bool = True

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        encoded: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for i in range(len(next(iter(rows.values())))):
            start, ids = self.encode({name: column[i] for name, column in rows.items()})
            hidden = len(start) if self.completion_only else 1
            encoded["input_ids"].append(ids)
            encoded["attention_mask"].append([1] * len(ids))
            encoded["labels"].append([IGNORED] * hidden + ids[hidden:])
        return encoded

    def encode(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Token ids of a row's prompt, and of the whole row.

        Raises:
            UNSCError: a row that does not fit the model, or a chat template that changes the prompt once an answer
                follows.
        """
        if "completion" in row:
            prompt, completion = row["prompt"], row["completion"]
        elif "messages" in row:
            prompt, completion = row["messages"][:-1], row["messages"][-1:]
        else:
            prompt, completion = "", row["text"]
        start = self.encode_prompt(prompt, row.get("chat_template_kwargs"))
        if isinstance(prompt, str):
            ids = self._ids(prompt + completion)
            ids = ids if prompt or ids[: len(start)] == start else [*start, *ids]
        else:
            ids = self._chat([*prompt, *completion], False, row.get("chat_template_kwargs"))
            if ids[: len(start)] != start:
                raise UNSCError(
                    "chat_template_kwargs: the tokenizer's chat template writes a prompt otherwise when an answer "
                    "follows; choose arguments under which it does not, or give prompt_template."
                )
        end, most = self.tokenizer.eos_token_id, self.tokenizer.model_max_length
        if end is not None and ids[-1:] != [end]:
            ids = [*ids, end]
        if len(ids) > most:
            raise UNSCError(
                f"dataset_name: a row has {len(ids)} tokens and the model reads {most}; shorten it, or cut long texts "
                f"into chunks (chunk_size {most} or less)."
            )
        return start, ids

    def encode_prompt(self, prompt: Text, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[int]:
        """Token ids of a prompt, at least one, so that the completion's first token can be predicted."""
        if not isinstance(prompt, str):
            return self._chat(prompt, True, chat_template_kwargs)
        ids = self._ids(prompt)
        return ids or [i for i in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id) if i is not None][:1]

    def _ids(self, text: str) -> list[int]:
        """Token ids of a text, with what the tokenizer adds at its beginning, but nothing at its end."""
        start, end = self.tokenizer.bos_token, self.tokenizer.eos_token
        given = bool(start) and text.startswith(str(start))
        ids: list[int] = self.tokenizer(text, add_special_tokens=not given)["input_ids"]
        added_end = ids[-1:] == [self.tokenizer.eos_token_id] and not text.endswith(str(end))
        return ids[:-1] if added_end else ids

    def _chat(self, messages: Text, generate: bool, options: Mapping[str, Any] | None) -> list[int]:
        options = {name: value for name, value in (options or {}).items() if value is not None}
        ids: list[int] = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=False, add_generation_prompt=generate, **options
        )
        return ids


def to_dialogues(dataset: Dataset, prompt_format: PromptFormat | None = None, answer: str = "answer") -> Dataset:
    """Turn `question` and the column `answer` into `prompt` and `completion`; other columns stay.

    Rows that have `prompt` and `completion`, `messages`, or `text`, are returned as they are. MUSE's `prompt` and `gt`
    are a prompt and its completion.

    Raises:
        UNSCError: none of these columns, or a row without a question or an answer.
    """
    columns = set(dataset.column_names)
    if _holds_dialogues(columns):
        return dataset
    if {"prompt", "gt"} <= columns:  # MUSE's verbatim texts
        return dataset.map(
            lambda row: {"completion": f" {row['gt']}"}, remove_columns=["gt"], load_from_cache_file=False
        )
    if not {"question", answer} <= columns:
        raise UNSCError(
            f"dataset_name: columns are {', '.join(dataset.column_names)}; expected question and {answer}, prompt and "
            "completion, messages, or text."
        )
    made = prompt_format or PromptFormat()
    return dataset.map(
        lambda row: made.row(row["question"], row[answer]), remove_columns=["question", answer],
        load_from_cache_file=False,
    )  # fmt: skip


def _holds_dialogues(columns: set[str]) -> bool:
    return {"prompt", "completion"} <= columns or "messages" in columns or "text" in columns


def chunk_texts(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, chunk_size: int | None) -> Dataset:
    """Rows with `text`, cut into chunks of at most `chunk_size` tokens; nothing is left out. Other rows stay.

    Raises:
        UNSCError: a chunk size that does not fit the model.
    """
    most = tokenizer.model_max_length
    if chunk_size is None or "text" not in dataset.column_names:
        return dataset
    if not 1 <= chunk_size <= most:
        raise UNSCError(f"chunk_size: got {chunk_size}; choose a whole number from 1 to {most}, the model's context.")
    whole = DialogueTransform(tokenizer)
    spare = len(whole.encode_prompt("")) + 1  # a token of beginning and one of the end

    def cut(rows: dict[str, list[str]]) -> dict[str, list[str]]:
        chunks: list[str] = []
        for text in rows["text"]:
            marks = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            step = max(1, chunk_size - spare)
            starts = [0, *(marks[i][0] for i in range(step, len(marks), step)), len(text)]
            chunks += [text[a:b] for a, b in pairwise(starts) if b > a]
        return {"text": chunks}

    return dataset.map(cut, batched=True, remove_columns=dataset.column_names, load_from_cache_file=False)


def prepare_dialogues(dataset: Dataset, tokenizer: Any, completion_only: bool) -> Dataset:
    """Rows of `input_ids`, `attention_mask` and `labels`. Raw rows are tokenised as they are read.

    The data set has columns `prompt` and `completion`, `messages`, or `text`, or already `input_ids` and `labels`. With
    `completion_only` only the completion's tokens are labelled.

    Raises:
        UNSCError: other columns, no tokenizer, messages without a chat template, or rows without any labelled token.
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
            f"dataset: columns are {', '.join(dataset.column_names)}; a language model needs prompt and completion, "
            "messages, or text."
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UNSCError(f"processing_class: rows hold text, so a tokenizer is needed, got {type(tokenizer).__name__}.")
    if tokenizer.pad_token_id is None:
        raise UNSCError(
            "processing_class: the tokenizer has no padding token; set tokenizer.pad_token = tokenizer.eos_token."
        )
    conversations = "messages" in columns or not isinstance(dataset[0].get("prompt", ""), str)
    if conversations and tokenizer.chat_template is None:
        raise UNSCError(
            "processing_class: the rows hold messages, but the tokenizer has no chat template; set "
            "tokenizer.chat_template, or give question and answer with prompt_template."
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
            raise UNSCError("dataset: a row has no labelled token (its completion is empty); leave it out.")
        return batch
