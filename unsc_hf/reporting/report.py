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
from .summary import course, decision, sentences
from .tables import CERTIFICATE_NOTE, DECIDING, certificate_table, forgotten_text, options_table, requests_table

FILE = "report.html"


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

    heading: str  # none for the part above the contents
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
    """Render the sections that hold something into `path`, whole or not at all, with a list of contents."""
    source = (Path(__file__).parent / "templates" / "report.html.jinja").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(source)
    shown = [section for section in sections if not section.empty]
    write_text(path, template.render(title=title, verdict=verdict, sections=shown, footer=footer))
    return path


def write_run_report(results: Mapping[str, Any], folder: str | Path) -> Path:
    """Write `report.html` from `results.json` into a run's folder, which holds the pictures that it names."""
    folder = Path(folder)
    request, verdict, reason = results["request"], results["verdict"]["word"], results["verdict"]["reason"]
    forgotten = forgotten_text(request["rows"], [str(name) for name in request.get("forget_classes") or ()])
    saved = [(folder / file, caption) for file, caption in results.get("pictures") or ()]
    signs = run_signatures(results)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    ours = (str(results.get("written") or "UNSC"),)
    deciding = [row[:DECIDING] for row in results["table"]]
    sections = [
        Section("", [decision(results), *sentences(results)], table=deciding, emphasised=ours),
        Section("What was asked", [f"That {request['model']}, trained on {request['dataset']}, forget {forgotten}."]),
        Section("Pictures", pictures=[Picture(path, caption) for path, caption in saved if path.is_file()]),
        Section("What happened", points=course(results)),
        Section("Why this verdict", [f"{verdict.capitalize()}: {reason}."]),
        Section(
            "Compared with retraining and trivial controls", [str(results.get("table_note") or "")],
            table=results["table"], emphasised=ours,
        ),
        Section("What to look out for", [] if signs else ["None of the known signs of a failure was found."],
                points=signs),
        Section("Certificate", [CERTIFICATE_NOTE], table=certificate_table(results["certificate"])),
        Section("Requests served on this model", table=requests_table(results.get("requests") or ())),
        Section("Options", table=options_table(results["hyperparameters"])),
        Section("How it was made", code=f"{results['command']}\n\n{versions}"),
    ]  # fmt: skip
    title = f"Unlearning report: {folder.resolve().name}"
    footer = "Made by unsc_hf. This file holds everything it shows and loads nothing from a network."
    return write_report(folder / FILE, title, sections, verdict, footer)
