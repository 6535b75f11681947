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
from ..models.loading import load_config
from ..reporting.finished_run import Origin
from ..reporting.model_card import public_name, typed_command
from ..reporting.run_folder import RESULTS, UNFINISHED
from ..trainer.checkpoints import has_checkpoint
from ..utils.reserve import reserved


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
        cls, arguments: SharedArguments, config: UNSCConfig, auto_class: Any, processor: Any, original: str,
        retrained: Sequence[str], console: Console,
    ) -> Job:  # fmt: skip
        """The job that the command line describes, with its original and retrained models."""
        load = partial(load_original, arguments, auto_class, original)
        origin = _origin(arguments, original)
        return cls(load, processor, config, origin, retrained, arguments.controls, lora_config(arguments), console)


def _origin(arguments: SharedArguments, original: str) -> Origin:
    name, embedded = str(arguments.dataset_name), arguments.quickstart
    return Origin(
        model=public_name(original),
        dataset="scikit-learn digits" if embedded else public_name(name),
        dataset_on_hub=not embedded and not Path(name).exists(),
        license=arguments.license or stated_license(original),
        command=typed_command(),
    )


def stated_license(model: str) -> str | None:
    """The licence in the card of a model's folder."""
    card = Path(model) / "README.md"
    licence = ModelCard.load(card).data.to_dict().get("license") if card.is_file() else None
    return licence if isinstance(licence, str) else None


def original_and_references(
    arguments: SharedArguments,
    plan: TrainingPlan,
    train: Dataset,
    retain: Dataset,
    console: Console,
    retrained_name: str = "retrained",
    labels: Sequence[str] = (),
    label_column: str | None = None,
) -> tuple[str, list[str]]:
    """Folder or Hub id of the original and of each retrained model: given, found from an earlier run, or trained now.

    Raises:
        UNSCError: no original, or a reference that would start from a model which knows the forgotten rows.
    """
    folder, original = arguments.references_dir, arguments.model_name_or_path
    references = list(arguments.retrained_model_name_or_path or [])
    for name in references:  # before anything long begins
        load_config(name, "retrained_model_name_or_path")
    if arguments.quickstart or arguments.train_original:
        if plan.size is None and plan.base_model is None:
            raise UNSCError("train_original: needs model_size (from scratch) or model_name_or_path (to fine-tune).")
        console.print("Original model: training it, or taking it from an earlier run.")
        original = str(train_model(train, plan, folder, "original", labels, label_column))
    if original is None:
        raise UNSCError(
            "model_name_or_path: not given; name the model to unlearn, or use --train_original with --model_size."
        )
    if arguments.quickstart or arguments.train_retrained:
        if plan.size is None and not arguments.train_original:
            raise UNSCError(
                "train_retrained: fine-tuning model_name_or_path would begin with a model that knows the forgotten "
                "rows; give model_size, or use --train_original too, with a base model not trained on this data."
            )
        console.print("Retrained reference: training it, or taking it from an earlier run.")
        # A reference must read the same tokens as the original.
        vocabulary = train if isinstance(plan, TextPlan | LanguagePlan) and plan.base_model is None else None
        references.append(str(train_model(retain, plan, folder, retrained_name, labels, label_column, vocabulary)))
    return original, references


@contextmanager
def job_folder(folder: str | Path) -> Iterator[None]:
    """Keep the folder for this job. When bad input ends it, a folder made meanwhile is removed, unless it holds a
    checkpoint or a model.

    Raises:
        UNSCError: a folder that cannot be written, or that another job holds.
    """
    existed = Path(folder).exists()
    try:
        with reserved(folder):
            yield
    except UNSCError:
        kept = has_checkpoint(folder) or any(Path(folder, name).exists() for name in (RESULTS, UNFINISHED))
        if not existed and not kept:
            shutil.rmtree(folder, ignore_errors=True)
        raise
