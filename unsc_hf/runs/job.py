"""What classifiers' and language models' jobs share: their models, their options, and the folder they write into."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import ModelCard
from peft import PeftConfig
from rich.console import Console
from transformers import PreTrainedModel

from ..comparison.arguments import SharedArguments, load_original, lora_config
from ..comparison.references.language_models import LanguagePlan
from ..comparison.references.texts import TextPlan
from ..comparison.references.training import TrainingPlan, train_model
from ..config import UNSCConfig
from ..errors import UNSCError
from ..reporting.finished_run import Origin
from ..reporting.model_card import public_name, typed_command
from ..trainer.checkpoints import has_checkpoint


@dataclass(frozen=True)
class Job:
    """What is unlearned, and how."""

    load: Callable[[], PreTrainedModel]  # gives the original, anew at each call
    processor: Any  # image processor or tokenizer; None for rows that need none
    config: UNSCConfig
    origin: Origin
    retrained: Sequence[str]  # folders or Hub ids of models trained without the forgotten rows
    controls: bool
    peft_config: PeftConfig | None
    console: Console

    @classmethod
    def of(
        cls, arguments: SharedArguments, config: UNSCConfig, plan: TrainingPlan, train: Dataset, retain: Dataset,
        console: Console, retrained_name: str = "retrained", labels: Sequence[str] = (), column: str | None = None,
    ) -> Job:  # fmt: skip
        """The job that the command line describes; its models are given, found from an earlier run, or trained now.

        Raises:
            UNSCError: no original, or a reference that would start from a model which knows the forgotten rows.
        """
        folder, original = arguments.references_dir, arguments.model_name_or_path
        if arguments.quickstart or arguments.train_original:
            if plan.size is None and plan.base_model is None:
                raise UNSCError("train_original: needs model_size (from scratch) or model_name_or_path (to fine-tune).")
            console.print("Original model: training it, or taking it from an earlier run.")
            original = str(train_model(train, plan, folder, "original", labels, column))
        if original is None:
            raise UNSCError(
                "model_name_or_path: not given; name the model to unlearn, or use --train_original with --model_size."
            )
        references = list(arguments.retrained_model_name_or_path or [])
        if arguments.quickstart or arguments.train_retrained:
            if plan.size is None and not arguments.train_original:
                raise UNSCError(
                    "train_retrained: fine-tuning model_name_or_path would begin with a model that knows the forgotten "
                    "rows; give model_size, or use --train_original too, with a base model not trained on this data."
                )
            console.print("Retrained reference: training it, or taking it from an earlier run.")
            # A reference must read the same tokens as the original.
            vocabulary = train if isinstance(plan, TextPlan | LanguagePlan) and plan.base_model is None else None
            reference = train_model(retain, plan, folder, retrained_name, labels, column, vocabulary)
            references.append(str(reference))
        load = partial(load_original, arguments, plan.auto_class, original)
        origin = origin_of(
            original, arguments.dataset_name, arguments.license, typed_command(), unnamed="scikit-learn digits"
        )
        adapters, processor = lora_config(arguments), type(plan).load_processor(original)
        return cls(load, processor, config, origin, references, arguments.controls, adapters, console)


def origin_of(model: str, dataset: str | None, licence: str | None, command: str, unnamed: str) -> Origin:
    """How a card names model and data; without a licence the one in the model's own card."""
    card = Path(model) / "README.md"
    if licence is None and model and card.is_file():
        stated = ModelCard.load(card).data.to_dict().get("license")
        licence = stated if isinstance(stated, str) else None
    named = unnamed if dataset is None else public_name(dataset)
    return Origin(public_name(model), named, dataset is not None and not Path(dataset).exists(), licence, command)


@contextmanager
def removed_after_error(folder: str | Path) -> Iterator[None]:
    """When bad input ends the job, a folder made meanwhile is removed, unless a checkpoint in it could be resumed."""
    existed = Path(folder).exists()
    try:
        yield
    except UNSCError:
        if not existed and not has_checkpoint(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise
