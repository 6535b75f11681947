"""Audits of a model beside its original and retrained models, with what each of them answers kept in files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..errors import UNSCError
from ..evaluation.audits import Audit, Examination, calibrate
from ..evaluation.engine import EvaluationRows, accuracies
from ..models.loading import own_processor
from ..models.outputs import Outputs, RowOutputs
from ..reporting.model_card import public_name
from ..utils.files import alone, write_beside
from .controls import KNOWN, training_seconds
from .experiment import Experiment
from .summary import ORIGINAL, RETRAINED
from .workbench import Workbench


class Examiner:
    """Runs the audits of one experiment.

    Args:
        experiment: models and rows.
        audits: what is run.
    """

    def __init__(self, experiment: Experiment, audits: Sequence[Audit]) -> None:
        self.experiment, self.audits = experiment, audits
        column = experiment.config.label_column
        self._rows = EvaluationRows.sample(experiment.forget, experiment.retain, experiment.test, column)

    def outputs(self, name: str) -> RowOutputs:
        """Outputs of "original-0" or "retrained-0" on sampled training rows and all test rows.

        They are collected once, by one process, and kept in a file.
        """
        file = self.experiment.folder / "_outputs" / f"{name}.safetensors"
        if not file.is_file():
            with alone(file):
                if not file.is_file():
                    kind, _, number = name.rpartition("-")
                    bench = self.experiment.bench(int(number)) if kind == ORIGINAL else self._reader(int(number))
                    write_beside(file, partial(save_file, _to_tensors(self.row_outputs(bench, bench.original))))
        return _from_tensors(load_file(file))

    def row_outputs(self, bench: Workbench, model: PreTrainedModel) -> RowOutputs:
        """Outputs on sampled training rows and on all test rows."""
        return self._rows.outputs(partial(self.experiment.collect, bench, model))

    def check_outputs(self, name: str) -> str:
        """Read a model, and refuse a reference that knows what it should never have seen.

        Returns:
            A line with its accuracies.

        Raises:
            UNSCError: naming the reference.
        """
        shares = accuracies(self.outputs(name), self.experiment.forgotten)
        if name.startswith(RETRAINED) and (shares["AccDut"] or 0.0) > KNOWN:
            model = self.experiment.reference(int(name.rpartition("-")[2]))
            raise UNSCError(
                f"retrained_model_name_or_path: {model} recognises {shares['AccDut']:.0%} of the forgotten classes, "
                "so it was trained on them; leave it out."
            )
        return f"read {name}: {in_words(shares)}"

    def _reader(self, number: int) -> Workbench:
        """What a reference is read with: its own tokenizer or image processor."""
        experiment, name = self.experiment, self.experiment.reference(number)
        first = experiment.seeds[0]
        processor = own_processor(name, experiment.arguments.load_processor(experiment.original(first)))
        model, config = experiment.load(name), experiment.seeded(first)
        return Workbench(model, experiment.forget, experiment.retain, config, processor)

    def _examination(self, bench: Workbench, model: PreTrainedModel, outputs: RowOutputs, seed: int) -> Examination:
        """What audits ask of a model; it knows of no retrained models."""

        def batches(rows: Dataset, size: int, seed: int) -> Iterator[dict[str, Any]]:
            while True:
                yield from bench.batches(rows, size, seed=seed)
                seed += 1

        return Examination(
            model=model,
            outputs=outputs,
            original=self.outputs(f"{ORIGINAL}-{seed}"),
            references=[],
            forgotten=self.experiment.forgotten,
            forget=self._rows.forget,
            retain=self._rows.retain,
            test=self._rows.test,
            collect=lambda model, rows: self.experiment.collect(bench, model, rows, features=False),
            batches=batches,
        )

    def calibration(self) -> dict[str, Any]:
        """How strong each audit is, chosen on the first seed's original and validation rows."""

        def choose() -> dict[str, Any]:
            seed, validation = self.experiment.seeds[0], self.experiment.validation
            bench = self.experiment.bench(seed)
            answers = self.experiment.collect(bench, bench.original, validation)
            outputs = replace(self.outputs(f"{ORIGINAL}-{seed}"), test=answers)
            exam = self._examination(bench, bench.original, outputs, seed)
            return calibrate(replace(exam, original=outputs, test=validation), self.audits)

        return self.experiment.record("calibration", choose)

    def calibration_line(self) -> str:
        """What was chosen, for people."""
        chosen = [f"{name}: {choice['summary']}" for name, choice in self.calibration().items()]
        return f"on {len(self.experiment.validation)} validation rows, {'; '.join(chosen)}"

    def examine(
        self,
        bench: Workbench,
        model: PreTrainedModel,
        seed: int,
        outputs: RowOutputs | None = None,
        without: int | None = None,
    ) -> dict[str, Any]:
        """Accuracies and every audit.

        Args:
            bench: prepares rows for the model.
            seed: of the original it is held against.
            outputs: what the model answers, where that is known.
            without: number of a retrained model that it is not held against: itself.
        """
        outputs = self.row_outputs(bench, model) if outputs is None else outputs
        numbers = [number for number in self.experiment.reference_numbers() if number != without]
        references = [self.outputs(f"{RETRAINED}-{number}") for number in numbers]
        exam = self._examination(bench, model, outputs, seed)
        exam = replace(exam, references=references, calibration=self.calibration())
        audits = {audit.name: audit.run(exam) for audit in self.audits}
        return {**accuracies(outputs, self.experiment.forgotten), "audits": audits}

    # ---- models that no method made ---------------------------------------------------------------------------------

    def examine_reference(self, number: int) -> dict[str, Any]:
        """A retrained model, beside the other ones."""
        name, bench = self.experiment.reference(number), self._reader(number)
        outputs = self.outputs(f"{RETRAINED}-{number}")
        result = self.examine(bench, bench.original, self.experiment.seeds[0], outputs, without=number)
        return {**result, "seconds": training_seconds(name), "model": public_name(name)}

    def examine_original(self, seed: int) -> dict[str, Any]:
        """The original of a seed."""
        bench, name = self.experiment.bench(seed), public_name(self.experiment.original(seed))
        result = self.examine(bench, bench.original, seed, self.outputs(f"{ORIGINAL}-{seed}"))
        return {**result, "leak": 0.0, "seconds": None, "model": name}

    def examine_other(self, name: str) -> dict[str, Any]:
        """A model that was unlearned by anybody.

        Raises:
            UNSCError: it has another number of labels than the original.
        """
        seed = self.experiment.seeds[0]
        bench, model = self.experiment.bench(seed), self.experiment.load(name, "audited")
        labels, expected = int(model.config.num_labels), int(bench.original.config.num_labels)
        if labels != expected:
            raise UNSCError(f"audited: {name} has {labels} labels, its original {expected}; name the right pair.")
        return {**self.examine(bench, model, seed), "leak": bench.leak(model), "seconds": None, "steps": None}


def in_words(accuracies: Mapping[str, Any]) -> str:
    """Both accuracies, for people."""
    shares = (accuracies[name] for name in ("AccDut", "AccDrt"))
    words = ("–" if share is None else f"{share:.1%}" for share in shares)
    return "AccDut {}, AccDrt {}".format(*words)


def _to_tensors(outputs: RowOutputs) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": value.contiguous()
        for part in ("forget", "retain", "test")
        for name in ("logits", "features", "labels")
        if (value := getattr(getattr(outputs, part), name)) is not None
    }


def _from_tensors(tensors: Mapping[str, torch.Tensor]) -> RowOutputs:
    def part(name: str) -> Outputs:
        return Outputs(tensors[f"{name}.logits"], tensors.get(f"{name}.features"), tensors[f"{name}.labels"])

    return RowOutputs(part("forget"), part("retain"), part("test"))
