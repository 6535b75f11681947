"""One self-contained HTML file: what was asked, what happened, tables, pictures inside; no script, nothing from a network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..utils.files import write_text

_TEMPLATES = Path(__file__).parent / "templates"


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
    """A part of a report under one heading; every text is escaped.

    Attributes:
        heading: of the section.
        paragraphs, points: sentences, and list items.
        table: text cells, first the header.
        text_columns: how many of its first columns hold words: set to the left, and wrapped.
        emphasised: first cells of the rows to set off.
        pictures: shown below.
        code: a command or versions, as they are.
    """

    heading: str
    paragraphs: Sequence[str] = ()
    points: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    text_columns: int = 1
    emphasised: Sequence[str] = ("UNSC",)
    pictures: Sequence[Picture] = ()
    code: str = ""


def write_report(
    path: Path, title: str, sections: Sequence[Section], verdict: str = "", reason: str = "", footer: str = ""
) -> Path:
    """Render the sections into `path`, whole or not at all."""
    environment = Environment(loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined)
    template = environment.get_template("report.html.jinja")
    write_text(path, template.render(title=title, verdict=verdict, reason=reason, sections=sections, footer=footer))
    return path
