"""One forget set of a comparison: every training, try, run and audit is a job whose result is a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..data.selection import Request, resolve_classes
from ..errors import UNSCError
from ..evaluation.audits import Audit
from ..evaluation.verdict import FORGOTTEN
from ..reporting.model_card import public_name
from ..utils.files import write_beside
from .arguments import ClassificationArguments, read_names
from .examination import Examiner, in_words
from .experiment import Experiment
from .methods import Method
from .parallel import Job
from .summary import ORIGINAL, RETRAINED
from .workbench import Workbench

_LONGEST_NAME = 80  # of a folder, before a hash distinguishes it from others that begin alike


class ForgetSet:
    """What every method makes of one forget set.

    The settings of a method are tried on the first seed's original, and chosen on validation rows. The model of the
    best try so far is kept in a file, so that it need not be made again.

    Args:
        experiment: models and rows.
        methods, audits: what is run.
        audited: a model that is examined beside the methods, made by anybody.
    """

    def __init__(
        self, experiment: Experiment, methods: Sequence[Method], audits: Sequence[Audit], audited: str | None
    ) -> None:
        self.experiment, self.methods, self.audited = experiment, methods, audited
        self.examiner, self._first = Examiner(experiment, audits), experiment.seeds[0]
        self._audited_record = f"audited-{hashlib.sha256(str(audited).encode()).hexdigest()[:10]}"

    def results(self) -> dict[str, Any]:
        """Everything, after all jobs are done."""
        experiment = self.experiment
        names = (ORIGINAL, *(method.name for method in self.methods))
        runs = {name: [experiment.read(f"{name}-{seed}") for seed in experiment.seeds] for name in names}
        if self.audited is not None:
            runs[public_name(self.audited)] = [experiment.read(self._audited_record)]
        settings = {method.name: self._choose(method) for method in self.methods}
        return {
            "forgotten": experiment.forgotten,
            "classes": experiment.names,
            "settings": {name: {key: chosen[key] for key in ("chosen", "tries")} for name, chosen in settings.items()},
            "calibration": self.examiner.calibration(),
            "runs": runs,
            "references": [experiment.read(f"{RETRAINED}-{number}") for number in experiment.reference_numbers()],
        }

    # ---- jobs -------------------------------------------------------------------------------------------------------
    def jobs(self) -> list[Job]:
        """All jobs, in an order in which they can be done."""
        experiment, examiner, jobs = self.experiment, self.examiner, self._training_jobs()
        trained = {job.name for job in jobs}

        def read(kind: str, number: int, original: int) -> Job:
            needs = trained & {self._name(f"train {kind} {number}"), self._name(f"train {ORIGINAL} {original}")}
            name = f"{kind}-{number}"
            return Job(self._name(f"read {name}"), partial(examiner.check_outputs, name), tuple(sorted(needs)))

        references = [read(RETRAINED, number, self._first) for number in experiment.reference_numbers()]
        jobs += [*references, *(read(ORIGINAL, seed, seed) for seed in experiment.seeds)]
        first = self._name(f"read {ORIGINAL}-{self._first}")
        needs = [*(job.name for job in references), first]
        if any(audit.calibrate for audit in examiner.audits):
            jobs.append(Job(self._name("calibrate"), examiner.calibration_line, (first,)))
            needs.append(jobs[-1].name)
        for number in experiment.reference_numbers():
            name = f"{RETRAINED}-{number}"
            jobs.append(self._record_job(name, partial(examiner.examine_given, name), needs, name))
        tries = {method.name: self._try_jobs(method, first) for method in self.methods}
        for seed in experiment.seeds:
            here, title = [*needs, self._name(f"read {ORIGINAL}-{seed}")], "{} (seed {})"
            make = partial(examiner.examine_given, f"{ORIGINAL}-{seed}")
            jobs.append(self._record_job(f"{ORIGINAL}-{seed}", make, here, title.format(ORIGINAL, seed)))
            if self.audited is not None and seed == self._first:
                make = partial(examiner.examine_other, self.audited)
                jobs.append(self._record_job(self._audited_record, make, here, self._audited_record))
            for method in self.methods:
                jobs += tries[method.name] if seed == self._first else []
                after, make = [job.name for job in tries[method.name]], partial(self._examined_run, method, seed)
                title_of = title.format(method.name, seed)
                jobs.append(self._record_job(f"{method.name}-{seed}", make, [*here, *after], title_of))
        return jobs

    def _training_jobs(self) -> list[Job]:
        experiment = self.experiment

        def train(kind: str, make: Callable[[int], str], number: int) -> Job:
            text = f"train {kind} {number}"
            return Job(self._name(text), lambda: f"{text}: {public_name(make(number))}", long=True)

        originals = experiment.seeds if experiment.trains_originals else []
        references = experiment.reference_numbers() if experiment.trains_references else []
        return [
            *(train(ORIGINAL, experiment.original, seed) for seed in originals),
            *(train(RETRAINED, experiment.reference, number) for number in references),
        ]

    def _try_jobs(self, method: Method, original: str) -> list[Job]:
        """None where there is nothing to choose."""
        count, jobs = len(method.settings), []
        for i in range(count if count > 1 else 0):
            name, line = self._try_name(method, i), partial(self._attempt_line, method, i)
            jobs.append(Job(self._name(name), line, (original,), record=self.experiment.file(name)))
        return jobs

    def _record_job(self, name: str, make: Callable[[], dict[str, Any]], needs: Sequence[str], title: str) -> Job:
        def run() -> str:
            return f"{title}: {in_words(self.experiment.record(name, make))}"

        return Job(self._name(name), run, tuple(needs), record=self.experiment.file(name), wanted=True)

    def _name(self, text: str) -> str:
        return f"{self.experiment.folder.name}: {text}"

    # ---- tries and runs ---------------------------------------------------------------------------------------------
    def _attempt(self, method: Method, i: int) -> dict[str, Any]:
        """Accuracies on validation rows with the method's i-th settings, and what the run cost."""

        def attempt() -> dict[str, Any]:
            bench, settings = self.experiment.bench(self._first), dict(method.settings[i])
            model = bench.run(method.run, settings)
            answers = self.experiment.collect(bench, model, self.experiment.validation, features=False)
            accuracies = {name: share or 0.0 for name, share in self.experiment.accuracies(answers).items()}
            cost = _cost(bench, model)
            _save_changes(bench, model, self._model_file(method, i))
            return {"settings": settings, **accuracies, "cost": cost}

        return self.experiment.record(self._try_name(method, i), attempt)

    def _attempt_line(self, method: Method, i: int) -> str:
        """Make a try, drop the models of all that can no longer be chosen, and say what it gave."""
        attempt = self._attempt(method, i)
        done = [k for k in range(len(method.settings)) if self.experiment.file(self._try_name(method, k)).is_file()]
        best = max(done, key=lambda k: (rank(self._attempt(method, k)), -k))
        self._drop_models(method, [k for k in done if k != best])
        rows = f"{len(self.experiment.validation)} validation rows"
        return f"{method.name}, try {i + 1} of {len(method.settings)} on {rows}: {in_words(attempt)}"

    def _choose(self, method: Method) -> dict[str, Any]:
        """The settings a method runs with, under "chosen", and what was tried.

        Of the tries that forget (AccDut at most 1 %) it is the one that keeps most. Where none forgets it is the one
        with the largest AccDrt - AccDut.
        """

        def choose() -> dict[str, Any]:
            if len(method.settings) == 1:
                return {"chosen": dict(method.settings[0]), "tries": []}
            tries = [self._attempt(method, i) for i in range(len(method.settings))]
            best = max(range(len(tries)), key=lambda i: rank(tries[i]))
            shown = [{name: attempt[name] for name in ("settings", "AccDut", "AccDrt")} for attempt in tries]
            chosen, cost = tries[best]["settings"], tries[best]["cost"]
            return {"chosen": chosen, "seed": self._first, "try": best, "cost": cost, "tries": shown}

        return self.experiment.record(f"settings-{method.name}", choose)

    def _examined_run(self, method: Method, seed: int) -> dict[str, Any]:
        """The record of a method's model with the chosen settings. The try that won is not run again."""
        settings, bench = self._choose(method), self.experiment.bench(seed)
        won, cost = settings.get("seed") == seed, settings.get("cost", {})
        model = self.saved_model(bench, self._model_file(method, settings["try"])) if won else None
        if model is None:
            model = bench.run(method.run, settings["chosen"])
            cost = _cost(bench, model)
        result = {**self.examiner.examine(bench, model, seed), **cost}
        if seed == self._first:
            self._drop_models(method, range(len(method.settings)))
        return result

    def saved_model(self, bench: Workbench, file: Path) -> PreTrainedModel | None:
        """The model of a try, None where it was not kept."""
        if not file.is_file():
            return None
        model = bench.fresh()
        weights = model.state_dict()
        with torch.no_grad():
            for name, value in load_file(file).items():
                weights[name].copy_(value)
        return model

    def _drop_models(self, method: Method, tries: Iterable[int]) -> None:
        for i in tries:
            self._model_file(method, i).unlink(missing_ok=True)

    def _try_name(self, method: Method, i: int) -> str:
        return f"try-{method.name}-{i}-seed-{self._first}"

    def _model_file(self, method: Method, i: int) -> Path:
        return self.experiment.folder / "_kept" / f"{self._try_name(method, i)}.safetensors"


def _save_changes(bench: Workbench, model: PreTrainedModel, file: Path) -> None:
    """Save the weights that differ from the original's; a model of another shape is not kept, and made again."""
    before, after = bench.original.state_dict(), model.state_dict()
    if {name: value.shape for name, value in before.items()} == {name: value.shape for name, value in after.items()}:
        changed = {name: value.cpu().clone() for name, value in after.items() if not torch.equal(value, before[name])}
        write_beside(file, partial(save_file, changed))


def rank(attempt: Mapping[str, Any]) -> tuple[bool, float]:
    """Larger is better: whether a try forgets, then what it keeps. A mean of shares may be 1 % and a rounding error."""
    return round(attempt["AccDut"], 9) <= FORGOTTEN, attempt["AccDrt"] - attempt["AccDut"]


def _cost(bench: Workbench, model: PreTrainedModel) -> dict[str, Any]:
    return {"seconds": bench.seconds, "steps": bench.steps, "leak": bench.leak(model)}


def requests_by_folder(
    forget_sets: Sequence[str] | None, arguments: ClassificationArguments, names: list[str], present: Iterable[int]
) -> dict[str, Request]:
    """Requests by the name of their folder, with class ids.

    Args:
        forget_sets: classes joined by "+", or .txt files of them; None takes what `arguments` say.
        names: of the classes, by id.
        present: ids that have rows.

    Raises:
        UNSCError: no classes were named, or two forget sets would share a folder.
    """
    if forget_sets is None:
        request = arguments.request()
        if request is None or request.forget_classes is None:
            raise UNSCError(
                "forget_classes: not given; name the classes to forget (a comparison also takes forget_sets)."
            )
        sets = [("+".join(str(c) for c in request.forget_classes), list(request.forget_classes))]
    else:
        sets = [
            (Path(text).stem, read_names([text])) if text.endswith(".txt") else (text, text.split("+"))
            for text in forget_sets
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
