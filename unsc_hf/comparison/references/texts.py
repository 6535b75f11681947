"""Text data sets and the models to compare with: loading, and training an original or a retrained classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from ...data.columns import find_text_columns
from ...data.inputs import prepare_dataset
from ...errors import UNSCError
from ...models.loading import load_to_finetune, load_tokenizer
from .training import TrainingPlan

_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


@dataclass(frozen=True)
class BertSize:
    """A BERT from scratch: depth, width, heads; the MLP is four times as wide."""

    layers: int
    width: int
    heads: int


BERT_SIZES = {
    "nano": BertSize(2, 64, 2),
    "tiny": BertSize(2, 128, 2),
    "mini": BertSize(4, 256, 4),
    "small": BertSize(4, 512, 8),
    "medium": BertSize(8, 512, 8),
    "base": BertSize(12, 768, 12),
}


def texts(dataset: Dataset, columns: Sequence[str]) -> Iterator[str]:
    """All texts of some columns."""
    for batch in dataset.select_columns(list(columns)).iter(1000):
        for column in columns:
            yield from (text for text in batch[column] if text is not None)


def train_tokenizer(dataset: Dataset, columns: Sequence[str], size: int, max_length: int) -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer of at most `size` tokens, learned from the texts of `dataset`; the same texts give the same one.

    Left to itself, training numbers the pieces inside words in the order of a hash table, which differs from process to process, and
    breaks ties by these numbers. So they are named beforehand, among the special tokens, and what was learned is put into a new tokenizer
    in which they are pieces like all others.
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


def build_bert(
    dataset: Dataset, columns: Sequence[str], size: str, vocabulary_size: int, max_length: int, labels: Sequence[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An untrained BERT for the texts of `dataset`, and a tokenizer learned from them.

    Raises:
        UNSCError: unknown size.
    """
    if size not in BERT_SIZES:
        raise UNSCError(f"model_size: {size!r} does not exist; choose from {', '.join(BERT_SIZES)}.")
    tokenizer = train_tokenizer(dataset, columns, vocabulary_size, max_length)
    shape = BERT_SIZES[size]
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.width,
        max_position_embeddings=max_length,
        pad_token_id=tokenizer.pad_token_id,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    return BertForSequenceClassification(config), tokenizer


@dataclass(frozen=True)
class TextPlan(TrainingPlan):
    """How a text classifier is trained.

    Attributes:
        size: name in `BERT_SIZES`, or None to fine-tune `base_model`.
        text_columns: found by themselves when None.
        vocabulary_size: most tokens of the tokenizer that is learned for `size`.
        max_length: tokens of a text, for `size`.
    """

    text_columns: tuple[str, ...] | None = None
    vocabulary_size: int = 4096
    max_length: int = 64

    inputs: ClassVar[int] = 1

    def start(self, dataset: Dataset, labels: Sequence[str]) -> tuple[PreTrainedModel, Any]:
        if self.base_model is None:
            assert self.size is not None
            columns = find_text_columns(dataset, self.text_columns)
            return build_bert(dataset, columns, self.size, self.vocabulary_size, self.max_length, labels)
        tokenizer = load_tokenizer(self.base_model)
        return load_to_finetune(AutoModelForSequenceClassification, self.base_model, labels), tokenizer

    def prepare(self, dataset: Dataset, processor: Any, model: PreTrainedModel, label_column: str | None) -> Any:
        return prepare_dataset(dataset, processor, model, label_column, self.text_columns)

    def collator(self, processor: Any) -> Any:
        return DataCollatorWithPadding(processor)
