"""What is written and printed about a finished run: `results.json`, card, pictures, report and summary."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as RichTable
from transformers import TrainingArguments

from ..config import UNSCConfig
from ..evaluation.answers import Answers
from ..evaluation.verdict import LABELS, MethodResult, format_table
from .html import FILE as REPORT
from .model_card import CardContent, versions, write_card
from .plots import objective_title, plot_answers, plot_capacity, plot_per_class, plot_unlearning
from .report import write_run_report
from .run_folder import finish

# Options of `TrainingArguments` that belong in a card, besides all that `UNSCConfig` adds.
_TRAINING_OPTIONS = (
    "optim", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "seed",
)  # fmt: skip
_CLASSIFIER_NOTE = (
    "Percent, except MIA AUC and seconds. AccDut and AccDrt: test accuracy on the forgotten and on the remaining "
    "classes; AccDf and AccDr: the same on training rows. MIA AUC: how well an attacker tells forgotten training rows "
    "from unseen ones (0.5 is chance). Linear probe: test accuracy on the forgotten classes of a new head on this "
    "model's features; 10-shot prototype: after the mean feature of ten examples is written into the head."
)
_ANSWERS_NOTE = (
    "Percent, except loss and seconds. ROUGE-L: share of the true answer's words that the greedy answer brings in "
    "their order, on each set. Extraction: share of a forgotten answer that the model recites from the tokens before "
    "it. 'Unprojected': without confinement to the null space."
)


@dataclass(frozen=True)
class Table:
    """A comparison of models as text, for `print`.

    Attributes:
        cells: rows of text, first the header; the first cell of a row names the model.
        written: first cell of the row of the unlearned model.
        note: what the columns mean.
    """

    cells: list[list[str]]
    written: str
    note: str

    def rich(self) -> RichTable:
        """For a terminal."""
        header, *rows = self.cells
        table = RichTable(box=SIMPLE, show_edge=False, padding=0)
        table.add_column(header[0])
        for i, title in enumerate(header[1:], 1):  # long titles are wrapped, figures are not
            widest = max(len(text) for text in (*title.split(), *(row[i] for row in rows)))
            table.add_column(title, justify="right", width=widest)
        for row in rows:
            table.add_row(*row, style="bold" if row[0] == self.written else None)
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=120).print(self.rich())
        return f"{text.getvalue().rstrip()}\n\n{self.note}"


def classifier_table(methods: Mapping[str, MethodResult]) -> Table:
    """Accuracies and attacks of each model."""
    return Table(format_table(methods), LABELS["unsc"], _CLASSIFIER_NOTE)


def answers_table(methods: Mapping[str, Answers], written: str) -> Table:
    """ROUGE-L on each set and extraction strength of each model; `written` is the method of the unlearned model."""
    names = list(next(iter(methods.values())).sets)
    cells = [["model", *(f"ROUGE-L {name}" for name in names), "extraction forget", "loss forget", "leak", "seconds"]]
    for method, answers in methods.items():
        sets, leak, seconds = answers.sets, answers.leak, answers.seconds
        row = [f"{100 * sets[name]['rouge_l']:.1f}" if "rouge_l" in sets[name] else "–" for name in names]
        row += [f"{100 * sets['forget']['extraction_strength']:.1f}", f"{sets['forget']['loss']:.2f}"]
        row += ["–" if leak is None else f"{100 * leak:.2g}", "–" if seconds is None else f"{seconds:.0f}"]
        cells.append([objective_title(method), *row])
    return Table(cells, objective_title(written), _ANSWERS_NOTE)


@dataclass(frozen=True)
class Origin:
    """What was unlearned, as a card names it: no paths of this machine."""

    model: str  # Hub id, or last part of a folder
    dataset: str
    dataset_on_hub: bool  # whether `dataset` is a Hub id
    license: str | None  # SPDX id
    command: str  # what makes the run again


@dataclass(frozen=True)
class FinishedRun:
    """A finished run in plain data; everything that is written about it comes from here."""

    origin: Origin
    task: str  # the Hub's name of what the model does
    model_class: str
    base_dtype: str  # precision of the model under adapters
    adapter: dict[str, Any] | None  # rank and alpha of the adapters
    forgotten: list[int]  # ids of the classes that were forgotten whole
    class_names: Sequence[str]  # by id
    rows: int  # number of forgotten rows
    digest: str  # beginning of a hash over them
    methods: dict[str, Any]  # metrics of each model by name, in the order of the table
    references: list[Any]  # metrics of each retrained model
    certificate: dict[str, Any]
    verdict: str
    reason: str
    table: Table
    options: dict[str, Any]  # as they were given
    seconds: dict[str, float]
    steps: int
    layers: list[Any]  # rows of `Subspace.report()`
    frozen: dict[str, str]  # reason by weight that was not trained
    unreachable: dict[str, int]  # number of frozen weights by reason, without biases
    history: list[dict[str, Any]]  # the checks while unlearning
    requests: list[dict[str, Any]] = field(default_factory=list)  # served on this model, oldest first
    budget: dict[str, float | None] | None = None  # of the leak over all requests: what was given, and what is spent
    details: dict[str, Any] = field(default_factory=dict)  # more entries of `results.json`

    @property
    def forgotten_names(self) -> list[str]:
        """Names of the classes that were forgotten whole."""
        return [self.class_names[c] for c in self.forgotten]


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


def write_run(run: FinishedRun, folder: Path, model_name: str | None = None) -> CardContent:
    """Write everything that a run leaves beside its model; `results.json` comes last and marks it as finished.

    The card names the model `model_name`, or as the folder; what it says is returned.
    """
    pictures = _draw(run, folder)
    content = _card(run, model_name or folder.resolve().name, pictures)
    write_card(content, folder)
    results = finite(_results(run, pictures))
    write_run_report(results, folder)
    finish(folder, results)
    return content


def _draw(run: FinishedRun, folder: Path) -> list[tuple[str, str]]:
    """Draw the pictures; returns file names and captions."""
    if run.task == "text-generation":
        pictures = [("answers.png", "ROUGE-L of the answers on each set, before, after and when retrained")]
        plot_answers({name: answers.sets for name, answers in run.methods.items()}, folder / pictures[0][0])
    else:
        pictures = [("per_class_accuracy.png", "Test accuracy of each class")]
        shown = {"original": "before", "unsc": "after", "retrained": "retrained"}
        bars = {name: run.methods[key].per_class for key, name in shown.items() if key in run.methods}
        plot_per_class(bars, run.class_names, run.forgotten, folder / pictures[0][0])
    pictures.append(("unlearning.png", "Accuracy and leak while unlearning"))
    plot_unlearning(run.history, run.certificate["max_leak"], folder / pictures[1][0])
    pictures.append(("capacity.png", "Rank and capacity of each layer"))
    plot_capacity(run.layers, folder / pictures[2][0])
    return pictures


def _card(run: FinishedRun, model_name: str, pictures: Sequence[tuple[str, str]]) -> CardContent:
    classifier = run.task != "text-generation"
    return CardContent(
        model_name=model_name,
        base_model=run.origin.model,
        model_class=run.model_class,
        adapter=run.adapter is not None,
        base_dtype=run.base_dtype,
        forgotten=run.forgotten_names,
        forgotten_rows=run.rows,
        forgotten_digest=run.digest,
        task=run.task,
        dataset=run.origin.dataset,
        dataset_on_hub=run.origin.dataset_on_hub,
        methods=run.methods if classifier else {},
        table=run.table.cells,
        written=run.table.written,
        references=len(run.references),
        certificate=run.certificate,
        verdict=run.verdict,
        reason=run.reason,
        hyperparameters=run.options,
        pictures=pictures,
        report=REPORT,
        license=run.origin.license,
        requests=run.requests,
        command=run.origin.command,
    )


def _results(run: FinishedRun, pictures: Sequence[tuple[str, str]]) -> dict[str, Any]:
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
        "pictures": pictures,
    }


def print_run(run: FinishedRun, console: Console) -> None:
    """The table, the verdict and the certificate."""
    console.print(run.table.rich())
    certificate, drift = run.certificate, run.certificate["drift"]
    console.print(f"Verdict: {run.verdict} ({run.reason}).")
    console.print(
        f"Certificate: held-out leak {certificate['leak']:.3g}, logit drift {drift['relative']:.3g}, "
        f"{drift['agreement']:.1%} of decisions unchanged on {certificate['rows']} retained rows; "
        f"ended by {certificate['stop_reason']}."
    )
    reasons = sorted(run.unreachable.items(), key=lambda item: -item[1])
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons) or "nothing"
    console.print(f"Frozen besides biases: {listed} (each by name in results.json).")
