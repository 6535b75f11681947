"""One forget set of a comparison: the models that are read, the tries, runs and audits, each a job whose result is a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..data.columns import read_labels
from ..errors import UNSCError
from ..evaluation.accuracy import macro_accuracy
from ..evaluation.audits import Audit, Examination, calibrate
from ..evaluation.engine import sample_rows
from ..models.loading import load_as, own_processor
from ..models.outputs import Outputs, RowOutputs
from ..reporting.model_card import public_name
from ..utils.files import alone, write_beside, write_text
from .controls import training_seconds
from .experiment import Desk
from .jobs import Job
from .methods import Method, Workbench

ORIGINAL, RETRAINED = "original", "retrained"


_FORGOTTEN = 0.01  # AccDut at or below which a class counts as forgotten


_KNOWN = 0.05  # a reference that recognises this much of the forgotten classes was trained on them


class MethodDesk(Desk):
    """One forget set, and what every method makes of it.

    Args:
        methods, audits: what is run.
        audited: a model that is examined beside the methods, made by anybody.
        read: where outputs that were read are kept; desks that share it keep those of one in all.
        parts: as `Desk`.
    """

    def __init__(
        self,
        methods: Sequence[Method],
        audits: Sequence[Audit],
        audited: str | None,
        read: dict[str, RowOutputs],
        *parts: Any,
    ) -> None:
        super().__init__(*parts)
        self.methods, self.audits, self.audited = methods, audits, audited
        column = self.config.label_column
        self.samples = [sample_rows(rows, read_labels(rows, column)) for rows in (self.forget, self.retain)]
        self._outputs = read

    # ---- jobs -------------------------------------------------------------------------------------------------------

    def jobs(self, everything: bool = False) -> list[Job]:
        """What has no record yet, or `everything`, in an order in which it can be done.

        Raises:
            UNSCError: the folder's records are of other models.
        """
        self._check_models()
        first, numbers = self.seeds[0], self.reference_numbers()
        missing = {record for record in self._records() if everything or not self._made(record)}
        if not missing:
            return []
        seeds = [s for s in self.seeds if s == first or missing & set(self._seeded_records([s]))]
        jobs = self._trainings(seeds)
        trained = {job.name for job in jobs}
        for kind, chosen in ((RETRAINED, numbers), (ORIGINAL, seeds)):
            for number in chosen:
                seed = first if kind == RETRAINED else number
                needs = trained & {self._job(f"train {kind} {number}"), self._job(f"train {ORIGINAL} {seed}")}
                jobs.append(self._new(f"read {kind}-{number}", partial(self._look, f"{kind}-{number}"), needs, seed))
        read = {self._job(f"read {RETRAINED}-{number}") for number in numbers}
        if any(one.calibrate for one in self.audits):
            needs = {self._job(f"read {ORIGINAL}-{first}")}
            jobs.append(self._new("calibrate", self._told_calibration, needs, first))
            read.add(jobs[-1].name)
        for number in numbers:
            needs, record = read | {self._job(f"read {ORIGINAL}-{first}")}, f"{RETRAINED}-{number}"
            if record in missing:
                jobs.append(
                    self._new(record, partial(self._told, record, partial(self._retrained, number)), needs, first)
                )
        for seed in seeds:
            jobs += self._runs(seed, missing, read | {self._job(f"read {ORIGINAL}-{seed}")}, everything)
        return jobs

    def _job(self, text: str) -> str:
        """Name of a job of this forget set."""
        return f"{self.folder.name}: {text}"

    def _new(self, text: str, run: Callable[[], str], needs: Iterable[str], seed: int, long: bool = False) -> Job:
        """A job that works on the original of `seed`."""
        return Job(self._job(text), run, tuple(sorted(needs)), f"{self.folder.name} {seed}", long)

    def _trainings(self, seeds: Sequence[int]) -> list[Job]:
        jobs = []
        for kind, chosen, trains, make in (
            (ORIGINAL, seeds, self.trains_originals, self.original),
            (RETRAINED, self.reference_numbers(), self.trains_references, self.reference),
        ):
            for number in chosen if trains else ():
                text = f"train {kind} {number}"
                jobs.append(self._new(text, partial(_told_training, make, number, text), (), number, long=True))
        return jobs

    def _runs(self, seed: int, missing: Collection[str], needs: set[str], everything: bool) -> list[Job]:
        """Of one seed, each method's tries before its run."""
        jobs = []

        def audit(record: str, make: Callable[[], dict[str, Any]], more: Iterable[str] = ()) -> None:
            if record in missing:
                jobs.append(self._new(record, partial(self._told, record, make), {*needs, *more}, seed))

        audit(f"{ORIGINAL}-{seed}", partial(self._original, seed))
        if self.audited is not None:
            audit(self._audited_record, self._audited)
        for method in self.methods:
            tries = [self._try(method, i) for i in range(len(method.settings))] if len(method.settings) > 1 else []
            if seed == self.seeds[0] and (everything or not self._made(f"settings-{method.name}")):
                start = {self._job(f"read {ORIGINAL}-{seed}")}
                jobs += [self._new(t, partial(self._told_try, method, i), start, seed) for i, t in enumerate(tries)]
            audit(f"{method.name}-{seed}", partial(self._run, method, seed), map(self._job, tries))
        return jobs

    def _seeded_records(self, seeds: Sequence[int] | None = None) -> list[str]:
        return [f"{one}-{seed}" for seed in seeds or self.seeds for one in (ORIGINAL, *(m.name for m in self.methods))]

    def _records(self) -> list[str]:
        references = [f"{RETRAINED}-{number}" for number in self.reference_numbers()]
        return [*references, *self._seeded_records(), *([] if self.audited is None else [self._audited_record])]

    def _made(self, record: str) -> bool:
        return (self.folder / f"{record}.json").is_file()

    def _told(self, record: str, make: Callable[[], dict[str, Any]]) -> str:
        found = self.record(record, make)
        kind, _, seed = record.rpartition("-")
        title = f"{kind} (seed {seed})" if record in self._seeded_records() else record
        return f"{title}: AccDut {_percent(found['AccDut'])}, AccDrt {_percent(found['AccDrt'])}"

    def found(self) -> dict[str, Any]:
        """Everything, once all jobs are done."""
        names = (ORIGINAL, *(method.name for method in self.methods))
        runs = {one: [self.record(f"{one}-{seed}", _missing) for seed in self.seeds] for one in names}
        if self.audited is not None:
            runs[public_name(self.audited)] = [self.record(self._audited_record, _missing)]
        settings = {method.name: self._settings(method) for method in self.methods}
        return {
            "forgotten": self.forgotten,
            "classes": self.names,
            "settings": {name: {k: found[k] for k in ("chosen", "tries")} for name, found in settings.items()},
            "calibration": self._calibration(),
            "runs": runs,
            "references": [self.record(f"{RETRAINED}-{number}", _missing) for number in self.reference_numbers()],
        }

    # ---- models and what they say -----------------------------------------------------------------------------------

    def _check_models(self) -> None:
        """Records of other models than those given now must not be taken for theirs."""
        names = {}
        if not self.trains_originals:
            names.update({f"{ORIGINAL}-{seed}": self.original(seed) for seed in self.seeds})
        if not self.trains_references:
            names.update({f"{RETRAINED}-{number}": self.reference(number) for number in self.reference_numbers()})
        for record, name in names.items():
            found = self.record(record, _missing) if self._made(record) else {"model": public_name(name)}
            beside = found.get("beside", self._beside())
            if found["model"] != public_name(name) or beside != self._beside():
                there = (found["model"], public_name(name))
                if there[0] == there[1]:
                    there = (", ".join(beside or ()) or "none", ", ".join(self._beside() or ()) or "none")
                raise UNSCError(
                    f"output_dir: {self.folder} holds a comparison with other models ({there[0]} there, {there[1]} now); choose another folder."
                )

    def check_classes(self, name: str) -> None:
        """Refuse a folder whose records are of other classes under the same name.

        Raises:
            UNSCError: naming both.
        """
        file = self.folder / "classes.json"
        with alone(file):
            if not file.is_file():
                write_text(file, json.dumps(self.forgotten))
        there = json.loads(file.read_text(encoding="utf-8"))
        if there != self.forgotten:
            raise UNSCError(
                f"forget_sets: {name!r} stands for the classes {there} in {self.folder}, and for {self.forgotten} now; choose another folder."
            )

    def _beside(self) -> list[str] | None:
        """Names of the references that were given; of trained ones there are more with every seed."""
        if self.trains_references:
            return None
        return [public_name(self.reference(number)) for number in self.reference_numbers()]

    def outputs(self, name: str) -> RowOutputs:
        """Outputs of "original-0" or "retrained-0" on sampled training rows and all test rows; collected once, by one process."""
        key = str(self.folder / name)
        if key not in self._outputs:
            for other in [k for k in self._outputs if Path(k).parent != self.folder]:
                del self._outputs[other]
            file = self.folder / "_outputs" / f"{name}.safetensors"
            if not file.is_file():
                with alone(file):
                    if not file.is_file():
                        write_beside(file, partial(save_file, _flat(self._collected(name))))
            self._outputs[key] = _unflat(load_file(file))
        return self._outputs[key]

    def _collected(self, name: str) -> RowOutputs:
        kind, _, number = name.rpartition("-")
        if kind == ORIGINAL:
            bench = self.bench(int(number))
            return self.row_outputs(bench, bench.original)
        bench = self._reader(self.reference(int(number)))
        return self.row_outputs(bench, bench.original)

    def _reader(self, reference: str) -> Workbench:
        """What a reference is read with: its own tokenizer or image processor."""
        processor = own_processor(reference, self.arguments.load_processor(self.original(self.seeds[0])))
        return Workbench(self._load(reference), self.forget, self.retain, self._seeded(self.seeds[0]), processor)

    def _load(self, name: str, argument: str = "retrained_model_name_or_path") -> PreTrainedModel:
        return load_as(self.arguments.auto_class, name, argument).to(self.config.device)

    def row_outputs(self, bench: Workbench, model: PreTrainedModel) -> RowOutputs:
        """Outputs on sampled training rows and on all test rows."""
        forget, retain = self.samples
        return RowOutputs(*(self.collect(bench, model, rows) for rows in (forget, retain, self.test)))

    def _look(self, name: str) -> str:
        """Read a model, and refuse a reference that knows what it should never have seen."""
        found = self.accuracies(self.outputs(name))
        if name.startswith(RETRAINED) and (found["AccDut"] or 0.0) > _KNOWN:
            model = self.reference(int(name.rpartition("-")[2]))
            raise UNSCError(
                f"retrained_model_name_or_path: {model} recognises {found['AccDut']:.0%} of the forgotten classes, so it was trained on them; leave it out."
            )
        return f"read {name}: AccDut {_percent(found['AccDut'])}, AccDrt {_percent(found['AccDrt'])}"

    # ---- audits -----------------------------------------------------------------------------------------------------

    def _examination(
        self,
        bench: Workbench,
        model: PreTrainedModel,
        outputs: RowOutputs,
        original: RowOutputs,
        numbers: Sequence[int],
    ) -> Examination:
        def batches(rows: Dataset, size: int, seed: int) -> Iterator[dict[str, Any]]:
            while True:
                yield from bench.batches(rows, size, seed=seed)
                seed += 1

        return Examination(
            model=model,
            outputs=outputs,
            original=original,
            references=[self.outputs(f"{RETRAINED}-{number}") for number in numbers],
            forgotten=self.forgotten,
            forget=self.samples[0],
            retain=self.samples[1],
            test=self.test,
            collect=lambda model, rows: self.collect(bench, model, rows, features=False),
            batches=batches,
        )

    def _calibration(self) -> dict[str, Any]:
        """How strong each audit is, chosen on the first seed's original and validation rows."""

        def make() -> dict[str, Any]:
            bench, seen = self.bench(self.seeds[0]), self.outputs(f"{ORIGINAL}-{self.seeds[0]}")
            rows = replace(seen, test=self.collect(bench, bench.original, self.validation))
            exam = self._examination(bench, bench.original, rows, rows, ())
            return calibrate(replace(exam, test=self.validation), self.audits)

        return self.record("calibration", make)

    def _told_calibration(self) -> str:
        told = [f"{name}: {found['summary']}" for name, found in self._calibration().items()]
        return f"on {len(self.validation)} validation rows, {'; '.join(told)}"

    def examine(
        self,
        bench: Workbench,
        model: PreTrainedModel,
        outputs: RowOutputs,
        original: RowOutputs,
        numbers: Sequence[int],
    ) -> dict[str, Any]:
        """Accuracies and every audit, beside the references of these numbers."""
        exam = replace(self._examination(bench, model, outputs, original, numbers), calibration=self._calibration())
        return {**self.accuracies(outputs), "audits": {audit.name: audit.run(exam) for audit in self.audits}}

    def _retrained(self, number: int) -> dict[str, Any]:
        name, first = self.reference(number), self.seeds[0]
        others = [other for other in self.reference_numbers() if other != number]
        outputs, original = self.outputs(f"{RETRAINED}-{number}"), self.outputs(f"{ORIGINAL}-{first}")
        bench = self._reader(name)
        record = self.examine(bench, bench.original, outputs, original, others)
        return {**record, "seconds": training_seconds(name), "model": public_name(name)}

    def _original(self, seed: int) -> dict[str, Any]:
        bench, outputs = self.bench(seed), self.outputs(f"{ORIGINAL}-{seed}")
        record = self.examine(bench, bench.original, outputs, outputs, self.reference_numbers())
        more = {"leak": 0.0, "seconds": None, "model": public_name(self.original(seed))}
        return {**record, **more, **({} if self._beside() is None else {"beside": self._beside()})}

    @property
    def _audited_record(self) -> str:
        return f"audited-{hashlib.sha256(str(self.audited).encode()).hexdigest()[:10]}"

    def _audited(self) -> dict[str, Any]:
        seed = self.seeds[0]
        bench, model = self.bench(seed), self._load(str(self.audited), "audited")
        theirs, ours = int(model.config.num_labels), int(bench.original.config.num_labels)
        if theirs != ours:
            raise UNSCError(f"audited: {self.audited} has {theirs} labels, its original {ours}; name the right pair.")
        outputs, original = self.row_outputs(bench, model), self.outputs(f"{ORIGINAL}-{seed}")
        cost = {"leak": bench.leak(model), "seconds": None, "steps": None}
        return {**self.examine(bench, model, outputs, original, self.reference_numbers()), **cost}

    # ---- methods ----------------------------------------------------------------------------------------------------

    def _run(self, method: Method, seed: int) -> dict[str, Any]:
        settings, bench = self._settings(method), self.bench(seed)
        model = cost = None
        if settings.get("seed") == seed:  # this very run was the try that won
            model, cost = self._take(bench, self._kept(method, settings["try"])), settings["cost"]
        if model is None:
            model = bench.run(method.run, settings["chosen"])
            cost = _cost(bench, model)
        outputs, original = self.row_outputs(bench, model), self.outputs(f"{ORIGINAL}-{seed}")
        record = {**self.examine(bench, model, outputs, original, self.reference_numbers()), **(cost or {})}
        if seed == self.seeds[0]:
            for i in range(len(method.settings)):
                self._kept(method, i).unlink(missing_ok=True)
        return record

    def _settings(self, method: Method) -> dict[str, Any]:
        """The settings a method runs with: of its tries on the first seed's original, the one that keeps most on validation rows
        among those that forget (AccDut <= 1 %); where none forgets, the one with the largest AccDrt - AccDut."""

        def choose() -> dict[str, Any]:
            if len(method.settings) == 1:
                return {"chosen": dict(method.settings[0]), "tries": []}
            tries = [
                self.record(self._try(method, i), partial(self._tried, method, i)) for i in range(len(method.settings))
            ]
            best = max(range(len(tries)), key=lambda i: _rank(tries[i]))
            told = [{name: one[name] for name in ("settings", "AccDut", "AccDrt")} for one in tries]
            chosen = tries[best]
            return {
                "chosen": chosen["settings"],
                "seed": self.seeds[0],
                "try": best,
                "cost": chosen["cost"],
                "tries": told,
            }

        return self.record(f"settings-{method.name}", choose)

    def _try(self, method: Method, i: int) -> str:
        return f"try-{method.name}-{i}-seed-{self.seeds[0]}"

    def _tried(self, method: Method, i: int) -> dict[str, Any]:
        bench = self.bench(self.seeds[0])
        model = bench.run(method.run, dict(method.settings[i]))
        seen = self.collect(bench, model, self.validation, features=False)
        kept = [c for c in range(seen.logits.shape[1]) if c not in self.forgotten]
        forget, keep = (macro_accuracy(seen.logits, seen.labels, c) or 0.0 for c in (self.forgotten, kept))
        cost = _cost(bench, model)
        self._keep(bench, model, self._kept(method, i))
        return {"settings": dict(method.settings[i]), "AccDut": forget, "AccDrt": keep, "cost": cost}

    def _told_try(self, method: Method, i: int) -> str:
        found = self.record(self._try(method, i), partial(self._tried, method, i))
        numbers = range(len(method.settings))
        known = {k: self.record(self._try(method, k), _missing) for k in numbers if self._made(self._try(method, k))}
        best = max(known, key=lambda k: (_rank(known[k]), -k))
        for k in known:
            if k != best:  # it cannot be chosen any more
                self._kept(method, k).unlink(missing_ok=True)
        return (
            f"{method.name}, try {i + 1} of {len(numbers)} on {len(self.validation)} validation rows: "
            f"AccDut {_percent(found['AccDut'])}, AccDrt {_percent(found['AccDrt'])}"
        )

    def _kept(self, method: Method, i: int) -> Path:
        return self.folder / "_kept" / f"{self._try(method, i)}.safetensors"

    def _keep(self, bench: Workbench, model: PreTrainedModel, file: Path) -> None:
        """Keep the weights that differ from the original's; a model of another shape is not kept, and made again."""
        before, now = bench.original.state_dict(), model.state_dict()
        if {name: value.shape for name, value in before.items()} != {name: value.shape for name, value in now.items()}:
            return
        changed = {name: value.cpu().clone() for name, value in now.items() if not torch.equal(value, before[name])}
        write_beside(file, partial(save_file, changed))

    def _take(self, bench: Workbench, file: Path) -> PreTrainedModel | None:
        """The model that was kept, None where there is none."""
        if not file.is_file():
            return None
        model = bench.fresh()
        weights = model.state_dict()
        with torch.no_grad():
            for name, value in load_file(file).items():
                weights[name].copy_(value)
        return model


def _rank(tried: Mapping[str, Any]) -> tuple[bool, float]:
    return round(tried["AccDut"], 9) <= _FORGOTTEN, tried["AccDrt"] - tried[
        "AccDut"
    ]  # a mean of shares may be 0.01 and a bit


def _cost(bench: Workbench, model: PreTrainedModel) -> dict[str, Any]:
    return {"seconds": bench.seconds, "steps": bench.steps, "leak": bench.leak(model)}


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def _told_training(make: Callable[[int], str], number: int, text: str) -> str:
    return f"{text}: {public_name(make(number))}"


def _missing() -> dict[str, Any]:
    raise RuntimeError("a record that was just written is gone")


def _flat(outputs: RowOutputs) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value.contiguous()
        for part in ("forget", "retain", "test")
        for name in ("logits", "features", "labels")
        if (value := getattr(getattr(outputs, part), name)) is not None
    }


def _unflat(tensors: Mapping[str, torch.Tensor]) -> RowOutputs:
    def part(name: str) -> Outputs:
        return Outputs(tensors[f"{name}.logits"], tensors.get(f"{name}.features"), tensors[f"{name}.labels"])

    return RowOutputs(part("forget"), part("retain"), part("test"))
