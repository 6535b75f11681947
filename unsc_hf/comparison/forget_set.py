"""One forget set of a comparison: every training, try, run and audit is a job whose result is a file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
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

    # ---- records ----------------------------------------------------------------------------------------------------

    def _makers(self, seeds: Iterable[int]) -> dict[str, Callable[[], dict[str, Any]]]:
        """What makes each record of some seeds, by name, in the order of work."""
        makers: dict[str, Callable[[], dict[str, Any]]] = {}
        for seed in seeds:
            makers[f"{ORIGINAL}-{seed}"] = partial(self.examiner.examine_original, seed)
            if self.audited is not None and seed == self._first:
                makers[self._audited_record] = partial(self.examiner.examine_other, self.audited)
            for method in self.methods:
                makers[f"{method.name}-{seed}"] = partial(self._examined_run, method, seed)
        return makers

    def _reference_makers(self) -> dict[str, Callable[[], dict[str, Any]]]:
        numbers = self.experiment.reference_numbers()
        return {f"{RETRAINED}-{number}": partial(self.examiner.examine_reference, number) for number in numbers}

    @property
    def _audited_record(self) -> str:
        return f"audited-{hashlib.sha256(str(self.audited).encode()).hexdigest()[:10]}"

    def _is_done(self, name: str) -> bool:
        return (self.experiment.folder / f"{name}.json").is_file()

    def _examined_run(self, method: Method, seed: int) -> dict[str, Any]:
        model, cost = self.tuning.run(method, seed)
        result = {**self.examiner.examine(self.experiment.bench(seed), model, seed), **cost}
        if seed == self._first:
            self.tuning.drop_models(method)
        return result

    def results(self) -> dict[str, Any]:
        """Everything; what has no record yet is made."""
        experiment, makers = self.experiment, {**self._makers(self.experiment.seeds), **self._reference_makers()}
        records = {name: experiment.record(name, make) for name, make in makers.items()}
        names = (ORIGINAL, *(method.name for method in self.methods))
        runs = {name: [records[f"{name}-{seed}"] for seed in experiment.seeds] for name in names}
        if self.audited is not None:
            runs[public_name(self.audited)] = [records[self._audited_record]]
        settings = {method.name: self.tuning.choose(method) for method in self.methods}
        return {
            "forgotten": experiment.forgotten,
            "classes": experiment.names,
            "settings": {name: {key: chosen[key] for key in ("chosen", "tries")} for name, chosen in settings.items()},
            "calibration": self.examiner.calibration(),
            "runs": runs,
            "references": [records[name] for name in self._reference_makers()],
        }

    # ---- jobs -------------------------------------------------------------------------------------------------------

    def jobs(self, everything: bool = False) -> list[Job]:
        """What has no record yet, or `everything`, in an order in which it can be done."""

        def missing(makers: Mapping[str, Any]) -> list[str]:
            return [name for name in makers if everything or not self._is_done(name)]

        references = missing(self._reference_makers())
        if not references and not missing(self._makers(self.experiment.seeds)):
            return []
        seeds = [seed for seed in self.experiment.seeds if seed == self._first or missing(self._makers([seed]))]
        jobs = self._training_jobs(seeds)
        jobs += self._reading_jobs(seeds, {job.name for job in jobs})
        read = [self._name(f"read {RETRAINED}-{number}") for number in self.experiment.reference_numbers()]
        if any(audit.calibrate for audit in self.examiner.audits):
            original = self._name(f"read {ORIGINAL}-{self._first}")
            jobs.append(Job(self._name("calibrate"), self.examiner.calibration_line, (original,)))
            read.append(jobs[-1].name)
        for name in references:
            needs = [*read, self._name(f"read {ORIGINAL}-{self._first}")]
            jobs.append(self._record_job(name, self._reference_makers()[name], needs, name))
        for seed in seeds:
            jobs += self._seed_jobs(seed, missing(self._makers([seed])), read, everything)
        return jobs

    def _seed_jobs(self, seed: int, missing: Sequence[str], read: Sequence[str], everything: bool) -> list[Job]:
        """Of one seed: the original, the audited model, and each method's tries before its run."""
        original, jobs = self._name(f"read {ORIGINAL}-{seed}"), list[Job]()
        methods = {f"{method.name}-{seed}": method for method in self.methods}
        for name, make in self._makers([seed]).items():
            tries = self._try_jobs(methods[name]) if name in methods else []
            if seed == self._first and tries and (everything or not self.tuning.is_chosen(methods[name])):
                jobs += tries
            if name in missing:
                title = name if name == self._audited_record else f"{name.rpartition('-')[0]} (seed {seed})"
                needs = [*read, original, *(job.name for job in tries)]
                jobs.append(self._record_job(name, make, needs, title))
        return jobs

    def _try_jobs(self, method: Method) -> list[Job]:
        """None where there is nothing to choose."""
        needs, count = (self._name(f"read {ORIGINAL}-{self._first}"),), len(method.settings)
        lines = [partial(self.tuning.attempt_line, method, i) for i in range(count if count > 1 else 0)]
        return [Job(self._name(self.tuning.try_name(method, i)), line, needs) for i, line in enumerate(lines)]

    def _record_job(self, name: str, make: Callable[[], dict[str, Any]], needs: Sequence[str], title: str) -> Job:
        return Job(self._name(name), lambda: f"{title}: {in_words(self.experiment.record(name, make))}", tuple(needs))

    def _name(self, text: str) -> str:
        return f"{self.experiment.folder.name}: {text}"

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
