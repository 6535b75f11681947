"""Training of text classifiers and small language models to compare with, and of their tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ...data.columns import find_text_columns
from ...data.dialogues import AnswerCollator, prepare_dialogues
from ...data.inputs import prepare_dataset
from ...models.loading import load_tokenizer
from .training import TrainingPlan

_SPECIAL = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
}  # fmt: skip
_END, _PAD = "<|end|>", "<|pad|>"  # of a language model


@dataclass(frozen=True)
class TextPlan(TrainingPlan):
    """How a text classifier is trained.

    Attributes:
        size: a BERT's, or None to fine-tune `base_model`.
        text_columns: found by themselves when None.
        vocabulary_size: most tokens of the tokenizer that is learned for `size`.
        max_length: tokens of a text, for `size`.
    """

    text_columns: tuple[str, ...] | None = None
    vocabulary_size: int = 4096
    max_length: int = 64

    inputs: ClassVar[int] = 1
    learns_tokens: ClassVar[bool] = True
    auto_class: ClassVar[Any] = AutoModelForSequenceClassification
    load_processor: ClassVar[Callable[[str], Any]] = load_tokenizer

    def untrained(self, dataset: Dataset, labels: Sequence[str]) -> tuple[PreTrainedModel, Any]:
        """A BERT, and a tokenizer learned from the texts of `dataset`."""
        columns = find_text_columns(dataset, self.text_columns)
        tokenizer = train_tokenizer(dataset, columns, self.vocabulary_size, self.max_length)
        shape = {"vocab_size": len(tokenizer), "max_position_embeddings": self.max_length}
        model = self.from_scratch(BertConfig, labels, pad_token_id=tokenizer.pad_token_id, **shape)
        return model, tokenizer

    def prepare(self, dataset: Dataset, processor: Any, model: PreTrainedModel, label_column: str | None) -> Dataset:
        return prepare_dataset(dataset, processor, model, label_column, self.text_columns)


def texts(dataset: Dataset, columns: Sequence[str]) -> Iterator[str]:
    """All texts of some columns."""
    for batch in dataset.select_columns(list(columns)).iter(1000):
        for column in columns:
            yield from (text for text in batch[column] if text is not None)


def train_tokenizer(dataset: Dataset, columns: Sequence[str], size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer of at most `size` tokens; the same texts always give the same one.

    The trainer of `tokenizers` numbers the pieces inside words in the order of a hash table, which differs between
    processes, and breaks ties by these numbers. So the pieces are given to it beforehand, among the special tokens.
    The learned vocabulary then goes into a new tokenizer, in which they are ordinary pieces.
    """
    learner = _word_pieces(models.WordPiece(unk_token=_SPECIAL["unk_token"]))
    inside = {
        f"##{letter}"
        for text in texts(dataset, columns)
        for word, _ in learner.pre_tokenizer.pre_tokenize_str(learner.normalizer.normalize_str(text))
        for letter in word[1:]
    }
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=[*_SPECIAL.values(), *sorted(inside)], show_progress=False
    )
    learner.train_from_iterator(texts(dataset, columns), trainer)
    tokenizer = _word_pieces(models.WordPiece(learner.get_vocab(), unk_token=_SPECIAL["unk_token"]))
    tokenizer.add_special_tokens(list(_SPECIAL.values()))
    cls, sep = _SPECIAL["cls_token"], _SPECIAL["sep_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **_SPECIAL)


def _word_pieces(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


# ---- language models ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class LanguagePlan(TrainingPlan):
    """How a language model is trained.

    Attributes:
        size: a Llama's, or None to fine-tune `base_model`.
        vocabulary_size: most tokens of the tokenizer that is learned for `size`.
        max_length: tokens of a row, for `size`.
    """

    vocabulary_size: int = 2048
    max_length: int = 256

    learns_tokens: ClassVar[bool] = True
    auto_class: ClassVar[Any] = AutoModelForCausalLM
    load_processor: ClassVar[Callable[[str], Any]] = load_tokenizer

    def untrained(self, dataset: Dataset, labels: Sequence[str]) -> tuple[PreTrainedModel, Any]:
        """A Llama, and a tokenizer learned from `dataset`."""
        tokenizer = train_bpe(dataset, self.vocabulary_size, self.max_length)
        shape: dict[str, Any] = {"vocab_size": len(tokenizer), "max_position_embeddings": self.max_length}
        tokens = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        model = self.from_scratch(LlamaConfig, tie_word_embeddings=True, **tokens, **shape)
        return model, tokenizer

    def prepare(self, dataset: Dataset, processor: Any, model: PreTrainedModel, label_column: str | None) -> Dataset:
        return prepare_dialogues(dataset, processor, completion_only=False)

    def collator(self, processor: Any) -> Any:
        return AnswerCollator.of(processor)


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
