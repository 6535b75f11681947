"""Small language models to compare with: loading question-answer data, and training an original or retrained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ...data.dialogues import AnswerCollator, prepare_dialogues
from ...errors import UNSCError
from ...models.loading import load_as, load_tokenizer
from .texts import texts
from .training import TrainingPlan

_END, _PAD = "<|end|>", "<|pad|>"


@dataclass(frozen=True)
class LlamaSize:
    """A Llama from scratch: depth, width, heads; the MLP is four times as wide."""

    layers: int
    width: int
    heads: int


LLAMA_SIZES = {
    "nano": LlamaSize(2, 128, 4),
    "tiny": LlamaSize(4, 256, 4),
    "small": LlamaSize(6, 384, 6),
    "medium": LlamaSize(12, 768, 12),
}


def to_dialogues(dataset: Dataset, template: str = "Question: {question}\nAnswer:") -> Dataset:
    """Rows with `prompt` and `completion`: those of `question` and `answer` through `template`; other columns stay.

    Raises:
        UNSCError: neither pair of columns, nor `text`.
    """
    columns = set(dataset.column_names)
    if {"prompt", "completion"} <= columns or "text" in columns:
        return dataset
    if not {"question", "answer"} <= columns:
        raise UNSCError(
            f"dataset_name: columns are {', '.join(dataset.column_names)}; expected prompt and completion, question and "
            "answer, or text."
        )

    def convert(row: dict[str, Any]) -> dict[str, str]:
        if row["question"] is None or row["answer"] is None:
            raise UNSCError("dataset_name: a row has no question or no answer; leave it out.")
        return {"prompt": template.format(question=row["question"]), "completion": " " + row["answer"].strip()}

    return dataset.map(convert, remove_columns=["question", "answer"], load_from_cache_file=False)


def train_bpe(dataset: Dataset, size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `size` tokens, learned from prompts and completions (or texts)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_END, _PAD],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    columns = [name for name in ("prompt", "completion", "text") if name in dataset.column_names]
    tokenizer.train_from_iterator(texts(dataset, columns), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=max_length, eos_token=_END, pad_token=_PAD
    )


def build_llama(
    dataset: Dataset, size: str, vocabulary_size: int, max_length: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An untrained Llama and a tokenizer learned from `dataset`.

    Raises:
        UNSCError: unknown size.
    """
    if size not in LLAMA_SIZES:
        raise UNSCError(f"model_size: {size!r} does not exist; choose from {', '.join(LLAMA_SIZES)}.")
    tokenizer = train_bpe(dataset, vocabulary_size, max_length)
    shape = LLAMA_SIZES[size]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config), tokenizer


@dataclass(frozen=True)
class LanguagePlan(TrainingPlan):
    """How a language model is trained.

    Attributes:
        size: name in `LLAMA_SIZES`, or None to fine-tune `base_model`.
        vocabulary_size: most tokens of the tokenizer that is learned for `size`.
        max_length: tokens of a row, for `size`.
        completion_only: learn the completions' tokens alone.
    """

    vocabulary_size: int = 2048
    max_length: int = 256
    completion_only: bool = False

    def start(self, dataset: Dataset, labels: Sequence[str]) -> tuple[PreTrainedModel, Any]:
        if self.base_model is None:
            assert self.size is not None
            return build_llama(dataset, self.size, self.vocabulary_size, self.max_length)
        return load_as(AutoModelForCausalLM, self.base_model, "model_name_or_path"), load_tokenizer(self.base_model)

    def prepare(self, dataset: Dataset, processor: Any, model: PreTrainedModel, label_column: str | None) -> Any:
        return prepare_dialogues(dataset, processor, self.completion_only)

    def collator(self, processor: Any) -> Any:
        return AnswerCollator.of(processor)
