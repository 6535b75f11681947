"""Reports as one self-contained HTML file of texts, tables and pictures, without scripts and without a network.

The report of one run is made from `results.json` and the pictures beside it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..evaluation.signatures import run_signatures
from ..utils.files import write_text
from .tables import CERTIFICATE_NOTE, STOP_REASONS, certificate_table, forgotten_text, options_table, requests_table

FILE = "report.html"

_VERDICTS = {
    "suppressed": "The output is gone. The features may still tell the forgotten data apart.",
    "removed": "The output is gone, and every attack lies within the spread of several retrained models.",
    "not forgotten": "This model must not be published as one that forgot.",
    "not judged": "Nothing is claimed.",
}

_ACCURACIES = {
    "AccDut": "Test accuracy on the forgotten classes",
    "AccDrt": "Test accuracy on the remaining classes",
    "AccDf": "Accuracy on the rows to forget",
    "probe_forget": "Accuracy of a linear probe on the forgotten classes",
}


@dataclass(frozen=True)
class Picture:
    """A PNG file and what it shows."""

    path: Path
    caption: str

    @property
    def data(self) -> str:
        return base64.b64encode(self.path.read_bytes()).decode("ascii")


@dataclass(frozen=True)
class Section:
    """A part of a report under one heading; every text is escaped."""

    heading: str
    paragraphs: Sequence[str] = ()
    points: Sequence[str] = ()  # list items
    table: Sequence[Sequence[str]] = ()  # text cells, first the header
    text_columns: int = 1  # how many of its first columns hold words, which are wrapped and aligned to the left
    emphasised: Sequence[str] = ("UNSC",)  # first cells of the rows to highlight
    pictures: Sequence[Picture] = ()
    code: str = ""  # a command or versions, shown as they are

    @property
    def empty(self) -> bool:
        return not (any(self.paragraphs) or self.points or self.table or self.pictures or self.code)


def write_report(path: Path, title: str, sections: Sequence[Section], verdict: str = "", footer: str = "") -> Path:
    """Render the sections into `path`, whole or not at all."""
    source = (Path(__file__).parent / "templates" / "report.html.jinja").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    write_text(path, template.render(title=title, verdict=verdict, sections=sections, footer=footer))
    return path


def write_run_report(results: Mapping[str, Any], folder: str | Path) -> Path:
    """Write `report.html` from `results.json` into a run's folder, which holds the pictures that it names."""
    folder = Path(folder)
    request, verdict, reason = results["request"], results["verdict"]["word"], results["verdict"]["reason"]
    forgotten = forgotten_text(request["rows"], [str(name) for name in request.get("forget_classes") or ()])
    saved = [(folder / file, caption) for file, caption in results.get("pictures") or ()]
    signs = run_signatures(results)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    sections = [
        Section("What was asked", [f"That {request['model']}, trained on {request['dataset']}, forget {forgotten}."]),
        Section("What happened", points=_course(results)),
        Section("Verdict", [f"{verdict.capitalize()}: {reason}.", _VERDICTS.get(verdict, "")]),
        Section(
            "Compared with retraining and trivial controls",
            [str(results.get("table_note") or "")],
            table=results["table"],
            emphasised=(str(results.get("written") or "UNSC"),),
        ),
        Section("Failure signatures", [] if signs else ["None found."], points=signs),
        Section("Pictures", pictures=[Picture(path, caption) for path, caption in saved if path.is_file()]),
        Section("Certificate", [CERTIFICATE_NOTE], table=certificate_table(results["certificate"])),
        Section("Requests served on this model", table=requests_table(results.get("requests") or ())),
        Section("Options", table=options_table(results["hyperparameters"])),
        Section("How it was made", code=f"{results['command']}\n\n{versions}"),
    ]
    return write_report(
        folder / FILE,
        f"Unlearning report: {folder.resolve().name}",
        [section for section in sections if not section.empty],
        verdict,
        footer="Made by unsc_hf. This file holds everything it shows and loads nothing from a network.",
    )


def _course(results: Mapping[str, Any]) -> list[str]:
    """What changed, and how unlearning ended: one sentence a point."""
    methods = results["methods"]
    points = [
        _change(text, {name: method.get(key) for name, method in methods.items()}) for key, text in _ACCURACIES.items()
    ]
    points.append(_changed_decisions(methods))
    for questions in methods.get("original", {}).get("sets", {}):
        rouge = {name: method.get("sets", {}).get(questions, {}).get("rouge_l") for name, method in methods.items()}
        points.append(_change(f"ROUGE-L on {questions.replace('_', ' ')}", rouge))
    steps = f"{results['steps']} steps, " if "steps" in results else ""
    seconds = sum(value for value in results["seconds"].values() if value)
    stopped = results["certificate"]["stop_reason"]
    end = STOP_REASONS.get(stopped, str(stopped))
    points.append(f"Unlearning took {steps}{seconds:.0f} seconds with the statistics. It ended by {end}.")
    return [point for point in (*points, *(results.get("caveats") or ())) if point]


def _changed_decisions(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """How many decisions on kept rows, or tokens of kept answers, changed; empty where it was not measured."""
    unsc, retrained = methods.get("unsc", {}), methods.get("retrained", {})
    if unsc.get("flips") is None:
        return ""
    beside = "" if retrained.get("flips") is None else f"; retraining changes {retrained['flips']:.1%}"
    if "negative_flips" not in unsc:
        return f"Most likely token changed at {unsc['flips']:.1%} of the tokens of kept answers{beside}."
    wrong = f"{unsc['negative_flips']:.1%} from right to wrong"
    return f"Decisions changed on kept test rows: {unsc['flips']:.1%} ({wrong}){beside}."


def _change(text: str, values: Mapping[str, float | None]) -> str:
    """A value before and after unlearning, and in the retrained model; empty where it was not measured."""
    before, after, retrained = (values.get(name) for name in ("original", "unsc", "retrained"))
    if before is None or after is None:
        return ""
    beside = "" if retrained is None else f"; {retrained:.1%} when retrained"
    return f"{text}: {before:.1%} before, {after:.1%} after{beside}."
