"""Run named studies, and write what they found: JSON, a picture, a table, a paragraph, one HTML file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets.utils.logging import disable_progress_bar
from rich.console import Console

from ..config import UNSCConfig
from ..data.columns import read_labels
from ..data.selection import Request, resolve_classes
from ..errors import UNSCError, closest
from ..reporting.html import FILE, Picture, Section, write_report
from ..reporting.model_card import versions
from ..reporting.plots import save
from ..reporting.results import finite
from ..utils.files import write_text
from ..utils.fingerprint import data_fingerprint
from .arguments import ClassificationArguments
from .experiment import Desk, read_splits
from .jobs import one_process
from .plugins import load_plugins
from .studies import STUDIES, Lab, Study
from .studies.lab import matching, mean, spread
from .summary import markdown

_RAW = ("memory", "seconds", "last", "steps", "rows", "requests", "predicted", "changed", "leak", "size")


# Not what studies vary, nor what may differ between two machines that share a folder.
_UNBOUND = ("references_dir", "cache_dir", "license", "controls", "statistics_dir", "retrained_model_name_or_path")


@dataclass
class AblationArguments:
    """Which studies, and on how many seeds."""

    studies: list[str] | None = field(default=None, metadata={"help": "Studies by name; all by default."})
    plugins: list[str] | None = field(
        default=None, metadata={"help": "Python files of your own that register studies."}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Each point is run for each seed."})
    originals: list[str] | None = field(
        default=None,
        metadata={"help": "A model for each seed (or one for all); trained with train_original otherwise."},
    )

    def check(self) -> None:
        """Refuse unknown names.

        Raises:
            UNSCError: naming the studies that exist.
        """
        load_plugins(self.plugins)
        for name in self.studies or ():
            if name not in STUDIES:
                raise UNSCError(
                    f"studies: {name!r} does not exist; closest: {closest(name, STUDIES)}; all: {', '.join(STUDIES)}."
                )
        if not self.seeds:
            raise UNSCError("seeds: none given; name at least one, better three.")
        if self.originals is not None and len(self.originals) not in (1, len(self.seeds)):
            raise UNSCError(
                f"originals: {len(self.originals)} given for {len(self.seeds)} seeds; give one for each, or one for all."
            )


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
    one_process("a study")
    ablation.check()
    console = console or Console()
    if config.disable_tqdm:
        disable_progress_bar()
    splits = read_splits(arguments, config)
    request = arguments.request()
    if request is None or request.forget_classes is None:
        raise UNSCError("forget_classes: not given; studies forget classes.")
    present = read_labels(splits.train, config.label_column).tolist()
    ids = resolve_classes(request.forget_classes, splits.names, present)
    folder = Path(str(config.output_dir))
    said = {}
    for name in ablation.studies or STUDIES:
        place = folder / name
        runs = place / "_runs"
        _check_folder(runs, arguments, config, data_fingerprint(splits.train)[:16], ids)
        desk = Desk(
            ablation.seeds, ablation.originals, arguments, config, splits, Request(forget_classes=tuple(ids)), runs
        )
        console.rule(f"{name}: {STUDIES[name].title}")
        points = STUDIES[name].measure(Lab(desk, name, console))
        said[name] = write_study(STUDIES[name], points, place, command)
        console.print(said[name], style="bold")
    return said  # fmt: skip


def table(study: Study, points: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row for each combination of tags: means and half 95 % intervals over seeds."""
    shown = [p for p in points if any(tag in p for tag in study.tags)]
    rows = [[*study.tags.values(), *study.numbers.values()]]
    combinations = dict.fromkeys(tuple(p.get(tag) for tag in study.tags) for p in shown)
    for combination in combinations:
        tags = dict(zip(study.tags, combination, strict=True))
        found = matching(shown, **tags)
        cells = ["–" if value is None else str(value) for value in combination]
        if found:
            cells += [_cell(found, key) for key in study.numbers]
        else:
            cells += [
                next(str(p["error"]) for p in shown if all(p.get(k) == v for k, v in tags.items())),
                *[""] * (len(study.numbers) - 1),
            ]
        rows.append(cells)
    return rows  # fmt: skip


def _cell(points: Sequence[Any], key: str) -> str:
    number, half = mean(points, key), spread(points, key)
    if number != number:
        return "–"
    if key in _RAW:
        return f"{number:.3g}" + (f" ± {half:.2g}" if half else "")
    return f"{100 * number:.1f}" + (f" ± {100 * half:.1f}" if half else "")


def write_study(study: Study, points: list[dict[str, Any]], folder: Path, command: str) -> str:
    """Write `study.json`, `study.png`, `README.md` and `report.html` into a folder; returns the paragraph."""
    paragraph, rows = study.paragraph(points), table(study, points)
    picture = save(study.plot(points), folder / "study.png")
    note = "Shares in percent, mean ± half the 95 % interval over seeds; leak, sizes, losses, seconds and memory as they are."
    found = {"study": study.name, "question": study.title, "paragraph": paragraph, "points": points, "command": command,
             "versions": versions()}  # fmt: skip
    write_text(
        folder / "README.md",
        f"# {study.title}\n\n{paragraph}\n\n![{study.name}](study.png)\n\n{markdown(rows)}\n\n{note}\n\n```\n{command}\n```\n",
    )
    sections = [
        Section("What it shows", [paragraph]),
        Section("Picture", pictures=[Picture(picture, study.title)]),
        Section("Numbers", [note], table=rows),
        Section("How it was made", code=command + "\n\n" + ", ".join(f"{k} {v}" for k, v in versions().items())),
    ]
    write_report(folder / FILE, study.title, sections, footer="Made by unsc_hf. This file holds everything it shows.")
    write_text(folder / "study.json", json.dumps(finite(found), indent=1))
    return paragraph


def _check_folder(
    runs: Path, arguments: ClassificationArguments, config: UNSCConfig, data: str, ids: Sequence[int]
) -> None:
    """Refuse points of other models, data or options; seeds may be added."""
    options = {
        k: getattr(config, k) for k in ("energy", "subspace_rule", "learning_rate", "max_steps", "max_leak", "optim")
    }
    given = {k: v for k, v in vars(arguments).items() if k not in _UNBOUND}
    text = json.dumps([given, options, data, list(ids)], sort_keys=True, default=str)
    now, file = hashlib.sha256(text.encode()).hexdigest()[:16], runs / "identity.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))["identity"]
        if before != now:
            raise UNSCError(
                f"output_dir: {runs.parent} holds a study with other models, data or options ({before} there, {now} now); choose another folder."
            )
    else:
        write_text(file, json.dumps({"identity": now}))
