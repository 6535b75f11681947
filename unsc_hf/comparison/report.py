"""The files of a comparison of methods: JSON, tables for three kinds of readers, pictures, and one HTML report."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.audits import AUDITS
from ..reporting.model_card import escape, versions
from ..reporting.report import FILE, Picture, Section, write_report
from ..reporting.results import finite
from ..utils.files import write_text
from .plots import plot_attack, plot_changes, plot_depth, plot_front, plot_relearning
from .summary import ORIGINAL, latex, markdown, numbers, summarise, table, title, value

# File, drawing, what must have been measured for it, caption.
_PICTURES = (
    ("front.png", plot_front, None, "What was kept against what was forgotten; bars are 95 % intervals over seeds."),
    ("per_class.png", plot_changes, None,
     "Change of every retained class against the original, mean over seeds, in points."),
    ("depth.png", plot_depth, "probe.layer_00",
     "What a linear probe still reads of the forgotten classes in each layer."),
    ("relearning.png", plot_relearning, "relearning.area",
     "How fast the forgotten classes come back from ten examples of each class."),
    ("attack.png", plot_attack, "membership.loss_auc",
     "The loss attack on the forgotten training rows; the dotted line is chance."),
)  # fmt: skip

_WORDS = (
    "'suppressed': the output is gone. 'removed': besides, every audit lies within two standard deviations of at least "
    "three retrained models (never less than a point). 'not forgotten': more than 1 % of the forgotten classes' test "
    "rows are still recognised."
)
_UNITS = (
    "Percent, mean ± half the 95 % interval over seeds; the membership attack is an AUC (0.5 is chance).",
    "The last row says how often an audit accuses a retrained model when the band is made of the other ones: an audit "
    "that retraining fails is no evidence.",
)
_DISTANCE = "In standard deviations of the retrained models' own spread; between -2 and 2 is within their band."
_CHOSEN = "Of each method's tries the one that kept most on validation rows among those that forgot."


def write_json(file: Path, content: Mapping[str, Any], command: str) -> None:
    """Write results with the command and the versions that made them."""
    everything = {**content, "command": command, "versions": versions()}
    write_text(file, json.dumps(finite(everything), indent=1))


def write_page(folder: Path, heading: str, sections: Sequence[Section], command: str, verdict: str = "") -> None:
    """Write `report.html`, which ends with how it was made."""
    made = command + "\n\n" + ", ".join(f"{name} {version}" for name, version in versions().items())
    footer = "Made by unsc_hf. This file holds everything it shows and needs no network."
    write_report(folder / FILE, heading, [*sections, Section("How it was made", code=made)], verdict, footer=footer)


def write_comparison(result: Mapping[str, Any], folder: Path, command: str) -> dict[str, Any]:
    """Write `comparison.json`, and for each forget set a folder of tables, pictures and `report.html`.

    Returns:
        The summaries by forget set, as `summary.summarise` gives them.
    """
    summaries = {name: summarise(outcome) for name, outcome in result["forget_sets"].items()}
    for name, summary in summaries.items():
        outcome, place = result["forget_sets"][name], folder / name
        rows = table(summary)
        sheet = io.StringIO()
        csv.writer(sheet, lineterminator="\n").writerows(numbers(summary))
        write_text(place / "table.md", f"# Forgetting {escape(name)}: methods compared\n\n{markdown(rows)}")
        write_text(place / "table.csv", sheet.getvalue())
        write_text(place / "table.tex", latex(rows))
        pictures = [
            Picture(draw(outcome, place / file), caption)
            for file, draw, audit, caption in _PICTURES
            if audit is None or value(outcome["runs"][ORIGINAL][0], audit) is not None
        ]
        verdict = summary["rows"].get("unsc", {"verdict": ""})["verdict"]
        sections = _sections(result, outcome, summary, pictures)
        heading = f"Forgetting {name}: methods compared"
        write_page(place, heading, sections, command, verdict and f"UNSC: {verdict}")
    write_json(folder / "comparison.json", {**result, "summaries": summaries}, command)
    return summaries


def _sections(
    result: Mapping[str, Any], outcome: Mapping[str, Any], summary: Mapping[str, Any], pictures: list[Picture]
) -> list[Section]:
    """The report of one forget set."""
    signs: dict[str, list[str]] = {}
    for method, of_method in summary["signatures"].items():
        for sign in of_method:
            signs.setdefault(sign, []).append(title(method))
    points = [f"{sign} ({', '.join(methods)})" for sign, methods in signs.items()]
    calibration = outcome.get("calibration", {})
    strength = [f"{AUDITS[name].title}: {choice['summary']}." for name, choice in calibration.items() if name in AUDITS]
    chosen = "Chosen on the original and validation rows, and the same for every model."
    return [
        Section("What was asked", _asked(result, outcome)),
        Section("Results", list(_UNITS), table=table(summary)),
        Section("Verdicts", [_WORDS], table=_verdicts(summary), text_columns=3),
        Section("How strong the audits are", [chosen if strength else "Nothing was chosen."], points=strength),
        Section("Pictures", pictures=pictures),
        Section("Distance to the retrained models", [_DISTANCE], table=_distances(summary)),
        Section("Failure signatures", [] if points else ["None found."], points=points),
        Section("Settings", [_CHOSEN], table=_settings(outcome), text_columns=3),
    ]


def _asked(result: Mapping[str, Any], outcome: Mapping[str, Any]) -> list[str]:
    references = len(outcome["references"])
    classes = [outcome["classes"][c] if c < len(outcome["classes"]) else str(c) for c in outcome["forgotten"]]
    listed = ", ".join(classes[:20]) + ("." if len(classes) <= 20 else ", and others.")
    asked = [
        f"{len(classes)} of {len(outcome['classes'])} classes were to be forgotten: {listed}",
        f"{len(outcome['runs']) - 1} methods, {len(result['seeds'])} seeds, {references} retrained models; "
        f"{result['test_rows']} test rows. Hyper-parameters were chosen on {result['validation_rows']} validation "
        "rows, with three tries for each method.",
    ]
    few = f"With {references} retrained models no verdict can be 'removed', and no band is drawn; it takes three."
    return [*asked, few] if references < 3 else asked


def _verdicts(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = [["method", "verdict", "audits outside the retrained models' band"]]
    for method, row in summary["rows"].items():
        if row["verdict"]:
            rows.append([title(method), row["verdict"], ", ".join(row["outside"]) or "–"])
    return rows


def _distances(summary: Mapping[str, Any]) -> list[list[str]]:
    audits = {f"{name}.{audit.headline}" for name, audit in AUDITS.items()}
    paths = {path: words for path, words in summary["columns"].items() if path in audits or path == "AccDrt"}
    rows = [["method", *paths.values()]]
    for method, row in summary["rows"].items():
        cells = [row["cells"][path]["z"] for path in paths]
        rows.append([title(method), *("–" if z is None else f"{z:+.1f}" for z in cells)])
    return rows


def _settings(outcome: Mapping[str, Any]) -> list[list[str]]:
    def words(settings: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {setting}" for name, setting in settings.items()) or "defaults"

    rows = [["method", "chosen", "tries on validation rows: AccDut / AccDrt"]]
    for method, chosen in outcome["settings"].items():
        tries = [f"{words(t['settings'])}: {t['AccDut']:.1%} / {t['AccDrt']:.1%}" for t in chosen["tries"]]
        rows.append([title(method), words(chosen["chosen"]), "; ".join(tries) or "nothing to choose"])
    return rows
