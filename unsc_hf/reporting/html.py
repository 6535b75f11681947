"""One self-contained HTML file of texts, tables and pictures, without scripts and without a network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..utils.files import write_text

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


def write_report(
    path: Path, title: str, sections: Sequence[Section], verdict: str = "", reason: str = "", footer: str = ""
) -> Path:
    """Render the sections into `path`, whole or not at all."""
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=templates, autoescape=True, undefined=StrictUndefined)
    template = environment.get_template("report.html.jinja")
    write_text(path, template.render(title=title, verdict=verdict, reason=reason, sections=sections, footer=footer))
    return path
