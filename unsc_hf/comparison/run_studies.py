"""Run named studies, and write their results: JSON, a picture, a table, a paragraph, one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.utils.logging import disable_progress_bar
from rich.console import Console
from transformers.hf_argparser import HfArg

from ..config import UNSCConfig
from ..data.columns import read_labels
from ..reporting.plots import save
from ..reporting.report import Picture, Section
from ..utils.files import write_text
from ..utils.fingerprint import data_fingerprint
from ..utils.reserve import reserved
from .arguments import ClassificationArguments
from .experiment import Experiment, RunArguments, check_folder, check_names, read_splits
from .forget_set import requests_by_folder
from .report import write_json, write_page
from .studies import STUDIES, Lab, Point, Points, Study
from .summary import markdown, with_interval

_RAW = ("memory", "seconds", "last", "steps", "rows", "requests", "predicted", "changed", "leak", "size")  # not shares
_UNITS = (
    "Shares in percent, mean ± half the 95 % interval over seeds; leak, sizes, losses, seconds and memory as they are."
)


@dataclass
class AblationArguments(RunArguments):
    """Which studies, and on how many seeds."""

    studies: list[str] | None = HfArg(default=None, help="Studies by name; all by default.")

    def check(self) -> None:
        super().check()
        check_names("studies", self.studies, STUDIES)


def run_studies(
    ablation: AblationArguments,
    arguments: ClassificationArguments,
    config: UNSCConfig,
    command: str,
    console: Console | None = None,
) -> dict[str, str]:
    """Run studies into folders of `config.output_dir`; finished points are not run again.

    Returns:
        The paragraph of each study.

    Raises:
        UNSCError: unknown names, or a folder with points of other models, data or options.
    """
    ablation.check()
    console = console or Console()
    if config.disable_tqdm:
        disable_progress_bar()
    splits = read_splits(arguments, config)
    present = read_labels(splits.train, config.label_column).tolist()
    (request,) = requests_by_folder(None, arguments, splits.names, present).values()
    origin = {"data": data_fingerprint(splits.train)[:16], "classes": list(request.forget_classes or ())}
    paragraphs = {}
    with reserved(str(config.output_dir)):
        for name in ablation.studies or STUDIES:
            folder = Path(str(config.output_dir), name)
            models = (ablation.seeds, ablation.originals)
            experiment = Experiment(*models, arguments, config, splits, request, folder / "_runs")
            check_folder(folder, "study", {**origin, **experiment.origin()})
            console.rule(f"{name}: {STUDIES[name].title}")
            points = STUDIES[name].measure(Lab(experiment, name, console))
            paragraphs[name] = write_study(STUDIES[name], points, folder, command)
            console.print(paragraphs[name], style="bold")
    return paragraphs


def table(study: Study, points: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A row for each combination of tags, the header first: means and half 95 % intervals over seeds."""
    shown = Points(p for p in points if any(tag in p for tag in study.tags))
    rows = [[*study.tags.values(), *study.numbers.values()]]
    for combination in dict.fromkeys(tuple(p.get(tag) for tag in study.tags) for p in shown):
        tags = dict(zip(study.tags, combination, strict=True))
        measured = shown.where(**tags)
        cells = ["–" if value is None else str(value) for value in combination]
        if measured:
            cells += [_cell(measured, key) for key in study.numbers]
        else:
            error = next(str(p["error"]) for p in shown if all(p.get(k) == v for k, v in tags.items()))
            cells += [error, *[""] * (len(study.numbers) - 1)]
        rows.append(cells)
    return rows


def _cell(points: Points, key: str) -> str:
    number, half = points.mean(key), points.half(key)
    if not points.values(key):
        return "–"
    if key in _RAW:
        return f"{number:.3g}" + (f" ± {half:.2g}" if half else "")
    return with_interval(100 * number, 100 * half or None)


def write_study(study: Study, points: list[Point], folder: Path, command: str) -> str:
    """Write `study.json`, `study.png`, `README.md` and `report.html` into a folder; returns the paragraph."""
    paragraph, rows = study.paragraph(Points(points)), table(study, points)
    picture = save(study.plot(Points(points)), folder / "study.png")
    text = (
        f"# {study.title}", paragraph, f"![{study.name}](study.png)", markdown(rows), _UNITS,
        f"```\n{command}\n```",
    )  # fmt: skip
    write_text(folder / "README.md", "\n\n".join(text) + "\n")
    sections = [
        Section("What it shows", [paragraph]),
        Section("Picture", pictures=[Picture(picture, study.title)]),
        Section("Numbers", [_UNITS], table=rows),
    ]
    write_page(folder, study.title, sections, command)
    content = {"study": study.name, "question": study.title, "paragraph": paragraph, "points": points}
    write_json(folder / "study.json", content, command)
    return paragraph
