"""Many methods on the same models, rows and seeds, each audited beside retrained models.

A stopped comparison goes on where it was.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from datasets import DatasetDict
from rich.console import Console
from transformers import PreTrainedModel
from transformers.hf_argparser import HfArg

from ..config import UNSCConfig
from ..errors import UNSCError
from ..evaluation.audits import AUDITS
from ..models.loading import load_config
from ..reporting.model_card import public_name
from ..utils.reserve import check_writable, reserved
from .arguments import ClassificationArguments, ImageArguments, TextArguments
from .experiment import Experiment, RunArguments, check_names, read_data
from .forget_set import ForgetSet
from .methods import METHODS
from .parallel import Job, share, work
from .plugins import load_plugins
from .report import write_comparison
from .summary import markdown, summarise, table

_LONGEST_NAME = 80  # of a folder, before a hash distinguishes it from others that begin alike
_RECORDS = 4  # changes with what records hold: a comparison does not continue on those of older versions
_STRANGERS = 0.8  # leak above which two models hardly share an ancestor; unprojected unlearning stays far below

Model: TypeAlias = str | PathLike[str] | PreTrainedModel


@dataclass
class ComparisonArguments(RunArguments):
    """What is compared: methods, audits, seeds."""

    methods: list[str] | None = HfArg(default=None, help="Methods by name; all by default.")
    audits: list[str] | None = HfArg(default=None, help="Audits by name; all by default.")
    no_intervals: bool = HfArg(default=False, help="Allow a single seed, without intervals.")
    jobs: int | None = HfArg(
        default=None,
        help="Spread the work over so many processes of one thread each; by default one, with all threads.",
    )

    kind = "comparison"

    def check(self) -> None:
        if len(self.seeds) == 1 and not self.no_intervals:
            raise UNSCError(
                "seeds: 1 given, an interval needs at least two (better three); give more, or no_intervals."
            )
        super().check()
        check_names("methods", self.methods, METHODS)
        check_names("audits", self.audits, AUDITS)
        if self.jobs is not None and self.jobs < 1:
            raise UNSCError(f"jobs: {self.jobs} given; it is a number of processes, at least 1.")


@dataclass
class _Task:
    """A whole comparison or audit; picklable, so that every process can list its jobs."""

    comparison: ComparisonArguments
    arguments: ClassificationArguments
    config: UNSCConfig
    data: DatasetDict
    audited: str | None

    def forget_set(self) -> ForgetSet:
        """What is run."""
        comparison, config = self.comparison, self.config
        folder = Path(str(config.output_dir), "_runs")
        experiment = Experiment(comparison.seeds, comparison.originals, self.arguments, config, self.data, folder)
        name = re.sub(r"[^\w+ -]", "_", "+".join(experiment.names[c] for c in experiment.forgotten))
        if len(name) > _LONGEST_NAME:
            name = f"{name[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        experiment.folder /= name
        methods = [METHODS[name] for name in (METHODS if comparison.methods is None else comparison.methods)]
        return ForgetSet(experiment, methods, [AUDITS[name] for name in comparison.audits or AUDITS], self.audited)

    def in_worker(self) -> list[Job]:
        """All jobs, in a process that has just started."""
        load_plugins(self.comparison.plugins)
        self.config.dataloader_num_workers = 0  # a worker may have no processes of its own
        return self.forget_set().jobs()


def compare_methods(
    comparison: ComparisonArguments,
    arguments: ClassificationArguments,
    config: UNSCConfig,
    console: Console | None = None,
    data: DatasetDict | None = None,
    audited: str | None = None,
) -> dict[str, Any]:
    """Run what is missing in `config.output_dir`, and return all results.

    Args:
        comparison: `originals` names the models before; `seeds` has one run of each method for each.
        data: rows, where they do not come from where `arguments` say.
        audited: Hub id or folder of a model that was unlearned by anybody, by any means. It is examined instead of
            methods, beside the original of `config.seed`, and may differ from that in its weights alone.

    Returns:
        {"forget_sets": {name: {"forgotten", "classes", "settings", "calibration", "runs", "references"}}, "test_rows",
        "validation_rows", "seeds"}, with one forget set: "runs" holds a list of results by method (and "original"), one
        for each seed; "references" one for each retrained model. An audited model is found under its own name.

    Raises:
        UNSCError: unknown names, too few seeds, references trained on the forgotten rows, a model that does not fit the
            data, or a folder of another comparison.
    """
    console = console or Console()
    if audited is not None:
        comparison = replace(comparison, methods=[], seeds=[int(config.seed)], no_intervals=True)
    comparison.check()
    given: dict[str, Sequence[str | None]] = {
        "audited": [audited],
        "originals": comparison.originals or [],
        "model_name_or_path": [arguments.model_name_or_path],
        "retrained_model_name_or_path": arguments.retrained_model_name_or_path or [],
    }
    for argument, names in given.items():  # refuse models that are not there before any is trained
        for name in filter(None, names):
            load_config(name, argument)
    task = _Task(comparison, arguments, config, read_data(arguments, config, data), audited)
    forget_set = task.forget_set()
    experiment = forget_set.experiment
    with reserved(str(config.output_dir)):
        records = {"records": _RECORDS, "audits": sorted(comparison.audits or AUDITS)}
        experiment.claim(Path(str(config.output_dir)), comparison.kind, **records)
        if not experiment.reference_numbers:
            console.print("No retrained references: nothing can be said about 'removed', and no band is drawn.")
        jobs = forget_set.jobs()
        missing = sum(not job.file.is_file() for job in jobs)
        finished = work(jobs) if comparison.jobs is None else share(jobs, task.in_worker, comparison.jobs)
        for i, job in enumerate(finished, 1):
            console.print(f"[{i}/{missing}] {forget_set.line(job)}", markup=False, highlight=False, soft_wrap=True)
    outcome = forget_set.results()
    if audited is not None:
        leak = outcome["runs"][public_name(audited)][0]["leak"]
        if leak is not None and leak > _STRANGERS:
            console.print(
                f"warning: {public_name(audited)} has little in common with this original (leak {leak:.2g}): "
                "was it made from another one?"
            )
    validation_rows = len(experiment.validation) if audited is None else 0
    rows = {"test_rows": len(experiment.test), "validation_rows": validation_rows}
    return {"forget_sets": {experiment.folder.name: outcome}, **rows, "seeds": comparison.seeds}


# ---- from Python ----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ComparisonResult:
    """Results of a comparison or an audit."""

    results: dict[str, Any]  # as `compare_methods` returns them
    output_dir: Path  # where records are, and where `save` writes

    @property
    def table(self) -> list[list[str]]:
        """A row for each model, the header first: means with half 95 % intervals, and verdicts."""
        (outcome,) = self.results["forget_sets"].values()
        return table(summarise(outcome))

    def __str__(self) -> str:
        return markdown(self.table)

    def save(self, command: str = "Python") -> Path:
        """Write `comparison.json`, tables, pictures and `report.html`; returns the folder."""
        write_comparison(self.results, self.output_dir, command)
        return self.output_dir


def compare(
    originals: Model | Sequence[Model],
    dataset: DatasetDict | str,
    forget_classes: Iterable[Any],
    *,
    methods: Sequence[str] | None = None,
    audits: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    retrained: Sequence[Model] = (),
    output_dir: str | PathLike[str] = "comparison",
    config: UNSCConfig | None = None,
    task: str = "image",
    processing_class: Any = None,
    jobs: int | None = None,
    console: Console | None = None,
    audited: Model | None = None,
) -> ComparisonResult:
    """Run methods of unlearning on the same models and rows, and audit each beside retrained models.

    What already has a record in `output_dir` is not run again.

    Args:
        originals: the model to unlearn, or one for each seed: Hub ids, folders or models.
        dataset: splits "train" and "test" (and "validation", else a fifth of the test rows), or the name of a data set.
        forget_classes: names or ids.
        methods, audits: names; all by default.
        seeds: one run of each method for each. A single one gives no intervals.
        retrained: models trained without the forgotten rows. Verdicts need three of them.
        config: options of unlearning; its `output_dir` is not used.
        task: "image" or "text".
        processing_class: image processor or tokenizer of models that are given as objects.
        jobs: processes of one thread each; None works in this one. With several, the calling script needs a
            `if __name__ == "__main__":` guard.
        audited: a model that is examined instead of methods; see `audit`.

    Raises:
        UNSCError: unknown names, references trained on the forgotten rows, or a folder of another comparison.
    """
    check_writable(output_dir)
    kinds: dict[str, type[ClassificationArguments]] = {"image": ImageArguments, "text": TextArguments}
    if task not in kinds:
        raise UNSCError(f"task: got {task!r}; choose from {', '.join(kinds)}.")

    def name(model: Model, kind: str, i: int = 0) -> str:
        """Name of a model; one that is an object is saved first."""
        if isinstance(model, str | PathLike):
            return str(model)
        folder = str(Path(output_dir, "_models", f"{kind}-{i}"))
        for part in (model, processing_class):
            if part is not None:
                part.save_pretrained(folder)
        return folder

    originals = list(originals) if isinstance(originals, list | tuple) else [originals]
    classes = [forget_classes] if isinstance(forget_classes, str) else forget_classes
    comparison = ComparisonArguments(
        list(seeds), [name(model, "original", i) for i, model in enumerate(originals)], no_intervals=len(seeds) == 1,
        methods=list(methods) if methods is not None else None, audits=list(audits) if audits is not None else None,
        jobs=jobs,
    )  # fmt: skip
    arguments = kinds[task](
        dataset_name=dataset if isinstance(dataset, str) else "given as an object",
        forget_classes=[str(c) for c in classes],
        retrained_model_name_or_path=[name(model, "retrained", i) for i, model in enumerate(retrained)] or None,
    )
    config = deepcopy(config) if config else UNSCConfig(report_to="none", disable_tqdm=True)
    config.output_dir = str(output_dir)
    data = None if isinstance(dataset, str) else dataset
    examined = None if audited is None else name(audited, "audited")
    return ComparisonResult(compare_methods(comparison, arguments, config, console, data, examined), Path(output_dir))


def audit(
    audited: Model, original: Model, dataset: DatasetDict | str, forget_classes: Iterable[Any],
    *, output_dir: str | PathLike[str] = "audit", **options: Any,
) -> ComparisonResult:  # fmt: skip
    """Examine a model that was unlearned by anybody, by any means.

    Args:
        audited: the unlearned model; it may differ from the original in its weights alone.
        original: the model before.
        dataset, forget_classes, output_dir: as in `compare`.
        options: `audits`, `retrained`, `config`, `task`, `processing_class` and `console` of `compare`.

    Raises:
        UNSCError: as `compare`, or a model that does not fit the data.
    """
    return compare(original, dataset, forget_classes, output_dir=output_dir, audited=audited, **options)
