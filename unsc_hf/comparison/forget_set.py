"""One forget set of a comparison: models, tries, runs and audits, each a job whose result is a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from ..errors import UNSCError
from ..evaluation.audits import Audit, Examination, calibrate
from ..evaluation.engine import EvaluationRows, accuracies, kept_changes
from ..evaluation.verdict import FORGOTTEN
from ..models.loading import own_processor
from ..models.outputs import RowOutputs
from ..reporting.model_card import public_name
from .controls import KNOWN, training_seconds
from .experiment import Experiment, identity
from .methods import Method
from .parallel import Job
from .summary import ORIGINAL, RETRAINED
from .workbench import Workbench


class ForgetSet:
    """What every method makes of one forget set, audited beside its original and retrained models.

    Models are called "original-0" by their seed and "retrained-0" by their number.

    Args:
        experiment: models and rows.
        methods, audits: what is run.
        audited: a model that is examined beside the methods, made by anybody.
    """

    def __init__(
        self, experiment: Experiment, methods: Sequence[Method], audits: Sequence[Audit], audited: str | None
    ) -> None:
        self.experiment, self.methods, self.audits, self.audited = experiment, methods, audits, audited
        self._first, column = experiment.seeds[0], experiment.config.label_column
        self._rows = EvaluationRows.sample(experiment.forget, experiment.retain, experiment.test, column)
        self._outputs: dict[str, RowOutputs] = {}
        self._references = [f"{RETRAINED}-{number}" for number in experiment.reference_numbers]
        audited_model = "" if audited is None else identity(audited)
        self._audited_record = f"audited-{hashlib.sha256(audited_model.encode()).hexdigest()[:10]}"

    def results(self) -> dict[str, Any]:
        """Everything, after all jobs are done."""
        read, methods = self.experiment.read, [method.name for method in self.methods]
        runs = {name: [read(f"{name}-{seed}") for seed in self.experiment.seeds] for name in (ORIGINAL, *methods)}
        if self.audited is not None:
            name = public_name(self.audited)
            runs[f"audited {name}" if name in {*runs, RETRAINED} else name] = [read(self._audited_record)]
        return {
            "forgotten": self.experiment.forgotten,
            "classes": self.experiment.names,
            "settings": {name: read(f"settings-{name}") for name in methods},
            "calibration": self.calibration(),
            "runs": runs,
            "references": [read(name) for name in self._references],
        }

    def jobs(self) -> list[Job]:
        """Files of everything, in an order in which they can be made."""
        experiment = self.experiment
        # References are read with the first original's kind of processor, so originals come first.
        given = [*(f"{ORIGINAL}-{seed}" for seed in experiment.seeds), *self._references]
        calibrated = any(audit.calibrate for audit in self.audits)
        jobs = [Job("calibration", experiment.file("calibration"), self.calibration)] if calibrated else []
        makes: dict[str, Callable[[], dict[str, Any]]] = {name: partial(self._examine_given, name) for name in given}
        if self.audited is not None:
            makes[self._audited_record] = partial(self._examine_other, self.audited)
        for seed in experiment.seeds:
            makes |= {f"{method.name}-{seed}": partial(self._run, method, seed) for method in self.methods}
        records = (
            Job(name, experiment.file(name), partial(experiment.record, name, make)) for name, make in makes.items()
        )
        return [*jobs, *records]

    def line(self, job: Job) -> str:
        """What a finished job has found, for people."""
        record = json.loads(job.file.read_text(encoding="utf-8"))
        if job.name == "calibration":
            chosen = [f"{name}: {choice['summary']}" for name, choice in record.items()]
            return f"on {len(self.experiment.validation)} validation rows, {'; '.join(chosen)}"
        shares = [f"{name} {record[name]:.1%}" for name in ("AccDut", "AccDrt") if record.get(name) is not None]
        return f"{job.name}: {', '.join(shares)}" if shares else job.name

    def _path(self, name: str) -> str:
        """Folder or id of "original-0" or "retrained-0", which is trained where that was asked for."""
        kind, _, number = name.rpartition("-")
        return (self.experiment.original if kind == ORIGINAL else self.experiment.reference)(int(number))

    # ---- tries and runs ---------------------------------------------------------------------------------------------
    def _run(self, method: Method, seed: int) -> dict[str, Any]:
        """The record of a method's model. The one that was chosen of the tries on the first seed is not made again."""
        bench, winner = self.experiment.bench(seed), list[tuple[PreTrainedModel, dict[str, Any]]]()
        settings = self.experiment.record(f"settings-{method.name}", lambda: self._choose(method, winner))
        if winner and seed == self._first:
            model, cost = winner[-1]
        else:
            model = bench.run(method.run, settings["chosen"])
            cost = bench.cost(model)
        return {**self.examine(bench, model, seed), **cost}

    def _choose(self, method: Method, winner: list[tuple[PreTrainedModel, dict[str, Any]]]) -> dict[str, Any]:
        """Try all settings of a method on the first seed and validation rows; `winner` gets the best model.

        Of the tries that forget (AccDut at most 1 %) it is the one that keeps most. Where none forgets it is the one
        with the largest AccDrt - AccDut.
        """
        experiment, bench = self.experiment, self.experiment.bench(self._first)
        tries: list[dict[str, Any]] = []
        best: dict[str, Any] = {}
        for settings in map(dict, method.settings):
            model = bench.run(method.run, settings)
            answers = experiment.collect(bench, model, experiment.validation, features=False)
            shares = {name: share or 0.0 for name, share in experiment.accuracies(answers).items()}
            tries.append({"settings": settings, **shares})
            if not best or rank(tries[-1]) > rank(best):
                best = tries[-1]
                winner[:] = [(model, bench.cost(model))]
        return {"chosen": best["settings"], "tries": tries if len(tries) > 1 else []}

    # ---- examinations -----------------------------------------------------------------------------------------------
    def outputs(self, name: str) -> RowOutputs:
        """Outputs of "original-0" or "retrained-0" on sampled training rows and all test rows; each process reads once.

        Raises:
            UNSCError: a reference that knows the forgotten classes.
        """
        if name not in self._outputs:
            bench = self._bench(name)
            outputs = self._collect(bench, bench.original)
            known = accuracies(outputs, self.experiment.forgotten)["AccDut"] or 0.0
            if name in self._references and known > KNOWN:
                raise UNSCError(
                    f"retrained_model_name_or_path: {self._path(name)} recognises {known:.0%} of the forgotten "
                    "classes, so it was trained on them; leave it out."
                )
            self._outputs[name] = outputs
        return self._outputs[name]

    def _collect(self, bench: Workbench, model: PreTrainedModel) -> RowOutputs:
        return self._rows.outputs(partial(self.experiment.collect, bench, model))

    def _bench(self, name: str) -> Workbench:
        """What a model is read with; each has its own tokenizer or image processor."""
        experiment = self.experiment
        if name not in self._references:
            return experiment.bench(int(name.rpartition("-")[2]))
        reference = self._path(name)
        processor = own_processor(reference, experiment.arguments.load_processor(experiment.original(self._first)))
        model, config = experiment.load(reference), experiment.seeded(self._first)
        return Workbench(model, experiment.forget, experiment.retain, config, processor)

    def _examination(self, bench: Workbench, model: PreTrainedModel, outputs: RowOutputs, seed: int) -> Examination:
        """What audits ask of a model; it knows of no retrained models."""

        def batches(rows: Dataset, size: int, seed: int) -> Iterator[dict[str, Any]]:
            while True:
                yield from bench.batches(rows, size, seed=seed)
                seed += 1

        return Examination(
            model, outputs, original=self.outputs(f"{ORIGINAL}-{seed}"), references=[],
            forgotten=self.experiment.forgotten, **vars(self._rows),
            collect=partial(self.experiment.collect, bench, features=False), batches=batches,
        )  # fmt: skip

    def calibration(self) -> dict[str, Any]:
        """How strong each audit is, chosen on the first seed's original and validation rows."""

        def choose() -> dict[str, Any]:
            bench, validation = self.experiment.bench(self._first), self.experiment.validation
            answers = self.experiment.collect(bench, bench.original, validation)
            outputs = replace(self.outputs(f"{ORIGINAL}-{self._first}"), test=answers)
            exam = self._examination(bench, bench.original, outputs, self._first)
            return calibrate(replace(exam, original=outputs, test=validation), self.audits)

        return self.experiment.record("calibration", choose)

    def examine(self, bench: Workbench, model: PreTrainedModel, seed: int, name: str | None = None) -> dict[str, Any]:
        """The record of one model, whoever made it: accuracies, decisions changed on kept test rows, and every audit.

        Args:
            bench: prepares rows for the model.
            seed: of the original it is held against.
            name: of an original or retrained model, whose outputs are kept. It is not held against itself.
        """
        forgotten = self.experiment.forgotten
        outputs = self._collect(bench, model) if name is None else self.outputs(name)
        references = [self.outputs(other) for other in self._references if other != name]
        exam = self._examination(bench, model, outputs, seed)
        exam = replace(exam, references=references, calibration=self.calibration())
        audits = {audit.name: audit.run(exam) for audit in self.audits}
        return {
            **accuracies(outputs, forgotten), **kept_changes(outputs.test, exam.original.test, forgotten),
            "audits": audits,
        }  # fmt: skip

    def _examine_given(self, name: str) -> dict[str, Any]:
        """The original of a seed, or a retrained model beside the other ones."""
        bench, path, seed = self._bench(name), self._path(name), self._first
        cost: dict[str, Any] = {"seconds": training_seconds(path)}
        if name not in self._references:
            seed, cost = int(name.rpartition("-")[2]), {"leak": 0.0, "seconds": None}
        return {**self.examine(bench, bench.original, seed, name), **cost, "model": public_name(path)}

    def _examine_other(self, name: str) -> dict[str, Any]:
        """A model that was unlearned by anybody; UNSCError where it has other labels than the original."""
        bench, model = self.experiment.bench(self._first), self.experiment.load(name, "audited")
        labels, expected = int(model.config.num_labels), int(bench.original.config.num_labels)
        if labels != expected:
            raise UNSCError(f"audited: {name} has {labels} labels, its original {expected}; name the right pair.")
        return {**self.examine(bench, model, self._first), "leak": bench.leak(model), "seconds": None, "steps": None}


def rank(attempt: Mapping[str, Any]) -> tuple[bool, float]:
    """Larger is better: whether a try forgets, then what it keeps. A mean of shares may be 1 % and a rounding error."""
    return round(attempt["AccDut"], 9) <= FORGOTTEN, attempt["AccDrt"] - attempt["AccDut"]
