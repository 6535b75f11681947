"""Tables and phrases of a run that card, report, `results.json` and terminal share, so that all say the same."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as RichTable

from ..evaluation.answers import Answers
from ..evaluation.verdict import LABELS, MethodResult
from .plots import objective_title

_CLASSIFIER_NOTE = (
    "Percent, except MIA AUC and seconds. AccDut and AccDrt: test accuracy on the forgotten and on the remaining "
    "classes (mean over classes). AccDf and AccDr: the same on training rows (up to 500 of each class). MIA AUC: how "
    "well an attacker tells forgotten training rows from unseen ones (0.5 is chance). Linear probe: test accuracy on "
    "the forgotten classes of a new head trained on this model's features. 10-shot prototype: the same after the mean "
    "feature of ten examples is written into the head. Decisions changed: share of kept test rows whose most likely "
    "remaining class is another than the original model's."
)

_LANGUAGE_NOTE = (
    "Percent, except loss and seconds. ROUGE-L: share of the true answer's words that the greedy answer gives in their "
    "order, on each set. Extraction: share of a forgotten answer that the model recites when it is given the tokens "
    "before it. Tokens changed: share of the retained answers' tokens where the most likely token is another than the "
    "original's. Each objective runs with and without projection onto the null space."
)

CERTIFICATE_NOTE = "Measured on retained rows: how far the model moved where it should stay the same."

STOP_REASONS = {
    "target": "reaching its target",
    "leak_budget": "the leak budget",
    "flips_budget": "the budget of changed decisions",
    "max_steps": "the step limit",
}

_MOST_NAMES = 20  # beyond this many classes their names are not listed

# Title, scale and format of each column of a comparison of classifiers.
_COLUMNS = {
    **{name: (name, 100, ".1f") for name in ("AccDut", "AccDrt", "AccDf", "AccDr")},
    "mia_auc": ("MIA AUC", 1, ".3f"),
    "probe_forget": ("linear probe", 100, ".1f"),
    "prototype_attack_10": ("10-shot prototype", 100, ".1f"),
    "flips": ("decisions changed", 100, ".2f"),
    "leak": ("leak", 100, ".2g"),
    "seconds": ("seconds", 1, ".0f"),
}

_SHORT_TITLES = {"10-shot prototype": "10-shot", "seconds": "sec"}


@dataclass(frozen=True)
class Table:
    """A comparison of models as text, for `print`."""

    cells: list[list[str]] = field(default_factory=list)  # first the header; the first cell of a row names the model
    written: str = LABELS["unsc"]  # first cell of the row of the unlearned model
    note: str = ""  # what the columns mean

    def rich(self) -> RichTable:
        """For a terminal of 80 columns, with shorter titles."""
        header, *rows = self.cells
        header = [_SHORT_TITLES.get(title, title) for title in header]
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
    cells = [["model", *(title for title, _, _ in _COLUMNS.values())]]
    for name, result in methods.items():
        shown = [_cell(getattr(result, column), scale, form) for column, (_, scale, form) in _COLUMNS.items()]
        cells.append([LABELS[name], *shown])
    return Table(cells, note=_CLASSIFIER_NOTE)


def answers_table(methods: Mapping[str, Answers], written: str) -> Table:
    """ROUGE-L on each set and extraction strength of each model; `written` is the method of the unlearned model."""
    names = list(next(iter(methods.values())).sets)
    cells = [
        [
            "model",
            *(f"ROUGE-L {name}" for name in names),
            "extraction forget",
            "loss forget",
            "tokens changed",
            "leak",
            "seconds",
        ]
    ]
    for method, answers in methods.items():
        forget = answers.sets["forget"]
        row = [_cell(answers.sets[name].get("rouge_l"), 100, ".1f") for name in names]
        row += [_cell(forget["extraction_strength"], 100, ".1f"), _cell(forget["loss"], 1, ".2f")]
        row += [_cell(answers.flips, 100, ".2f"), _cell(answers.leak, 100, ".2g"), _cell(answers.seconds, 1, ".0f")]
        cells.append([objective_title(method), *row])
    return Table(cells, objective_title(written), _LANGUAGE_NOTE)


def _cell(value: float | None, scale: float, form: str) -> str:
    return "–" if value is None else f"{scale * value:{form}}"


def forgotten_text(rows: int, classes: Sequence[str], digest: str = "") -> str:
    """What was forgotten: rows and class names, or a count and a hash where the names are many.

    Where single rows were forgotten there are no `classes`, and `digest` begins a hash over the rows.
    """
    text = f"{rows:,} training rows"
    if not classes:
        return text + (f" (not listed; their hash begins with {digest})" if digest else " (not listed)")
    if len(classes) <= _MOST_NAMES:
        return f"{text} of {'class' if len(classes) == 1 else 'classes'} {', '.join(classes)}"
    names = hashlib.sha256("\n".join(sorted(classes)).encode()).hexdigest()[:16]
    return f"{text} of {len(classes)} classes (SHA-256 of their sorted names begins with {names})"


def certificate_table(certificate: Mapping[str, Any]) -> list[list[str]]:
    """Rows of `Certificate.to_dict()`, first the header."""
    leaks, drift, budget = certificate["leak_per_layer"], certificate["drift"], certificate["max_leak"]
    worst = max(leaks, key=lambda name: leaks[name], default="")
    origin = "held out from the statistics" if certificate["held_out"] else "the caller's statistics may hold them"
    stopped = certificate["stop_reason"]
    return [
        ["what", "value"],
        [f"retained rows ({origin})", f"{certificate['rows']:,}"],
        ["decisions changed", f"{certificate['flips']:,}"],
        ["at most this share of such inputs changes, with 95 % confidence", f"{certificate['upper_95']:.2%}"],
        ["leak: relative change of layer outputs, all trained layers", f"{certificate['leak']:.3g}"],
        [f"worst layer, {worst}", f"{leaks.get(worst, 0.0):.3g}"],
        ["leak budget", "none" if budget is None else f"{budget:.3g}"],
        ["logit drift, relative", f"{drift['relative']:.3g}"],
        ["largest change of one logit", f"{drift['largest']:.3g}"],
        ["leak inside the unlearned network", _number(certificate["network_leak"])],
        ["amplification from layer to layer", _number(certificate["amplification"])],
        *(
            [
                f"merged into the base weights, stored as {dtype}: logit drift, decisions unchanged",
                f"{merged['relative']:.3g}, {merged['agreement']:.2%}",
            ]
            for dtype, merged in (certificate.get("merged") or {}).items()
        ),
        ["relative change of the trained weights", f"{certificate['relative_change']:.3g}"],
        ["unlearning ended by", STOP_REASONS.get(stopped, str(stopped))],
    ]


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"


def requests_table(requests: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """All requests served on a model, oldest first, under a header; none where there were none."""
    rows = [
        [str(entry["time"]), f"{entry['rows']:,}", entry["digest"], entry["salt"], f"{entry['leak']:.3g}"]
        for entry in requests
    ]
    return [["when", "rows", "salted SHA-256 begins with", "salt", "held-out leak"], *rows] if rows else []


def options_table(options: Mapping[str, Any]) -> list[list[str]]:
    """Options of a run by name, under a header."""
    return [["option", "value"], *([str(name), str(value)] for name, value in options.items())]
