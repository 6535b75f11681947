"""Run named studies, and write their results: JSON, a picture, a table, two sentences, one HTML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datasets.utils.logging import disable_progress_bar
from rich.console import Console
from transformers.hf_argparser import HfArg

from ..config import UNSCConfig
from ..reporting.plots import save
from ..reporting.report import Picture, Section
from ..utils.files import write_text
from ..utils.reserve import reserved
from .arguments import ClassificationArguments
from .experiment import Experiment, RunArguments, check_names, read_data
from .report import write_json, write_page
from .studies import STUDIES, Lab, Points, Study
from .summary import markdown

_UNITS = "Means ± half the 95 % interval over seeds."


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
        The conclusion of each study.

    Raises:
        UNSCError: unknown names, or a folder with points of other models, data or options.
    """
    ablation.check()
    console = console or Console()
    if config.disable_tqdm:
        disable_progress_bar()
    data = read_data(arguments, config)
    conclusions = {}
    with reserved(str(config.output_dir)):
        for name in ablation.studies or STUDIES:
            study, folder = STUDIES[name], Path(str(config.output_dir), name)
            models = (ablation.seeds, ablation.originals)
            experiment = Experiment(*models, arguments, config, data, folder / "_runs")
            experiment.claim(folder, ablation.kind)
            console.rule(f"{name}: {study.title}")
            points = Points(study.measure(Lab(experiment, name, console)))
            conclusions[name] = write_study(study, points, folder, command)
            console.print(conclusions[name], style="bold")
    return conclusions


def write_study(study: Study, points: Points, folder: Path, command: str) -> str:
    """Write `study.json`, `study.png`, `README.md` and `report.html` into a folder; returns the conclusion."""
    try:
        conclusion = study.conclude(points)
    except (LookupError, ValueError, StopIteration):  # a sentence compares runs, and some of them failed
        conclusion = "Too many runs failed for a conclusion; the table says why."
    rows = study.table(points)
    picture = save(study.picture(points), folder / "study.png")
    parts = (
        f"# {study.title}",
        conclusion,
        f"![{study.name}](study.png)",
        markdown(rows),
        _UNITS,
        f"```\n{command}\n```",
    )
    write_text(folder / "README.md", "\n\n".join(parts) + "\n")
    sections = [
        Section("What it shows", [conclusion]),
        Section("Picture", pictures=[Picture(picture, study.title)]),
        Section("Numbers", [_UNITS], table=rows),
    ]
    write_page(folder, study.title, sections, command)
    content = {"study": study.name, "question": study.title, "paragraph": conclusion, "points": points}
    write_json(folder / "study.json", content, command)
    return conclusion
