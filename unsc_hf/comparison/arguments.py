"""What to forget, from which model and data: options of every recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import DatasetDict
from peft import LoraConfig
from transformers import PreTrainedModel
from transformers.hf_argparser import HfArg

from ..config import UNSCConfig
from ..data.selection import WHOLE_NUMBER, Request
from ..data.sources import load_image_dataset, load_text_dataset
from ..errors import UNSCError, first_line
from ..models.loading import load_as
from .references.images import FORGET_CLASSES, PLAN, ImagePlan, digits_dataset
from .references.texts import LanguagePlan, TextPlan
from .references.training import TrainingPlan


@dataclass
class SharedArguments:
    """What to forget, from which model and data: options of every recipe."""

    model_name_or_path: str | None = HfArg(default=None, help="The original: a Hub id or folder.")
    retrained_model_name_or_path: list[str] | None = HfArg(
        default=None, help="Models trained without the forgotten rows; three or more allow a full verdict."
    )
    dataset_name: str | None = HfArg(default=None, help="Hub id, local data file or folder, or save_to_disk folder.")
    dataset_config_name: str | None = HfArg(default=None, help="Configuration of a Hub data set.")
    cache_dir: str | None = HfArg(default=None, help="Where data sets are cached.")
    forget_indices: list[str] | None = HfArg(
        default=None, help="Numbers of training rows to forget, or a file of them."
    )
    forget_column: str | None = HfArg(default=None, help="Column that marks the rows to forget.")
    forget_values: list[str] | None = HfArg(default=None, help="Its values in the rows to forget.")
    controls: bool = HfArg(default=True, help="Also run the controls with a random subspace and with no projection.")
    license: str | None = HfArg(default=None, help="Licence of the unlearned model, as an SPDX id.")
    use_peft: bool = HfArg(default=False, help="Unlearn in LoRA adapters; the base weights are not touched.")
    model_dtype: str = HfArg(
        default="float32",
        help="Precision of the original; bfloat16 goes with use_peft, under which it never moves.",
        metadata={"choices": ["float32", "bfloat16"]},
    )
    lora_r: int = HfArg(default=8, help="Rank of the adapters.")
    lora_alpha: int = HfArg(default=8, help="Scale of the adapters is alpha / r.")
    lora_dropout: float = HfArg(default=0.0, help="Dropout before the adapters (off while unlearning).")
    lora_target_modules: list[str] | None = HfArg(
        default=None, help="Modules that get an adapter; every linear layer but the head by default."
    )
    use_rslora: bool = HfArg(default=False, help="Scale by alpha / sqrt(r).")
    train_original: bool = HfArg(default=False, help="Train the original model when it is missing.")
    train_retrained: bool = HfArg(default=False, help="Train a reference without the forgotten rows.")
    references_dir: str = HfArg(default="references", help="Where trained models are kept for the next run.")
    model_size: str | None = HfArg(
        default=None, help="Size to train from scratch: nano, tiny, ... base; else model_name_or_path is fine-tuned."
    )
    train_epochs: float = HfArg(default=10.0, help="Epochs of training an original or retrained model.")
    train_learning_rate: float = HfArg(default=1e-3, help="Its learning rate.")
    train_batch_size: int = HfArg(default=128, help="Its batch size.")

    plan_class: ClassVar[type[TrainingPlan]]  # how models of this kind are made and read

    def request(self) -> Request | None:
        """What is to be forgotten, or None when nothing was named; UNSCError: more than one kind of selection."""
        if (self.forget_column is None) != (self.forget_values is None):
            raise UNSCError("forget_column: goes with forget_values; give both.")
        classes: list[str] | None = getattr(self, "forget_classes", None)
        ways = {"forget_classes": classes, "forget_indices": self.forget_indices, "forget_column": self.forget_column}
        given = [name for name, way in ways.items() if way is not None]
        if len(given) > 1:
            raise UNSCError(f"{given[1]}: given beside {given[0]}; choose one way to name the rows.")
        if classes:
            return Request(forget_classes=tuple(read_names(classes)))
        if self.forget_indices:
            return Request(indices=read_indices(self.forget_indices), option="forget_indices")
        if self.forget_column is not None:
            return Request(column_values={self.forget_column: self.forget_values or []}, option="forget_column")
        return None

    @property
    def quickstart(self) -> bool:
        """Whether the embedded example runs."""
        return False

    def plan(self, config: UNSCConfig) -> TrainingPlan:
        """How originals and references are trained: fields of the plan are named as options, without `train_`."""
        given = {name.removeprefix("train_"): value for name, value in vars(self).items()}
        given |= {
            "size": self.model_size,
            "base_model": None if self.model_size else self.model_name_or_path,
            "epochs": float(self.train_epochs),
            "learning_rate": float(self.train_learning_rate),
            "seed": config.seed,
            "text_columns": tuple(config.text_columns) if config.text_columns else None,
        }
        names = [field.name for field in fields(self.plan_class)]
        return self.plan_class(**{name: given[name] for name in names if name in given})

    def load_processor(self, name: str) -> Any:
        """Image processor or tokenizer of a model."""
        return self.plan_class.load_processor(name)


@dataclass
class ClassificationArguments(SharedArguments):
    """What to forget, from which classifier and data."""

    train_split: str = HfArg(default="train", help="Split with the training rows.")
    test_split: str | None = HfArg(default=None, help="Split with the test rows; found by itself.")
    forget_classes: list[str] | None = HfArg(default=None, help="Names or ids of classes to forget, or a .txt file.")
    statistics_dir: str | None = HfArg(default=None, help="Where activation statistics are kept for later requests.")

    def load(self, config: UNSCConfig) -> DatasetDict:
        """Splits "train" and "test"."""
        raise NotImplementedError

    def source(self) -> dict[str, Any]:
        """What is read of the data set."""
        splits = {"train_split": self.train_split, "test_split": self.test_split}
        return {"config_name": self.dataset_config_name, "cache_dir": self.cache_dir, **splits}


@dataclass
class ImageArguments(ClassificationArguments):
    """What to forget, from which image classifier and data. Without `dataset_name` the embedded quickstart runs."""

    patch_size: int = HfArg(default=4, help="Patch side in pixels, for model_size.")

    plan_class = ImagePlan

    @property
    def quickstart(self) -> bool:
        return self.dataset_name is None

    def request(self) -> Request | None:
        return super().request() or (Request(forget_classes=tuple(FORGET_CLASSES)) if self.quickstart else None)

    def load(self, config: UNSCConfig) -> DatasetDict:
        if self.dataset_name is None:
            return digits_dataset()
        return load_image_dataset(self.dataset_name, config.label_column, **self.source())

    def plan(self, config: UNSCConfig) -> TrainingPlan:
        return replace(PLAN, seed=config.seed) if self.quickstart else super().plan(config)


@dataclass
class TextArguments(ClassificationArguments):
    """What to forget, from which text classifier and data."""

    vocabulary_size: int = HfArg(default=4096, help="Tokens of the tokenizer learned for model_size.")
    max_length: int = HfArg(default=64, help="Longest text in tokens, for model_size.")

    plan_class = TextPlan

    def load(self, config: UNSCConfig) -> DatasetDict:
        if self.dataset_name is None:
            raise UNSCError("dataset_name: not given; name a Hub id, file or folder with texts and labels.")
        return load_text_dataset(self.dataset_name, config.label_column, config.text_columns, **self.source())


@dataclass
class LanguageArguments(SharedArguments):
    """Which answers to forget, from which language model.

    The forget split is forgotten whole, or the part of it that `forget_indices` or `forget_column` names.
    """

    forget_split: str | None = HfArg(default=None, help="Split with the rows to forget; 'forget' by default.")
    retain_split: str | None = HfArg(default=None, help="Split with rows to keep; 'retain' by default.")
    forget_config: str | None = HfArg(default=None, help="Configuration of rows to forget, such as TOFU's forget10.")
    retain_config: str | None = HfArg(default=None, help="Configuration with rows to keep.")
    unseen_config: str | None = HfArg(default=None, help="Configuration of rows that no model is trained on.")
    unseen_column: str | None = HfArg(default=None, help="Column that marks such rows in the retain split.")
    unseen_values: list[str] | None = HfArg(default=None, help="Its values in those rows.")
    eval_splits: list[str] | None = HfArg(default=None, help="More splits to report on; every other one by default.")
    prompt_template: str | None = HfArg(
        default=None, help="Prompt of a question, with {prompt}; the tokenizer's chat template by default."
    )
    system_prompt: str | None = HfArg(default=None, help="First message, for chat templates.")
    chat_template_kwargs: str | None = HfArg(default=None, help="More arguments of the chat template, as JSON.")
    chunk_size: int | None = HfArg(default=None, help="Tokens of the pieces that long texts are cut into.")
    objectives: list[str] | None = HfArg(default=None, help="Objectives to compare; the first one's model is written.")
    max_generated_rows: int = HfArg(default=300, help="Rows of each set that are answered for ROUGE-L.")
    max_new_tokens: int = HfArg(default=100, help="Longest answer.")
    vocabulary_size: int = HfArg(default=2048, help="Tokens of the tokenizer learned for model_size.")
    max_length: int = HfArg(default=256, help="Longest row in tokens, for model_size.")

    plan_class = LanguagePlan


def read_names(given: Sequence[str]) -> list[str]:
    """Class names from the command line, or from a .txt file with one a line; UNSCError where that has none."""
    if len(given) != 1 or not given[0].endswith(".txt"):
        return list(given)
    names = [line.strip() for line in _read(given[0], "forget_classes").splitlines() if line.strip()]
    if not names:
        raise UNSCError(f"forget_classes: {given[0]} names no class; write one in each line.")
    return names


def read_indices(given: Sequence[str]) -> tuple[int, ...]:
    """Row numbers from the command line, or from a text file; UNSCError for anything else."""
    file = len(given) == 1 and Path(given[0]).is_file()
    words = _read(given[0], "forget_indices").split() if file else list(given)
    for word in words:
        if not WHOLE_NUMBER.fullmatch(word):
            raise UNSCError(f"forget_indices: {word!r} is no row number and no file with row numbers.")
    return tuple(int(word) for word in words)


def _read(file: str, argument: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UNSCError(f"{argument}: cannot read {file} ({first_line(error)}).") from error


def check_model_dtype(arguments: SharedArguments) -> None:
    """Raise UNSCError where weights that are to be trained would be rounded."""
    if arguments.model_dtype not in ("float32", "bfloat16"):
        raise UNSCError(f"model_dtype: got {arguments.model_dtype!r}; choose from float32, bfloat16.")
    if arguments.model_dtype != "float32" and not arguments.use_peft:
        raise UNSCError(
            "model_dtype: bfloat16 would round small updates of the weights away; unlearn in adapters (use_peft), or "
            "leave it out."
        )


def load_original(arguments: SharedArguments, auto_class: Any, name: str) -> PreTrainedModel:
    """The original, in the precision that was asked for; UNSCError when nothing can be loaded from there."""
    return load_as(auto_class, name, "model_name_or_path", dtype=getattr(torch, arguments.model_dtype))


def lora_config(arguments: SharedArguments) -> LoraConfig | None:
    """The adapters that were asked for."""
    if not arguments.use_peft:
        return None
    return LoraConfig(
        r=arguments.lora_r, lora_alpha=arguments.lora_alpha, lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_target_modules, use_rslora=arguments.use_rslora,
    )  # fmt: skip
