"""Training of small language models to compare with, and of their tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from ...data.dialogues import AnswerCollator, prepare_dialogues
from ...models.loading import load_tokenizer
from .texts import texts
from .training import TrainingPlan

_END, _PAD = "<|end|>", "<|pad|>"


@dataclass(frozen=True)
class LanguagePlan(TrainingPlan):
    """How a language model is trained.

    Attributes:
        size: a Llama's, or None to fine-tune `base_model`.
        vocabulary_size: most tokens of the tokenizer that is learned for `size`.
        max_length: tokens of a row, for `size`.
        completion_only: learn the completions' tokens alone.
    """

    vocabulary_size: int = 2048
    max_length: int = 256
    completion_only: bool = False

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
        return prepare_dialogues(dataset, processor, self.completion_only)

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
