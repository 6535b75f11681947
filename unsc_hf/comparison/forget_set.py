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
from .experiment import Experiment, record
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

    # ---- records ------------------------------------------------------------------------------------------------------

    def _seeded_records(self, seeds: Iterable[int]) -> list[str]:
        names = (ORIGINAL, *(method.name for method in self.methods))
        return [f"{name}-{seed}" for seed in seeds for name in names]

    def _records(self) -> list[str]:
        references = [f"{RETRAINED}-{number}" for number in self.experiment.reference_numbers()]
        audited = [] if self.audited is None else [self._audited_record(self.audited)]
        return [*references, *self._seeded_records(self.experiment.seeds), *audited]

    @staticmethod
    def _audited_record(name: str) -> str:
        return f"audited-{hashlib.sha256(name.encode()).hexdigest()[:10]}"

    def _is_done(self, name: str) -> bool:
        return (self.experiment.folder / f"{name}.json").is_file()

    def _make(self, name: str, make: Callable[[], dict[str, Any]]) -> str:
        """Make a record, and say what was found."""
        content = self.experiment.record(name, make)
        kind, _, seed = name.rpartition("-")
        title = f"{kind} (seed {seed})" if name in self._seeded_records(self.experiment.seeds) else name
        return f"{title}: {in_words(content)}"

    def _finished(self, name: str) -> dict[str, Any]:
        def missing() -> dict[str, Any]:
            raise RuntimeError(f"the record {name} is gone, though it was just written")

        return self.experiment.record(name, missing)

    def results(self) -> dict[str, Any]:
        """Everything, once all jobs are done."""
        experiment = self.experiment
        names = (ORIGINAL, *(method.name for method in self.methods))
        runs = {name: [self._finished(f"{name}-{seed}") for seed in experiment.seeds] for name in names}
        if self.audited is not None:
            runs[public_name(self.audited)] = [self._finished(self._audited_record(self.audited))]
        settings = {method.name: self.tuning.choose(method) for method in self.methods}
        return {
            "forgotten": experiment.forgotten,
            "classes": experiment.names,
            "settings": {name: {key: chosen[key] for key in ("chosen", "tries")} for name, chosen in settings.items()},
            "calibration": self.examiner.calibration(),
            "runs": runs,
            "references": [self._finished(f"{RETRAINED}-{number}") for number in experiment.reference_numbers()],
        }

    def check_classes(self, name: str) -> None:
        """Refuse a folder whose records are of other classes under the same name.

        Raises:
            UNSCError: naming both.
        """
        folder, now = self.experiment.folder, self.experiment.forgotten
        before = record(folder / "classes.json", lambda: {"classes": now})["classes"]
        if before != now:
            raise UNSCError(
                f"forget_sets: {name!r} stands for the classes {before} in {folder}, and for {now} now; "
                "choose another folder."
            )

    # ---- jobs ---------------------------------------------------------------------------------------------------------

    def jobs(self, everything: bool = False) -> list[Job]:
        """What has no record yet, or `everything`, in an order in which it can be done.

        Raises:
            UNSCError: the folder's records are of other models.
        """
        self.examiner.check_models()
        missing = {name for name in self._records() if everything or not self._is_done(name)}
        if not missing:
            return []
        seeds = [s for s in self.experiment.seeds if s == self._first or missing & set(self._seeded_records([s]))]
        trainings = self._training_jobs(seeds)
        readings = self._reading_jobs(seeds, {job.name for job in trainings})
        audited = [self._name(f"read {RETRAINED}-{number}") for number in self.experiment.reference_numbers()]
        jobs = [*trainings, *readings]
        if any(audit.calibrate for audit in self.examiner.audits):
            jobs.append(self._calibration_job())
            audited.append(jobs[-1].name)
        for number in self.experiment.reference_numbers():
            make = partial(self.examiner.examine_reference, number)
            jobs += self._audit(f"{RETRAINED}-{number}", make, missing, [*audited, self._original(self._first)])
        for seed in seeds:
            jobs += self._seed_jobs(seed, missing, [*audited, self._original(seed)], everything)
        return jobs

    def _name(self, text: str) -> str:
        return f"{self.experiment.folder.name}: {text}"

    def _original(self, seed: int) -> str:
        """Name of the job that reads the original of a seed."""
        return self._name(f"read {ORIGINAL}-{seed}")

    def _training_jobs(self, seeds: Sequence[int]) -> list[Job]:
        experiment = self.experiment

        def train(kind: str, make: Callable[[int], str], number: int) -> Job:
            text = f"train {kind} {number}"
            return Job(self._name(text), lambda: f"{text}: {public_name(make(number))}", long=True)

        jobs = [train(ORIGINAL, experiment.original, seed) for seed in seeds] if experiment.trains_originals else []
        if experiment.trains_references:
            jobs += [train(RETRAINED, experiment.reference, number) for number in experiment.reference_numbers()]
        return jobs

    def _reading_jobs(self, seeds: Sequence[int], trained: set[str]) -> list[Job]:
        """What originals and references answer."""

        def read(kind: str, number: int, original: int) -> Job:
            needs = trained & {self._name(f"train {kind} {number}"), self._name(f"train {ORIGINAL} {original}")}
            name = f"{kind}-{number}"
            return Job(self._name(f"read {name}"), partial(self.examiner.check_outputs, name), tuple(sorted(needs)))

        references = [read(RETRAINED, number, self._first) for number in self.experiment.reference_numbers()]
        return [*references, *(read(ORIGINAL, seed, seed) for seed in seeds)]

    def _calibration_job(self) -> Job:
        return Job(self._name("calibrate"), self.examiner.calibration_line, (self._original(self._first),))

    def _audit(
        self, name: str, make: Callable[[], dict[str, Any]], missing: Iterable[str], needs: Iterable[str]
    ) -> list[Job]:
        return [Job(self._name(name), partial(self._make, name, make), tuple(needs))] if name in missing else []

    def _seed_jobs(self, seed: int, missing: Iterable[str], needs: Sequence[str], everything: bool) -> list[Job]:
        """Of one seed: the original, the audited model, and each method's tries before its run."""
        jobs = self._audit(f"{ORIGINAL}-{seed}", partial(self.examiner.examine_original, seed), missing, needs)
        if self.audited is not None:
            make = partial(self.examiner.examine_other, self.audited)
            jobs += self._audit(self._audited_record(self.audited), make, missing, needs)
        for method in self.methods:
            count = len(method.settings) if len(method.settings) > 1 else 0
            tries = [self._name(self.tuning.try_name(method, i)) for i in range(count)]
            if seed == self._first and (everything or not self.tuning.is_chosen(method)):
                jobs += [
                    Job(name, partial(self.tuning.attempt_line, method, i), (self._original(seed),))
                    for i, name in enumerate(tries)
                ]
            make = partial(self._examined_run, method, seed)
            jobs += self._audit(f"{method.name}-{seed}", make, missing, [*needs, *tries])
        return jobs

    def _examined_run(self, method: Method, seed: int) -> dict[str, Any]:
        model, cost = self.tuning.run(method, seed)
        result = {**self.examiner.examine(self.experiment.bench(seed), model, seed), **cost}
        if seed == self._first:
            self.tuning.drop_models(method)
        return result


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
