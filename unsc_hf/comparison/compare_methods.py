"""Many methods on the same models, forget sets and seeds, each audited beside retrained models; a stopped comparison goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config import UNSCConfig
from ..data.columns import read_labels
from ..data.selection import Request, resolve_classes
from ..errors import UNSCError, closest
from ..evaluation.audits import AUDITS
from ..models.outputs import RowOutputs
from ..reporting.model_card import public_name
from ..utils.files import alone, write_text
from ..utils.fingerprint import data_fingerprint
from .arguments import ClassificationArguments, read_names
from .experiment import Splits, read_splits
from .jobs import Job, one_process, run_jobs
from .methods import METHODS, Workbench
from .plugins import load_plugins
from .tuning import MethodDesk

_LONGEST_NAME = 80  # of a folder, before a hash tells it from others that begin alike


_RECORDS = 2  # changes with what records hold: those of older versions cannot be gone on with


_STRANGERS = 0.8  # leak above which two models hardly share an ancestor; unprojected unlearning stays far below


@dataclass
class ComparisonArguments:
    """What is compared: methods, audits, forget sets, seeds."""

    methods: list[str] | None = field(default=None, metadata={"help": "Methods by name; all by default."})
    audits: list[str] | None = field(default=None, metadata={"help": "Audits by name; all by default."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run of each method for each."})
    originals: list[str] | None = field(
        default=None,
        metadata={"help": "A model for each seed (or one for all); trained with train_original otherwise."},
    )
    forget_sets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Several forget sets instead of forget_classes: names or ids joined by '+', or a .txt file of names."
        },
    )
    plugins: list[str] | None = field(
        default=None, metadata={"help": "Python files of your own that register methods or audits."}
    )
    no_intervals: bool = field(default=False, metadata={"help": "Allow a single seed, without intervals."})
    jobs: int | None = field(
        default=None,
        metadata={
            "help": "Spread the work over so many processes of one thread each; by default one, with all threads."
        },
    )

    def check(self) -> None:
        """Refuse unknown names and too few seeds.

        Raises:
            UNSCError: naming what exists.
        """
        one_process("a comparison")
        load_plugins(self.plugins)
        for option, known in (("methods", METHODS), ("audits", AUDITS)):
            for name in getattr(self, option) or ():
                if name not in known:
                    raise UNSCError(
                        f"{option}: {name!r} does not exist; closest: {closest(name, known)}; all: {', '.join(known)}."
                    )
        if len(set(self.seeds)) < len(self.seeds):
            raise UNSCError(f"seeds: {self.seeds} names one twice; give each once.")
        if len(self.seeds) < 2 and not self.no_intervals:
            raise UNSCError(
                f"seeds: {len(self.seeds)} given, an interval needs at least two (better three); give more, or no_intervals."
            )
        if self.jobs is not None and self.jobs < 1:
            raise UNSCError(f"jobs: {self.jobs} given; it is a number of processes, at least 1.")
        if self.originals is not None and len(self.originals) not in (1, len(self.seeds)):
            raise UNSCError(
                f"originals: {len(self.originals)} given for {len(self.seeds)} seeds; give one for each, or one for all."
            )


def compare_methods(
    comparison: ComparisonArguments,
    arguments: ClassificationArguments,
    config: UNSCConfig,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is missing in `config.output_dir`, and return everything that was found.

    Returns:
        {"forget_sets": {name: {"forgotten", "classes", "settings", "runs", "references"}}}: "runs" holds a list of results by
        method (and "original"), one for each seed; "references" one for each retrained model.

    Raises:
        UNSCError: unknown names, too few seeds, references trained on the forgotten rows, or a folder of another comparison.
    """
    comparison.check()
    splits = read_splits(arguments, config)
    found = _compare(comparison, arguments, config, splits, None, console or Console())
    return {
        "forget_sets": found,
        "test_rows": len(splits.test),
        "validation_rows": len(splits.validation),
        "seeds": comparison.seeds,
    }


def audit_model(
    audited: str,
    comparison: ComparisonArguments,
    arguments: ClassificationArguments,
    config: UNSCConfig,
    console: Console | None = None,
) -> dict[str, Any]:
    """Examine a model that was unlearned by anybody, by any means, beside its original and retrained models.

    Args:
        audited: Hub id or folder of the model; it may differ from the original in its weights alone.
        comparison: `originals` names the model before, else the one that `config.seed` trains; `methods` and `seeds` are not
            looked at.

    Returns:
        As `compare_methods`, with the model under its own name.

    Raises:
        UNSCError: as `compare_methods`, or a model that does not fit the data.
    """
    seed = int(config.seed)
    comparison = replace(comparison, methods=[], seeds=[seed], no_intervals=True)
    comparison.check()
    splits, console = read_splits(arguments, config), console or Console()
    found = _compare(comparison, arguments, config, splits, audited, console)
    for result in found.values():
        leak = result["runs"][public_name(audited)][0]["leak"]
        if leak is not None and leak > _STRANGERS:
            console.print(
                f"warning: {public_name(audited)} has little in common with this original (leak {leak:.2g}): was it made from another one?"
            )
    return {"forget_sets": found, "test_rows": len(splits.test), "validation_rows": 0, "seeds": [seed]}


def _compare(
    comparison: ComparisonArguments,
    arguments: ClassificationArguments,
    config: UNSCConfig,
    splits: Splits,
    audited: str | None,
    console: Console,
) -> dict[str, Any]:
    """Do what has no record yet; returns what was found by forget set."""
    desks = _desks(comparison, arguments, config, splits, audited)
    _check_folder(Path(str(config.output_dir)), comparison, arguments, config, splits)
    for name, desk in desks.items():
        desk.check_classes(name)
    jobs = [job for desk in desks.values() for job in desk.jobs()]
    if not any(desk.reference_numbers() for desk in desks.values()):
        console.print("No retrained references: nothing can be said about 'removed', and no band is drawn.")
    run_jobs(
        jobs,
        partial(_jobs, comparison, arguments, config, audited),
        comparison.jobs,
        lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
    )
    return {name: desk.found() for name, desk in desks.items()}


def _desks(
    comparison: ComparisonArguments,
    arguments: ClassificationArguments,
    config: UNSCConfig,
    splits: Splits,
    audited: str | None,
) -> dict[str, MethodDesk]:
    """A desk for each forget set, by the name of its folder."""
    methods = [METHODS[name] for name in (METHODS if comparison.methods is None else comparison.methods)]
    audits = [AUDITS[name] for name in comparison.audits or AUDITS]
    present = read_labels(splits.train, config.label_column).tolist()
    benches: dict[str, Workbench] = {}
    read: dict[str, RowOutputs] = {}
    return {
        name: MethodDesk(
            methods, audits, audited, read, comparison.seeds, comparison.originals, arguments, config, splits, request,
            Path(str(config.output_dir), "_runs", name), benches,
        )
        for name, request in _requests(comparison, arguments, splits.names, present).items()
    }  # fmt: skip


def _jobs(
    comparison: ComparisonArguments, arguments: ClassificationArguments, config: UNSCConfig, audited: str | None
) -> list[Job]:
    """All jobs of a comparison, in a process that knows nothing yet."""
    load_plugins(comparison.plugins)
    config.dataloader_num_workers = 0  # a process that works for another may have none of its own
    desks = _desks(comparison, arguments, config, read_splits(arguments, config), audited)
    return [job for desk in desks.values() for job in desk.jobs(everything=True)]


def _requests(
    comparison: ComparisonArguments, arguments: ClassificationArguments, names: list[str], present: Sequence[int]
) -> dict[str, Request]:
    """Forget sets by the name of their folder."""
    if comparison.forget_sets is None:
        request = arguments.request()
        if request is None or request.forget_classes is None:
            raise UNSCError("forget_classes: not given; name the classes to forget (or forget_sets, several at once).")
        sets = [("+".join(str(c) for c in request.forget_classes), list(request.forget_classes))]
    else:
        sets = [
            (Path(text).stem, read_names([text])) if text.endswith(".txt") else (text, text.split("+"))
            for text in comparison.forget_sets
        ]
    folders: dict[str, Request] = {}
    for name, classes in sets:
        folder = "".join(c if c.isalnum() or c in "+-_ " else "_" for c in name)
        if len(folder) > _LONGEST_NAME:
            folder = f"{folder[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        if folder in folders:
            raise UNSCError(f"forget_sets: {folder!r} names two of them; give the files other names.")
        folders[folder] = Request(forget_classes=tuple(resolve_classes(classes, names, present)))
    return folders


def _check_folder(
    folder: Path,
    comparison: ComparisonArguments,
    arguments: ClassificationArguments,
    config: UNSCConfig,
    splits: Splits,
) -> None:
    """Refuse a folder whose records come from other models, data or options; methods, audits and seeds may be added.

    Raises:
        UNSCError: naming what differs.
    """
    given = {**vars(arguments), "originals": comparison.originals if len(comparison.seeds) > 1 else None}
    ignored = {
        "references_dir",
        "retrained_model_name_or_path",
        "cache_dir",
        "license",
        "controls",
        "statistics_dir",
        "originals",
    }
    options = {
        name: getattr(config, name)
        for name in ("energy", "subspace_rule", "learning_rate", "max_steps", "max_leak", "optim")
    }
    now = {
        "data": data_fingerprint(splits.train)[:16] + data_fingerprint(splits.test)[:16],
        "records": _RECORDS,
        "audits": sorted(comparison.audits or AUDITS),
        "options": hashlib.sha256(
            json.dumps(
                {**{k: v for k, v in given.items() if k not in ignored}, **options}, sort_keys=True, default=str
            ).encode()
        ).hexdigest()[:16],
    }
    file = folder / "_runs" / "identity.json"
    with alone(file):
        if not file.is_file():
            write_text(file, json.dumps(now))
    before = json.loads(file.read_text(encoding="utf-8"))
    for name, value in now.items():
        if before.get(name) != value:
            raise UNSCError(
                f"output_dir: {folder} holds a comparison with other {name} ({before.get(name)} there, {value} now); choose another folder."
            )
