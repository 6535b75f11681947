"""The whole run behind the classification recipes: data, models, unlearning, comparison, files."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from peft import LoraConfig
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from .comparison import Comparison, compare
from .config import UNSCConfig
from .data import WHOLE_NUMBER, Request, class_names, read_labels, resolve_classes, unreadable_rows_by_number
from .errors import UNSCError, first_line
from .evaluation.report import format_table
from .fingerprint import data_fingerprint
from .html_report import FILE as REPORT
from .image_classification import ImagePlan, load_image_dataset, load_image_processor
from .loading import load_as
from .model_card import CardContent, public_name, typed_command, versions, write_card
from .plots import plot_capacity, plot_per_class, plot_unlearning
from .quickstart import FORGET_CLASSES, PLAN, digits_dataset
from .requests import open_statistics, record_request, remaining_leak, without_request
from .run_report import write_run_report
from .saving import check_output_folder, finish, has_checkpoint, move_model
from .statistics import ActivationStatistics, settle
from .text_classification import TextPlan, load_text_dataset, load_tokenizer
from .trainer import UNSCTrainer
from .training import TrainingPlan, train_model

TASKS = {
    AutoModelForImageClassification: "image-classification",
    AutoModelForSequenceClassification: "text-classification",
}
PICTURES = (
    ("per_class_accuracy.png", "Test accuracy of each class"),
    ("unlearning.png", "Accuracy and leak while unlearning"),
    ("capacity.png", "Rank and capacity of each layer"),
)
TABLE_NOTE = (
    "Percent, except MIA AUC and seconds. AccDut and AccDrt: test accuracy on the forgotten and on the remaining classes; AccDf and "
    "AccDr: the same on training rows. MIA AUC: how well an attacker tells forgotten training rows from unseen ones (0.5 is chance). "
    "Linear probe: test accuracy on the forgotten classes of a new head on this model's features; 10-shot prototype: after the mean "
    "feature of ten examples is written into the head."
)
# What fits a terminal of 80 columns; cards spell it out.
_HEADINGS = ("model", "AccDut", "AccDrt", "AccDf", "AccDr", "MIA", "probe", "10-shot", "leak", "sec")
_NAMES = {"masked": "masked logit", "random_projector": "random space"}
_OPTIONS_IN_CARD = (
    "subspace_rule", "energy", "subspace_rank", "subspace_ratio", "subspace_merge", "target_modules", "pseudo_labels",
    "pseudo_label_temperature", "objective", "retain_weight", "retain_dropout", "retain_mixing",
    "feature_erasure", "target_forget_accuracy", "max_leak", "check_steps", "max_rows_per_class",
    "max_samples_per_class", "max_statistics_memory", "sketch_size", "optim", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "max_steps", "per_device_train_batch_size",
    "gradient_accumulation_steps", "seed",
)  # fmt: skip


@dataclass
class SharedArguments:
    """What to forget, from which model and data: options of every recipe."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The original: a Hub id or folder."})
    retrained_model_name_or_path: list[str] | None = field(
        default=None,
        metadata={"help": "Models trained without the forgotten rows; three or more allow a full verdict."},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, local data file or folder, or save_to_disk folder."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where data sets are cached."})
    forget_indices: list[str] | None = field(
        default=None, metadata={"help": "Training rows to forget, by number, or a text file with one number a line."}
    )
    forget_column: str | None = field(default=None, metadata={"help": "Column that marks the rows to forget."})
    forget_values: list[str] | None = field(default=None, metadata={"help": "Its values in the rows to forget."})
    controls: bool = field(default=True, metadata={"help": "Also run the random projector and the unprojected update."})
    license: str | None = field(default=None, metadata={"help": "Licence of the unlearned model, as an SPDX id."})
    use_peft: bool = field(
        default=False, metadata={"help": "Unlearn in LoRA adapters; the base weights are not touched."}
    )
    model_dtype: str = field(
        default="float32",
        metadata={
            "help": "Precision in which the original is loaded; bfloat16 goes with use_peft, under which it never moves.",
            "choices": ["float32", "bfloat16"],
        },
    )
    lora_r: int = field(default=8, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=8, metadata={"help": "Scale of the adapters is alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters (off while unlearning)."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter; every linear layer but the head by default."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r)."})
    train_original: bool = field(default=False, metadata={"help": "Train the original model when it is missing."})
    train_retrained: bool = field(default=False, metadata={"help": "Train a reference without the forgotten rows."})
    references_dir: str = field(
        default="references", metadata={"help": "Where trained models are kept for the next run."}
    )
    model_size: str | None = field(
        default=None,
        metadata={
            "help": "Model to train from scratch: nano, tiny, small, ... base; else model_name_or_path is fine-tuned."
        },
    )
    train_epochs: float = field(default=10.0, metadata={"help": "Epochs of training an original or retrained model."})
    train_learning_rate: float = field(default=1e-3, metadata={"help": "Its learning rate."})
    train_batch_size: int = field(default=128, metadata={"help": "Its batch size."})

    def request(self) -> Request | None:
        """What is to be forgotten, or None when nothing was named.

        Raises:
            UNSCError: more than one kind of selection, or row numbers that cannot be read.
        """
        rows = (self.forget_column, self.forget_values)
        if (rows[0] is None) != (rows[1] is None):
            raise UNSCError("forget_column: goes with forget_values; give both.")
        names = ("forget_classes", "forget_indices", "forget_column")
        given = [name for name in names if getattr(self, name, None) is not None]
        if len(given) > 1:
            raise UNSCError(f"{given[1]}: given beside {given[0]}; choose one way to name the rows.")
        classes = getattr(self, "forget_classes", None)
        if classes:
            return Request(forget_classes=tuple(read_names(classes)))
        if self.forget_indices:
            return Request(indices=read_indices(self.forget_indices), option="forget_indices")
        if self.forget_column is not None:
            return Request(column_values={self.forget_column: self.forget_values or []}, option="forget_column")
        return None

    def base_plan(self, seed: int) -> dict[str, Any]:
        """Fields that all training plans share."""
        return {
            "size": self.model_size,
            "base_model": None if self.model_size else self.model_name_or_path,
            "epochs": float(self.train_epochs),
            "learning_rate": float(self.train_learning_rate),
            "batch_size": self.train_batch_size,
            "seed": seed,
        }


@dataclass
class ClassificationArguments(SharedArguments):
    """What to forget, from which classifier and data."""

    train_split: str = field(default="train", metadata={"help": "Split with the training rows."})
    test_split: str | None = field(default=None, metadata={"help": "Split with the test rows; found by itself."})
    forget_classes: list[str] | None = field(
        default=None, metadata={"help": "Classes to forget, by name or id, or a .txt file of them."}
    )
    statistics_dir: str | None = field(
        default=None,
        metadata={"help": "Keep activation statistics here: later requests on the resulting model need no new pass."},
    )

    # What differs between modalities.

    auto_class: ClassVar[Any] = None

    @property
    def quickstart(self) -> bool:
        """Whether the embedded example runs."""
        return False

    def load(self, config: UNSCConfig) -> DatasetDict:
        """Splits "train" and "test"."""
        raise NotImplementedError

    def plan(self, config: UNSCConfig) -> TrainingPlan:
        """How originals and references are trained."""
        raise NotImplementedError

    def load_processor(self, name: str) -> Any:
        """Image processor or tokenizer of a model."""
        raise NotImplementedError


@dataclass
class ImageArguments(ClassificationArguments):
    """What to forget, from which image classifier and data. Without `dataset_name` the embedded quickstart runs."""

    patch_size: int = field(default=4, metadata={"help": "Patch side in pixels, for model_size."})
    train_crop_padding: int = field(default=0, metadata={"help": "Augmentation: random crops after this padding."})
    train_flip: bool = field(default=False, metadata={"help": "Augmentation: random mirror images."})

    auto_class: ClassVar[Any] = AutoModelForImageClassification

    @property
    def quickstart(self) -> bool:
        return self.dataset_name is None

    def request(self) -> Request | None:
        return super().request() or (Request(forget_classes=tuple(FORGET_CLASSES)) if self.quickstart else None)

    def load(self, config: UNSCConfig) -> DatasetDict:
        if self.dataset_name is None:
            return digits_dataset()
        return load_image_dataset(
            self.dataset_name,
            self.dataset_config_name,
            config.label_column,
            self.train_split,
            self.test_split,
            self.cache_dir,
        )

    def plan(self, config: UNSCConfig) -> TrainingPlan:
        if self.quickstart:
            return replace(PLAN, seed=config.seed)
        return ImagePlan(
            **self.base_plan(config.seed),
            patch_size=self.patch_size,
            crop_padding=self.train_crop_padding,
            flip=self.train_flip,
        )

    def load_processor(self, name: str) -> Any:
        return load_image_processor(name)


@dataclass
class TextArguments(ClassificationArguments):
    """What to forget, from which text classifier and data."""

    vocabulary_size: int = field(default=4096, metadata={"help": "Tokens of the tokenizer learned for model_size."})
    max_length: int = field(default=64, metadata={"help": "Longest text in tokens, for model_size."})

    auto_class: ClassVar[Any] = AutoModelForSequenceClassification

    def load(self, config: UNSCConfig) -> DatasetDict:
        if self.dataset_name is None:
            raise UNSCError(
                "dataset_name: not given; name a Hub id or a local data file or folder with text and labels."
            )
        return load_text_dataset(
            self.dataset_name,
            self.dataset_config_name,
            config.label_column,
            config.text_columns,
            self.train_split,
            self.test_split,
            self.cache_dir,
        )

    def plan(self, config: UNSCConfig) -> TrainingPlan:
        return TextPlan(
            **self.base_plan(config.seed),
            text_columns=tuple(config.text_columns) if config.text_columns else None,
            vocabulary_size=self.vocabulary_size,
            max_length=self.max_length,
        )

    def load_processor(self, name: str) -> Any:
        return load_tokenizer(name)


def read_names(given: Sequence[str]) -> list[str]:
    """Class names from the command line: themselves, or a .txt file with one in each line.

    Raises:
        UNSCError: a file that cannot be read, or that is empty.
    """
    words = list(given)
    if len(words) != 1 or not words[0].endswith(".txt"):
        return words
    try:
        lines = Path(words[0]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UNSCError(f"forget_classes: cannot read {words[0]} ({first_line(error)}).") from error
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise UNSCError(f"forget_classes: {words[0]} names no class; write one in each line.")
    return names


def read_indices(given: Sequence[str]) -> tuple[int, ...]:
    """Row numbers from the command line: numbers, or a text file with one a line.

    Raises:
        UNSCError: something that is neither.
    """
    words = list(given)
    if len(words) == 1 and Path(words[0]).is_file():
        try:
            words = Path(words[0]).read_text(encoding="utf-8").split()
        except (OSError, UnicodeDecodeError) as error:
            raise UNSCError(f"forget_indices: cannot read {words[0]} ({first_line(error)}).") from error
    for word in words:
        if not WHOLE_NUMBER.fullmatch(word):
            raise UNSCError(f"forget_indices: {word!r} is no row number and no file with row numbers.")
    return tuple(int(word) for word in words)


def check_model_dtype(arguments: SharedArguments) -> None:
    """Raise UNSCError where weights that are to be trained would be rounded."""
    if arguments.model_dtype not in ("float32", "bfloat16"):
        raise UNSCError(f"model_dtype: got {arguments.model_dtype!r}; choose from float32, bfloat16.")
    if arguments.model_dtype != "float32" and not arguments.use_peft:
        raise UNSCError(
            "model_dtype: bfloat16 would round small updates of the weights away; unlearn in adapters (use_peft), or leave it out."
        )


def load_original(arguments: SharedArguments, auto_class: Any, name: str) -> PreTrainedModel:
    """The original, in the precision that was asked for.

    Raises:
        UNSCError: when nothing can be loaded from there.
    """
    return load_as(auto_class, name, "model_name_or_path", dtype=getattr(torch, arguments.model_dtype))


def lora_config(arguments: SharedArguments) -> LoraConfig | None:
    """The adapters that were asked for."""
    if not arguments.use_peft:
        return None
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_target_modules,
        use_rslora=arguments.use_rslora,
    )


def run(arguments: ClassificationArguments, config: UNSCConfig, console: Console | None = None) -> Comparison:
    """Unlearn, compare, and write everything into `config.output_dir`.

    Raises:
        UNSCError: input that cannot work; nothing is written then.
    """
    console = console or Console()
    if arguments.dataset_name is None and (arguments.model_name_or_path or arguments.retrained_model_name_or_path):
        raise UNSCError(
            "dataset_name: not given; a model needs the data it was trained on (without both, the quickstart runs)."
        )
    check_model_dtype(arguments)
    check_output_folder(str(config.output_dir))
    data = arguments.load(config)
    with unreadable_rows_by_number(data, config.text_columns):
        return _run(arguments, config, data, console)


def _run(arguments: ClassificationArguments, config: UNSCConfig, data: DatasetDict, console: Console) -> Comparison:
    request = arguments.request()
    if request is None:
        raise UNSCError(
            "forget_classes: not given; name the classes to forget, by name or id (or rows, by forget_indices or forget_column)."
        )
    names = class_names(data["train"], config.label_column) or _names_of_model(arguments.model_name_or_path)
    present = read_labels(data["train"], config.label_column).tolist()
    if request.forget_classes is not None:
        ids = resolve_classes(request.forget_classes, names, present)
        request = Request(forget_classes=tuple(ids))
        request.split(data["test"], config.label_column)  # refuses classes that the test rows lack
    labels = names or [str(i) for i in range(max(present) + 1)]
    forget, retain = request.split(data["train"], config.label_column)

    original, references = _models(arguments, config, data["train"], retain, request, labels, console)
    model = load_original(arguments, arguments.auto_class, original)
    processor = arguments.load_processor(original)
    existed = Path(str(config.output_dir)).exists()
    try:
        statistics = _stored_statistics(arguments, config, model, forget, retain, processor)
        result = compare(
            model,
            data["train"],
            data["test"],
            request,
            config,
            processor,
            references,
            statistics=statistics,
            controls=arguments.controls,
            peft_config=lora_config(arguments),
            unseen=data.get("validation"),
        )
    except UNSCError:
        if not existed and not has_checkpoint(str(config.output_dir)):
            shutil.rmtree(str(config.output_dir), ignore_errors=True)
        raise
    requests: list[dict[str, Any]] = []
    if statistics is not None:
        assert arguments.statistics_dir is not None
        statistics = record_request(statistics, arguments.statistics_dir, result.trainer, forget)
        requests = statistics.requests
    move_model(result.trainer, Path(str(config.output_dir)))
    if result.trainer.is_world_process_zero():
        _write(arguments, config, result, original, labels, forget, requests)
        if statistics is not None:
            assert arguments.statistics_dir is not None
            settle(arguments.statistics_dir, statistics.fingerprint.weights)
        _print(console, result, config)
    result.trainer.accelerator.wait_for_everyone()  # nobody leaves before everything is written
    if config.push_to_hub:
        result.trainer.push_to_hub()
    return result


def _stored_statistics(
    arguments: ClassificationArguments,
    config: UNSCConfig,
    model: PreTrainedModel,
    forget: Dataset,
    retain: Dataset,
    processor: Any,
) -> ActivationStatistics | None:
    """What `statistics_dir` holds without the rows to forget; it also shortens the leak budget by what was spent."""
    if arguments.statistics_dir is None:
        return None
    if arguments.use_peft:
        raise UNSCError(
            "statistics_dir: goes with full weights; adapters leave the model the statistics belong to as it was."
        )
    statistics = open_statistics(arguments.statistics_dir, model, config, forget, retain, processor)
    config.max_leak = remaining_leak(statistics, config.max_leak)
    return without_request(statistics, model, config, forget, retain, processor)


def _names_of_model(name: str | None) -> list[str] | None:
    """Class names from a model's config, for data sets that hold bare ids; None where they are only LABEL_0, LABEL_1."""
    if name is None:
        return None
    try:
        found = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UNSCError(f"model_name_or_path: cannot load {name!r}: {first_line(error)}") from error
    names = [str(found.id2label[i]) for i in range(found.num_labels)]
    return None if names == [f"LABEL_{i}" for i in range(len(names))] else names


def _models(
    arguments: ClassificationArguments,
    config: UNSCConfig,
    train: Dataset,
    retain: Dataset,
    request: Request,
    labels: Sequence[str],
    console: Console,
) -> tuple[str, list[str]]:
    """Original and references: given, found from an earlier run, or trained now."""
    plan = arguments.plan(config)
    folder, label_column = arguments.references_dir, config.label_column
    original = arguments.model_name_or_path
    if arguments.quickstart or arguments.train_original:
        if plan.size is None and plan.base_model is None:
            raise UNSCError("train_original: needs model_size (from scratch) or model_name_or_path (to fine-tune).")
        console.print("Original model: training it, or taking it from an earlier run.")
        original = str(train_model(train, plan, folder, "original", labels, label_column))
    if original is None:
        raise UNSCError(
            "model_name_or_path: not given; name the model to unlearn, or use --train_original with --model_size."
        )
    references = list(arguments.retrained_model_name_or_path or [])
    if arguments.quickstart or arguments.train_retrained:
        if plan.size is None and not arguments.train_original:
            raise UNSCError(
                "train_retrained: fine-tuning model_name_or_path would begin with a model that knows the forgotten rows; "
                "give model_size, or use --train_original too, with a backbone that was not trained on this data."
            )
        console.print("Retrained reference: training it, or taking it from an earlier run.")
        name = "retrained-without-" + (
            "-".join(map(str, request.forget_classes[:10])) if request.forget_classes else "rows"
        )
        vocabulary = train if isinstance(plan, TextPlan) and plan.base_model is None else None
        references.append(str(train_model(retain, plan, folder, name, labels, label_column, vocabulary)))
    return original, references


def _license(arguments: ClassificationArguments, original: str) -> str | None:
    if arguments.license is not None:
        return arguments.license
    card = Path(original) / "README.md"
    found = ModelCard.load(card).data.to_dict().get("license") if card.is_file() else None
    return found if isinstance(found, str) else None


def _write(
    arguments: ClassificationArguments,
    config: UNSCConfig,
    result: Comparison,
    original: str,
    names: Sequence[str],
    forget: Dataset,
    requests: list[dict[str, Any]],
) -> None:
    """Everything a run leaves beside its model; `results.json` comes last and marks the run as finished."""
    trainer, folder = result.trainer, Path(str(config.output_dir))
    plan = trainer.plan
    assert plan is not None
    forgotten, quickstart = [names[i] for i in trainer.forgotten_classes], arguments.quickstart
    bars = {name: result.methods[key].per_class for key, name in (("original", "before"), ("unsc", "after"))}
    if "retrained" in result.methods:
        bars["retrained"] = result.methods["retrained"].per_class
    plot_per_class(bars, names, trainer.forgotten_classes, folder / PICTURES[0][0])
    plot_unlearning(trainer.state.log_history, config.max_leak, folder / PICTURES[1][0])
    plot_capacity(plan.subspace.report(), folder / PICTURES[2][0])

    dataset = "scikit-learn digits" if quickstart else public_name(str(arguments.dataset_name))
    options = {**options_of(config), "pseudo_labels": trainer.pseudo_label_strategy}
    command = typed_command()
    content = CardContent(
        model_name=str(config.hub_model_id or folder.resolve().name),
        base_model=public_name(original),
        model_class=trainer.model_class,
        adapter=arguments.use_peft,
        base_dtype=arguments.model_dtype,
        forgotten=forgotten,
        forgotten_rows=len(forget),
        forgotten_digest=data_fingerprint(forget)[:16],
        task=TASKS[arguments.auto_class],
        dataset=dataset,
        dataset_on_hub=not quickstart and not Path(str(arguments.dataset_name)).exists(),
        methods=result.methods,
        references=len(result.references),
        certificate=result.certificate,
        verdict=result.verdict,
        reason=result.reason,
        hyperparameters=options,
        pictures=PICTURES,
        report=REPORT,
        license=_license(arguments, original),
        requests=requests,
        command=command,
    )
    trainer.card_content = content
    write_card(content, folder)
    results = {
        "request": {
            "forget_classes": forgotten,
            "rows": len(forget),
            "dataset": dataset,
            "model": public_name(original),
        },
        "verdict": {"word": result.verdict, "reason": result.reason},
        "methods": {name: asdict(method) for name, method in result.methods.items()},
        "retrained_references": [asdict(reference) for reference in result.references],
        "certificate": result.certificate,
        "adapter": {"r": arguments.lora_r, "alpha": arguments.lora_alpha} if arguments.use_peft else None,
        "seconds": {**plan.seconds, "unlearning": trainer.unlearning_seconds},
        "steps": trainer.state.global_step,
        "erased": [asdict(one) for one in trainer.erased],
        "subspace": plan.subspace.to_dict(),
        "frozen": plan.selection.frozen,
        "history": [entry for entry in trainer.state.log_history if "leak" in entry],
        "hyperparameters": options,
        "command": command,
        "requests": requests,
        "versions": versions(),
        "table": format_table(result.methods),
        "table_note": TABLE_NOTE,
        "pictures": PICTURES,
    }
    results = finite(results)
    write_run_report(results, folder)
    finish(folder, results)


def frozen_line(trainer: UNSCTrainer) -> str:
    """What unlearning could not reach in this model, in a sentence."""
    assert trainer.plan is not None
    reasons = trainer.plan.selection.unprotectable()
    listed = "; ".join(f"{count} x {reason}" for reason, count in sorted(reasons.items(), key=lambda item: -item[1]))
    return f"Frozen besides biases: {listed or 'nothing'} (each by name in results.json)."


def options_of(config: UNSCConfig, more: Sequence[str] = ()) -> dict[str, Any]:
    """Options that belong in a card; enum members as their values."""
    values = {name: getattr(config, name) for name in (*_OPTIONS_IN_CARD, *more)}
    return {name: getattr(value, "value", value) for name, value in values.items()}


def finite(value: Any) -> Any:
    """The same structure with NaN and infinity as null: JSON has neither."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print(console: Console, result: Comparison, config: UNSCConfig) -> None:
    _, *rows = format_table(result.methods)
    table = Table(
        title="After unlearning (percent; MIA: 0.5 is chance)", box=SIMPLE, pad_edge=False, collapse_padding=True
    )
    for i, column in enumerate(_HEADINGS):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    for name, row in zip(result.methods, rows, strict=True):
        table.add_row(_NAMES.get(name, row[0]), *row[1:], style="bold" if name == "unsc" else None)
    console.print(table)
    certificate = result.certificate
    console.print(f"Verdict: {result.verdict} ({result.reason}).")
    console.print(
        f"Certificate: held-out leak {certificate['leak']:.3g}, logit drift {certificate['drift']['relative']:.3g}, "
        f"{certificate['drift']['agreement']:.1%} of decisions unchanged on {certificate['rows']} retained rows."
    )
    console.print(frozen_line(result.trainer))
    console.print(f"Model, card, pictures and results: {config.output_dir}")
