"""What is written and printed about a finished run: `results.json`, card, pictures, report and summary."""

from __future__ import annotations

import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainingArguments

from ..config import UNSCConfig
from .finished_run import FinishedRun
from .model_card import versions, write_card
from .plots import plot_answers, plot_capacity, plot_per_class, plot_trade_off, plot_unlearning
from .report import FILE, write_run_report
from .run_folder import finish

# Options of `TrainingArguments` that belong in a card, besides all that `UNSCConfig` adds.
_TRAINING_OPTIONS = (
    "optim", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
)  # fmt: skip


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
    write_card(run, folder)
    results = finite(_results(run))
    write_run_report(results, folder)
    finish(folder, results)
    return run


def _draw(run: FinishedRun, folder: Path) -> list[tuple[str, str]]:
    """Draw the pictures; returns file names and captions."""
    if run.task == "text-generation":
        first = [("answers.png", "ROUGE-L of the answers on each set, before, after and when retrained")]
        plot_answers({name: answers.sets for name, answers in run.methods.items()}, folder / first[0][0])
        judged = {name: a for name, a in run.methods.items() if None not in (a.forget_quality, a.model_utility)}
        if judged:
            first.append(("trade_off.png", "Forget quality and model utility; larger points changed more kept tokens"))
            plot_trade_off(judged, folder / first[1][0])
    else:
        first = [("per_class_accuracy.png", "Test accuracy of each class")]
        shown = {"original": "before", "unsc": "after", "retrained": "retrained"}
        bars = {name: run.methods[key].per_class for key, name in shown.items() if key in run.methods}
        plot_per_class(bars, run.class_names, run.forgotten, folder / first[0][0])
    plot_unlearning(run.history, run.certificate["max_leak"], folder / "unlearning.png")
    plot_capacity(run.layers, folder / "capacity.png")
    course, capacity = "Accuracy and leak while unlearning", "Rank and capacity of each layer"
    return [*first, ("unlearning.png", course), ("capacity.png", capacity)]


def _results(run: FinishedRun) -> dict[str, Any]:
    return {
        "request": {
            "forget_classes": run.forgotten_names,
            "rows": run.rows,
            "dataset": run.origin.dataset,
            "model": run.origin.model or run.model_class,
        },
        "verdict": {"word": run.verdict, "reason": run.reason},
        "methods": {name: asdict(method) for name, method in run.methods.items()},
        "retrained_references": [asdict(reference) for reference in run.references],
        "caveats": list(run.caveats),
        "certificate": run.certificate,
        "adapter": run.adapter,
        "seconds": run.seconds,
        "steps": run.steps,
        **run.details,
        "subspace": [asdict(layer) for layer in run.layers],
        "frozen": run.frozen,
        "history": run.history,
        "hyperparameters": run.options,
        "command": run.origin.command,
        "requests": run.requests,
        "leak_budget": run.budget,
        "versions": versions(),
        "table": run.table.cells,
        "written": run.table.written,
        "table_note": run.table.note,
        "pictures": run.pictures,
    }


def print_run(run: FinishedRun, console: Console) -> None:
    """The table, the verdict and the certificate."""
    console.print(run.table.rich())
    certificate, drift = run.certificate, run.certificate["drift"]
    console.print(f"Verdict: {run.verdict} ({run.reason}).")
    console.print(
        f"Certificate: held-out leak {certificate['leak']:.3g}, logit drift {drift['relative']:.3g}, "
        f"{certificate['flips']} of {certificate['rows']} decisions on kept rows changed, so at most "
        f"{certificate['upper_95']:.2%} of such inputs with 95 % confidence; ended by {certificate['stop_reason']}."
    )
    for caveat in run.caveats:
        console.print(f"Note: {caveat}", markup=False)
    reasons = sorted(run.unreachable.items(), key=lambda item: -item[1])
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons) or "nothing"
    console.print(f"Frozen besides biases: {listed} (each by name in results.json).")
