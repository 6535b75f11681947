"""Tables and phrases of a run that card, report, `results.json` and terminal share, so that all say the same."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from ..evaluation.answers import Answers
from ..evaluation.verdict import LABELS, MethodResult
from .plots import objective_title

_CLASSIFIER_NOTE = (
    "Accuracies are means over classes, of test rows unless said otherwise. Decisions changed: share of kept test rows "
    "whose most likely remaining class is another than the original model's. Readable by a probe: test accuracy on the "
    "forgotten classes of a new head trained on this model's features. By 10 examples: the same after the mean feature "
    "of ten examples is written into the head. Training rows: up to 500 of each class. Attack: AUC of telling "
    "forgotten training rows from unseen ones (0.5 is chance). Leak: relative change of layer outputs on held-out rows."
)

_LANGUAGE_NOTE = (
    "ROUGE-L: share of the true answer's words that the greedy answer gives in their order, on each set. Tokens "
    "changed: share of the kept answers' tokens where the most likely token is another than the original's. Recited: "
    "share of a forgotten answer that the model recites when it is given the tokens before it. Each objective runs "
    "with and without projection onto the null space."
)

CERTIFICATE_NOTE = "Measured on retained rows: how far the model moved where it should stay the same."

STOP_REASONS = {
    "target": "reaching its target",
    "leak_budget": "the leak budget",
    "flips_budget": "the budget of changed decisions",
    "max_steps": "the step limit",
    "plateau": "making no more progress for a while",
    "stopped": "another callback",
}

_MOST_NAMES = 20  # beyond this many classes their names are not listed
DECIDING = 5  # the first columns of a table: the model, what it knows, what it changed, what is left


def percent(share: float | None) -> str:
    """A share in percent with one decimal where it needs one; a dash where it was not measured."""
    if share is None or not math.isfinite(share):
        return "–"
    if 0 < share < 0.0005:
        return "< 0.1 %"
    return f"{100 * share:.1f}".removesuffix(".0") + " %"


def counted(number: int, what: str) -> str:
    """A number of things, such as "1 row" or "2,000 rows"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _number(value: float | None, form: str = ".3g", unknown: str = "–") -> str:
    return unknown if value is None or not math.isfinite(value) else f"{value:{form}}"


@dataclass(frozen=True)
class Table:
    """A comparison of models as text; `print` shows the columns that decide."""

    cells: list[list[str]] = field(default_factory=list)  # first the header; the first cell of a row names the model
    written: str = LABELS["unsc"]  # first cell of the row of the unlearned model
    note: str = ""  # what the columns mean

    def rich(self) -> RichTable:
        """The columns that decide, for a terminal of 80 columns."""
        header, *rows = [row[:DECIDING] for row in self.cells]
        table = RichTable(header[0], box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for title in header[1:]:
            table.add_column(title, justify="right", vertical="bottom", max_width=12)
        for row in rows:
            table.add_row(*row, style="bold" if row[0] == self.written else None)
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=80, force_jupyter=False, force_terminal=False).print(self.rich())
        return text.getvalue().rstrip()


def classifier_table(methods: Mapping[str, MethodResult]) -> Table:
    """Accuracies and attacks of each model; those of the forgotten rows where no class was forgotten whole."""
    whole = any(result.AccDut is not None for result in methods.values())
    cells = [
        [
            LABELS[name],
            percent(result.AccDut if whole else result.AccDf),
            percent(result.AccDrt),
            percent(result.flips),
            percent(result.probe_forget) if whole else _number(result.mia_auc, ".2f"),
            percent(result.prototype_attack_10),
            percent(result.AccDf),
            percent(result.AccDr),
            _number(result.mia_auc, ".3f"),
            percent(result.leak),
            _number(result.seconds, ".0f"),
        ]
        for name, result in methods.items()
    ]
    left = "readable by a probe" if whole else "found by an attack"
    header = ["model", "accuracy on forgotten", "accuracy on kept", "decisions changed", left, "by 10 examples",
              "forgotten training rows", "kept training rows", "attack", "leak", "seconds"]  # fmt: skip
    return Table([header, *cells], note=_CLASSIFIER_NOTE)


def answers_table(methods: Mapping[str, Answers], written: str) -> Table:
    """ROUGE-L on each set and extraction strength of each model; `written` is the method of the unlearned model."""
    others = [name for name in next(iter(methods.values())).sets if name not in ("forget", "retain")]
    header = ["model", "ROUGE-L on forgotten", "ROUGE-L on kept", "tokens changed", "recited"]
    header += [*(f"ROUGE-L on {name.replace('_', ' ')}" for name in others), "loss on forgotten", "leak", "seconds"]
    cells = []
    for method, answers in methods.items():
        rouge = {name: percent(metrics.get("rouge_l")) for name, metrics in answers.sets.items()}
        forget = answers.sets["forget"]
        row = [
            rouge["forget"],
            rouge.get("retain", "–"),
            percent(answers.flips),
            percent(forget["extraction_strength"]),
        ]
        row += [*(rouge[name] for name in others), _number(forget["loss"], ".2f"), percent(answers.leak)]
        cells.append([objective_title(method), *row, _number(answers.seconds, ".0f")])
    return Table([header, *cells], objective_title(written), _LANGUAGE_NOTE)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Text cells as a Markdown table, first the header."""
    header, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([header, "|---" * len(rows[0]) + "|", *body]) + "\n"


def forgotten_text(rows: int, classes: Sequence[str], digest: str = "") -> str:
    """What was forgotten: rows and class names, or a count and a hash where the names are many.

    Where single rows were forgotten there are no `classes`, and `digest` begins a hash over the rows.
    """
    text = counted(rows, "training row")
    if not classes:
        return text + (f" (not listed; their hash begins with {digest})" if digest else " (not listed)")
    if len(classes) <= _MOST_NAMES:
        return f"{text} of {'class' if len(classes) == 1 else 'classes'} {', '.join(classes)}"
    names = hashlib.sha256("\n".join(sorted(classes)).encode()).hexdigest()[:16]
    return f"{text} of {len(classes)} classes (SHA-256 of their sorted names begins with {names})"


def certificate_table(certificate: Mapping[str, Any]) -> list[list[str]]:
    """Rows of `Certificate.to_dict()`, first the header."""
    leaks, drift, budget = certificate["leak_per_layer"], certificate["drift"], certificate["max_leak"]
    worst = max(leaks, key=lambda name: math.inf if leaks[name] is None else leaks[name], default="")
    unseen = certificate.get("unseen")
    origin = "held out from the statistics" if certificate["held_out"] else "the caller's statistics may hold them"
    rows = "kept rows that the original never saw" if unseen else f"kept training rows ({origin})"
    such = "inputs" if unseen else "training rows"
    stopped = certificate["stop_reason"]
    return [
        ["what", "value"],
        [rows, f"{certificate['rows']:,}"],
        ["decisions changed", f"{certificate['flips']:,}"],
        [f"at most this share of such {such} changes, with 95 % confidence", f"{certificate['upper_95']:.2%}"],
        ["leak: relative change of layer outputs, all trained layers", _number(certificate["leak"])],
        [f"worst layer, {worst}", _number(leaks.get(worst, 0.0))],
        ["leak budget", "none" if budget is None else f"{budget:.3g}"],
        ["logit drift, relative", _number(drift["relative"])],
        ["largest change of one logit", _number(drift["largest"])],
        ["leak inside the unlearned network", _number(certificate["network_leak"], unknown="not measured")],
        ["amplification from layer to layer", _number(certificate["amplification"], unknown="not measured")],
        *(
            [
                f"merged into the base weights, stored as {dtype}: logit drift, decisions unchanged",
                f"{_number(merged['relative'])}, {_number(merged['agreement'], '.2%')}",
            ]
            for dtype, merged in (certificate.get("merged") or {}).items()
        ),
        ["relative change of the trained weights", _number(certificate["relative_change"])],
        ["unlearning ended by", STOP_REASONS.get(stopped, str(stopped))],
    ]


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
