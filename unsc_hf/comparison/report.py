"""The files of a comparison of methods: JSON for programs, a table, pictures, and one HTML report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.audits import AUDITS
from ..reporting.model_card import escape, versions
from ..reporting.report import FILE, Section, write_report
from ..reporting.results import finite
from ..utils.files import write_text
from .plots import pictures
from .summary import markdown, summarise, table, title

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
        write_text(place / "table.md", f"# Forgetting {escape(name)}: methods compared\n\n{markdown(table(summary))}")
        verdict = summary["rows"].get("unsc", {"verdict": ""})["verdict"]
        sections = [
            Section("What was asked", _asked(result, outcome)),
            Section("Results", _UNITS, table=table(summary)),
            Section("Pictures", pictures=pictures(outcome, place)),
            Section("Verdicts", [_WORDS], table=_verdicts(summary), text_columns=3),
            Section("Settings", [_CHOSEN], table=_settings(outcome), text_columns=3),
        ]
        write_page(place, f"Forgetting {name}: methods compared", sections, command, verdict and f"UNSC: {verdict}")
    write_json(folder / "comparison.json", {**result, "summaries": summaries}, command)
    return summaries


def _asked(result: Mapping[str, Any], outcome: Mapping[str, Any]) -> list[str]:
    references, names = len(outcome["references"]), dict(enumerate(outcome["classes"]))
    classes = [names.get(c, str(c)) for c in outcome["forgotten"]]
    listed = ", ".join(classes[:20]) + ("." if len(classes) <= 20 else ", and others.")
    asked = [
        f"{len(classes)} of {len(names)} classes were to be forgotten: {listed}",
        f"{len(outcome['runs']) - 1} methods, {len(result['seeds'])} seeds, {references} retrained models; "
        f"{result['test_rows']} test rows. Hyper-parameters were chosen on {result['validation_rows']} validation "
        "rows, with three tries for each method.",
    ]
    few = f"With {references} retrained models no verdict can be 'removed', and no band is drawn; it takes three."
    return [*asked, few] if references < 3 else asked


def _verdicts(summary: Mapping[str, Any]) -> list[list[str]]:
    rows = [["method", "verdict", "audits outside the retrained models' band"]]
    for name, row in summary["rows"].items():
        if row["verdict"]:
            rows.append([title(name), row["verdict"], ", ".join(row["outside"]) or "–"])
    return rows


def _settings(outcome: Mapping[str, Any]) -> list[list[str]]:
    def words(settings: Mapping[str, Any]) -> str:
        return ", ".join(f"{name} {value}" for name, value in settings.items()) or "defaults"

    rows = [["method", "chosen", "tries on validation rows: AccDut / AccDrt"]]
    for name, chosen in outcome["settings"].items():
        tries = [f"{words(t['settings'])}: {t['AccDut']:.1%} / {t['AccDrt']:.1%}" for t in chosen["tries"]]
        rows.append([title(name), words(chosen["chosen"]), "; ".join(tries) or "nothing to choose"])
    return [*rows, *([AUDITS[name].title, one["summary"], "audit"] for name, one in outcome["calibration"].items())]
