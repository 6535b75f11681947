"""Many methods on the same models, forget sets and seeds, each audited beside retrained models.

A stopped comparison goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
from ..data.columns import read_labels
from ..errors import UNSCError
from ..evaluation.audits import AUDITS
from ..models.loading import load_config
from ..reporting.model_card import public_name
from ..utils.fingerprint import data_fingerprint
from ..utils.reserve import check_writable, reserved
from .arguments import ClassificationArguments, ImageArguments, TextArguments
from .experiment import Experiment, RunArguments, Splits, check_folder, check_names, read_splits
from .forget_set import ForgetSet, requests_by_folder
from .methods import METHODS
from .parallel import Job, open_jobs, run_jobs
from .plugins import load_plugins
from .report import write_comparison
from .summary import markdown, summarise, table
from .workbench import Workbench

_RECORDS = 3  # changes with what records hold: a comparison does not continue on those of older versions
_STRANGERS = 0.8  # leak above which two models hardly share an ancestor; unprojected unlearning stays far below

Model: TypeAlias = str | PathLike[str] | PreTrainedModel


@dataclass
class ComparisonArguments(RunArguments):
    """What is compared: methods, audits, forget sets, seeds."""

    methods: list[str] | None = HfArg(default=None, help="Methods by name; all by default.")
    audits: list[str] | None = HfArg(default=None, help="Audits by name; all by default.")
    forget_sets: list[str] | None = HfArg(
        default=None,
        help="Several forget sets instead of forget_classes: names or ids joined by '+', or a .txt file of names.",
    )
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
    splits: Splits
    audited: str | None

    def forget_sets(self) -> dict[str, ForgetSet]:
        """Forget sets by the name of their folder."""
        comparison, config, splits = self.comparison, self.config, self.splits
        methods = [METHODS[name] for name in (METHODS if comparison.methods is None else comparison.methods)]
        audits = [AUDITS[name] for name in comparison.audits or AUDITS]
        present = read_labels(splits.train, config.label_column).tolist()
        requests = requests_by_folder(comparison.forget_sets, self.arguments, splits.names, present)
        benches: dict[str, Workbench] = {}

        def experiment(name: str) -> Experiment:
            folder, models = Path(str(config.output_dir), "_runs", name), (comparison.seeds, comparison.originals)
            return Experiment(*models, self.arguments, config, splits, requests[name], folder, benches)

        return {name: ForgetSet(experiment(name), methods, audits, self.audited) for name in requests}

    def all_jobs(self) -> list[Job]:
        """All jobs, in a process that has just started."""
        load_plugins(self.comparison.plugins)
        self.config.dataloader_num_workers = 0  # a worker may have no processes of its own
        return [job for forget_set in self.forget_sets().values() for job in forget_set.jobs()]


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
        "validation_rows", "seeds"}: "runs" holds a list of results by method (and "original"), one for each seed;
        "references" one for each retrained model. An audited model is found under its own name.

    Raises:
        UNSCError: unknown names, too few seeds, references trained on the forgotten rows, a model that does not fit the
            data, or a folder of another comparison.
    """
    console = console or Console()
    if audited is not None:
        comparison = replace(comparison, methods=[], seeds=[int(config.seed)], no_intervals=True)
    comparison.check()
    _check_models(comparison, arguments, audited)
    splits = read_splits(arguments, config, data)
    task = _Task(comparison, arguments, config, splits, audited)
    sets = task.forget_sets()
    fingerprint = data_fingerprint(splits.train)[:16] + data_fingerprint(splits.test)[:16]
    origin = {"data": fingerprint, "records": _RECORDS, "audits": sorted(comparison.audits or AUDITS)}
    for name, forget_set in sets.items():
        origin |= {f"the classes of {name!r}": forget_set.experiment.forgotten, **forget_set.experiment.origin()}
    with reserved(str(config.output_dir)):
        check_folder(Path(str(config.output_dir)), comparison.kind, origin)
        if not any(forget_set.experiment.reference_numbers() for forget_set in sets.values()):
            console.print("No retrained references: nothing can be said about 'removed', and no band is drawn.")
        run_jobs(
            open_jobs([job for forget_set in sets.values() for job in forget_set.jobs()]),
            task.all_jobs,
            comparison.jobs,
            lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
        )
    results = {name: forget_set.results() for name, forget_set in sets.items()}
    if audited is not None:
        _warn_of_strangers(public_name(audited), results, console)
    validation_rows = len(splits.validation) if audited is None else 0
    rows = {"test_rows": len(splits.test), "validation_rows": validation_rows}
    return {"forget_sets": results, **rows, "seeds": comparison.seeds}


def _warn_of_strangers(audited: str, results: Mapping[str, Any], console: Console) -> None:
    for outcome in results.values():
        leak = outcome["runs"][audited][0]["leak"]
        if leak is not None and leak > _STRANGERS:
            console.print(
                f"warning: {audited} has little in common with this original (leak {leak:.2g}): "
                "was it made from another one?"
            )


def _check_models(
    comparison: ComparisonArguments, arguments: ClassificationArguments, audited: str | None = None
) -> None:
    """Refuse models that are not there before any is trained."""
    given: dict[str, Sequence[str | None]] = {
        "audited": [audited],
        "originals": comparison.originals or [],
        "model_name_or_path": [arguments.model_name_or_path],
        "retrained_model_name_or_path": arguments.retrained_model_name_or_path or [],
    }
    for argument, names in given.items():
        for name in names:
            if name is not None:
                load_config(name, argument)


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

    Raises:
        UNSCError: unknown names, references trained on the forgotten rows, or a folder of another comparison.
    """
    several = list(originals) if isinstance(originals, list | tuple) else [originals]
    models = {"original": several, "retrained": retrained}
    options = {"methods": methods, "audits": audits, "seeds": seeds, "no_intervals": len(seeds) == 1, "jobs": jobs}
    return _compare(models, dataset, forget_classes, output_dir, config, task, processing_class, console, options)


def audit(
    audited: Model,
    original: Model,
    dataset: DatasetDict | str,
    forget_classes: Iterable[Any],
    *,
    audits: Sequence[str] | None = None,
    retrained: Sequence[Model] = (),
    output_dir: str | PathLike[str] = "audit",
    config: UNSCConfig | None = None,
    task: str = "image",
    processing_class: Any = None,
    console: Console | None = None,
) -> ComparisonResult:
    """Examine a model that was unlearned by anybody, by any means.

    Args:
        audited: the unlearned model; it may differ from the original in its weights alone.
        original: the model before.
        dataset, forget_classes, audits, retrained, output_dir, config, task, processing_class: as in `compare`.

    Raises:
        UNSCError: as `compare`, or a model that does not fit the data.
    """
    models = {"original": [original], "retrained": retrained, "audited": [audited]}
    options = {"audits": audits}
    return _compare(models, dataset, forget_classes, output_dir, config, task, processing_class, console, options)


def _compare(
    models: Mapping[str, Sequence[Model]], dataset: DatasetDict | str, forget_classes: Iterable[Any],
    output_dir: str | PathLike[str], config: UNSCConfig | None, task: str, processing_class: Any,
    console: Console | None, options: Mapping[str, Any],
) -> ComparisonResult:  # fmt: skip
    """What a command line does. Models that are objects are saved first."""
    check_writable(output_dir)
    kinds: dict[str, type[ClassificationArguments]] = {"image": ImageArguments, "text": TextArguments}
    if task not in kinds:
        raise UNSCError(f"task: got {task!r}; choose from {', '.join(kinds)}.")

    def name(model: Model, kind: str, i: int) -> str:
        if isinstance(model, str | PathLike):
            return str(model)
        folder = str(Path(output_dir, "_models", f"{kind}-{i}"))
        for part in (model, processing_class):
            if part is not None:
                part.save_pretrained(folder)
        return folder

    names = {kind: [name(model, kind, i) for i, model in enumerate(of_kind)] for kind, of_kind in models.items()}
    classes = [forget_classes] if isinstance(forget_classes, str) else forget_classes
    arguments = kinds[task](
        dataset_name=dataset if isinstance(dataset, str) else "given as an object",
        forget_classes=[str(c) for c in classes],
        retrained_model_name_or_path=names["retrained"] or None,
    )
    config = deepcopy(config) if config else UNSCConfig(report_to="none", disable_tqdm=True)
    config.output_dir = str(output_dir)
    lists: dict[str, Any] = {
        key: list(value) if isinstance(value, Sequence) else value for key, value in options.items()
    }
    comparison = ComparisonArguments(originals=names["original"], **lists)
    data, (audited,) = None if isinstance(dataset, str) else dataset, names.get("audited", [None])
    return ComparisonResult(compare_methods(comparison, arguments, config, console, data, audited), Path(output_dir))
