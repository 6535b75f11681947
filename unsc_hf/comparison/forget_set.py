"""One forget set of a comparison: every training, try, run and audit is a job whose result is a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..data.selection import Request, resolve_classes
from ..errors import UNSCError
from ..evaluation.audits import Audit
from ..reporting.model_card import public_name
from .arguments import ClassificationArguments, read_names
from .examination import Examiner, in_words
from .experiment import Experiment
from .methods import Method
from .parallel import Job
from .summary import ORIGINAL, RETRAINED
from .tuning import Tuning

_LONGEST_NAME = 80  # of a folder, before a hash distinguishes it from others that begin alike


class ForgetSet:
    """What every method makes of one forget set.

    Args:
        experiment: models and rows.
        methods, audits: what is run.
        audited: a model that is examined beside the methods, made by anybody.
    """

    def __init__(
        self, experiment: Experiment, methods: Sequence[Method], audits: Sequence[Audit], audited: str | None
    ) -> None:
        self.experiment, self.methods, self.audited = experiment, methods, audited
        self.examiner, self.tuning = Examiner(experiment, audits), Tuning(experiment)
        self._first = experiment.seeds[0]
        self._audited_record = f"audited-{hashlib.sha256(str(audited).encode()).hexdigest()[:10]}"

    # ---- records ----------------------------------------------------------------------------------------------------

    def _reference_makers(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """What makes the record of each retrained model, by name."""
        numbers = self.experiment.reference_numbers()
        return {f"{RETRAINED}-{number}": partial(self.examiner.examine_reference, number) for number in numbers}

    def _examined_run(self, method: Method, seed: int) -> dict[str, Any]:
        model, cost = self.tuning.run(method, seed)
        result = {**self.examiner.examine(self.experiment.bench(seed), model, seed), **cost}
        if seed == self._first:
            self.tuning.drop_models(method)
        return result

    def results(self) -> dict[str, Any]:
        """Everything, after all jobs are done."""
        experiment = self.experiment
        names = (ORIGINAL, *(method.name for method in self.methods))
        runs = {name: [experiment.read(f"{name}-{seed}") for seed in experiment.seeds] for name in names}
        if self.audited is not None:
            runs[public_name(self.audited)] = [experiment.read(self._audited_record)]
        settings = {method.name: self.tuning.choose(method) for method in self.methods}
        return {
            "forgotten": experiment.forgotten,
            "classes": experiment.names,
            "settings": {name: {key: chosen[key] for key in ("chosen", "tries")} for name, chosen in settings.items()},
            "calibration": self.examiner.calibration(),
            "runs": runs,
            "references": [experiment.read(name) for name in self._reference_makers()],
        }

    # ---- jobs -------------------------------------------------------------------------------------------------------

    def jobs(self) -> list[Job]:
        """All jobs, in an order in which they can be done."""
        experiment, jobs = self.experiment, self._training_jobs()
        trained = {job.name for job in jobs}

        def read(kind: str, number: int, original: int) -> Job:
            needs = trained & {self._name(f"train {kind} {number}"), self._name(f"train {ORIGINAL} {original}")}
            name = f"{kind}-{number}"
            return Job(self._name(f"read {name}"), partial(self.examiner.check_outputs, name), tuple(sorted(needs)))

        references = [read(RETRAINED, number, self._first) for number in experiment.reference_numbers()]
        jobs += [*references, *(read(ORIGINAL, seed, seed) for seed in experiment.seeds)]
        first = self._name(f"read {ORIGINAL}-{self._first}")
        needs = [*(job.name for job in references), first]
        if any(audit.calibrate for audit in self.examiner.audits):
            jobs.append(Job(self._name("calibrate"), self.examiner.calibration_line, (first,)))
            needs.append(jobs[-1].name)
        jobs += [self._record_job(name, make, needs, name) for name, make in self._reference_makers().items()]
        tries = {method.name: self._try_jobs(method, first) for method in self.methods}
        for seed in experiment.seeds:
            here, title = [*needs, self._name(f"read {ORIGINAL}-{seed}")], "{} (seed {})"
            make = partial(self.examiner.examine_original, seed)
            jobs.append(self._record_job(f"{ORIGINAL}-{seed}", make, here, title.format(ORIGINAL, seed)))
            if self.audited is not None and seed == self._first:
                make = partial(self.examiner.examine_other, self.audited)
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
            name, line = self.tuning.try_name(method, i), partial(self.tuning.attempt_line, method, i)
            jobs.append(Job(self._name(name), line, (original,), record=self.experiment.file(name)))
        return jobs

    def _record_job(self, name: str, make: Callable[[], dict[str, Any]], needs: Sequence[str], title: str) -> Job:
        def run() -> str:
            return f"{title}: {in_words(self.experiment.record(name, make))}"

        return Job(self._name(name), run, tuple(needs), record=self.experiment.file(name), wanted=True)

    def _name(self, text: str) -> str:
        return f"{self.experiment.folder.name}: {text}"


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
            raise UNSCError("forget_classes: not given; name the classes to forget (or forget_sets, several at once).")
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
