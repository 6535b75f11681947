"""What is written and printed about a finished run: `results.json`, card, pictures, report and summary."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..config import UNSCConfig
from ..evaluation.verdict import LABELS
from . import plots
from .finished_run import FinishedRun
from .model_card import versions, write_card
from .report import FILE, write_run_report
from .run_folder import finish
from .summary import decision, sentences

# Options of `TrainingArguments` that belong in a card, besides all that `UNSCConfig` adds.
_TRAINING_OPTIONS = (
    "optim", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
)  # fmt: skip

_MODELS = {"original": "before", "unsc": "after", "retrained": "retrained"}  # what most pictures show


def options_of(config: UNSCConfig) -> dict[str, Any]:
    """All options of unlearning and those of training that belong in a card; enum members as their values."""
    inherited = {f.name for f in fields(TrainingArguments)}
    names = [f.name for f in fields(config) if f.name not in inherited]
    values = {name: getattr(config, name) for name in (*names, *_TRAINING_OPTIONS)}
    values["objective_args"] = config.objective_options
    return {name: getattr(value, "value", value) for name, value in values.items()}


def finite(value: Any) -> Any:
    """The same structure with NaN and infinity as null: JSON has neither."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_run(run: FinishedRun, folder: Path, model_name: str | None = None) -> FinishedRun:
    """Write everything that a run leaves beside its model into `folder`; returns the run with the names of its files.

    `results.json` comes last and marks the run as finished. The card takes the folder's name where no model is named.
    """
    pictures = _draw(run, folder)
    run = replace(run, model_name=model_name or folder.resolve().name, pictures=pictures, report=FILE)
    results = finite(_results(run))
    run = replace(run, summary=[decision(results), *sentences(results)])
    write_card(run, folder)
    write_run_report(results, folder)
    finish(folder, results)
    return run


def _draw(run: FinishedRun, folder: Path) -> list[tuple[str, str]]:
    """Draw the pictures; returns file names and captions, those that decide first."""
    drawn: list[tuple[str, str]] = []

    def draw(file: str, caption: str, plot: Callable[..., Path], *content: Any) -> None:
        plot(*content, folder / file)
        drawn.append((file, caption))

    methods = run.methods
    if run.task == "text-generation":
        sets = {name: answers.sets for name, answers in methods.items()}
        draw("answers.png", "ROUGE-L of the answers, before, after and when retrained", plots.plot_answers, sets)
        judged = {name: a for name, a in methods.items() if None not in (a.forget_quality, a.model_utility)}
        if judged:
            caption = "Forget quality against utility (upper right is best) and against changed tokens (upper left)"
            draw("trade_off.png", caption, plots.plot_trade_off, judged)
    else:
        shown = {title: methods[key] for key, title in _MODELS.items() if key in methods}
        answers = {title: result.answers for title, result in shown.items() if result.answers}
        if answers:
            draw("answered.png", "What forgotten test rows are called", plots.plot_answered, answers, run.class_names)
        points = {
            LABELS[name]: (result.flips, result.probe_forget)
            for name, result in methods.items()
            if name != "original" and None not in (result.flips, result.probe_forget)
        }
        if points:
            caption = "What each model changes, and what it still shows: low and left is best"
            draw("methods.png", caption, plots.plot_methods, points)
        bars, names = {title: result.per_class for title, result in shown.items()}, (run.class_names, run.forgotten)
        draw("per_class_accuracy.png", "Test accuracy of classes", plots.plot_per_class, bars, *names)
    course = (run.history, run.certificate["max_leak"])
    draw("unlearning.png", "Accuracy and leak while unlearning", plots.plot_unlearning, *course)
    return drawn


def _results(run: FinishedRun) -> dict[str, Any]:
    same = ("certificate", "adapter", "seconds", "steps", "frozen", "history", "requests", "pictures")
    origin = run.origin
    return {
        "request": {
            "forget_classes": run.forgotten_names,
            "rows": run.rows,
            "dataset": origin.dataset,
            "model": origin.model or run.model_class,
        },
        "verdict": {"word": run.verdict, "reason": run.reason},
        "methods": {name: asdict(method) for name, method in run.methods.items()},
        "retrained_references": [asdict(reference) for reference in run.references],
        "caveats": list(run.caveats),
        **{name: getattr(run, name) for name in same},
        **run.details,
        "subspace": [asdict(layer) for layer in run.layers],
        "hyperparameters": run.options,
        "command": origin.command,
        "leak_budget": run.budget,
        "versions": versions(),
        "table": run.table.cells,
        "written": run.table.written,
        "table_note": run.table.note,
    }
