"""The whole run behind the classification recipes: data, models, unlearning, comparison, files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from ..config import UNSCConfig
from ..data.columns import class_names, read_labels
from ..data.inputs import unreadable_rows_by_number
from ..data.selection import Request, resolve_classes
from ..errors import UNSCError, first_line
from ..evaluation.verdict import format_table
from ..nullspace.statistics import ActivationStatistics
from ..nullspace.storage import settle
from ..reporting.html import FILE as REPORT
from ..reporting.model_card import CardContent, public_name, typed_command, versions, write_card
from ..reporting.plots import plot_capacity, plot_per_class, plot_unlearning
from ..reporting.report import write_run_report
from ..reporting.results import finite, options_of
from ..reporting.run_folder import check_output_folder, finish, move_model
from ..trainer.checkpoints import has_checkpoint
from ..trainer.sequence import open_statistics, record_request, remaining_leak, without_request
from ..trainer.trainer import UNSCTrainer
from ..utils.fingerprint import data_fingerprint
from .arguments import ClassificationArguments, check_model_dtype, load_original, lora_config
from .controls import Comparison, compare
from .references.texts import TextPlan
from .references.training import train_model

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
