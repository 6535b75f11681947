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
    """Makes the record of every model of one experiment, by its audits."""

    def __init__(self, experiment: Experiment, audits: Sequence[Audit]) -> None:
        self.experiment, self.audits = experiment, audits
        column = experiment.config.label_column
        self._rows = EvaluationRows.sample(experiment.forget, experiment.retain, experiment.test, column)

    def outputs(self, name: str) -> RowOutputs:
        """Outputs of "original-0" or "retrained-0" on sampled training rows and all test rows, kept in a file."""
        file = self.experiment.folder / "_outputs" / f"{name}.safetensors"
        if not file.is_file():
            with alone(file):
                if not file.is_file():
                    bench = self._bench(name)
                    write_beside(file, partial(save_file, _to_tensors(self.row_outputs(bench, bench.original))))
        return _from_tensors(load_file(file))

    def row_outputs(self, bench: Workbench, model: PreTrainedModel) -> RowOutputs:
        """Outputs on sampled training rows and on all test rows."""
        return self._rows.outputs(partial(self.experiment.collect, bench, model))

    def check_outputs(self, name: str) -> str:
        """Read a model; a line with its accuracies. UNSCError: a reference that knows the forgotten classes."""
        shares = accuracies(self.outputs(name), self.experiment.forgotten)
        if name.startswith(RETRAINED) and (shares["AccDut"] or 0.0) > KNOWN:
            model = self.experiment.reference(int(name.rpartition("-")[2]))
            raise UNSCError(
                f"retrained_model_name_or_path: {model} recognises {shares['AccDut']:.0%} of the forgotten classes, "
                "so it was trained on them; leave it out."
            )
        return f"read {name}: {in_words(shares)}"

    def _bench(self, name: str) -> Workbench:
        """What "original-0" or "retrained-0" is read with; each has its own tokenizer or image processor."""
        experiment, (kind, _, number) = self.experiment, name.rpartition("-")
        if kind == ORIGINAL:
            return experiment.bench(int(number))
        first, reference = experiment.seeds[0], experiment.reference(int(number))
        processor = own_processor(reference, experiment.arguments.load_processor(experiment.original(first)))
        model, config = experiment.load(reference), experiment.seeded(first)
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

    def examine(self, bench: Workbench, model: PreTrainedModel, seed: int, name: str | None = None) -> dict[str, Any]:
        """The record of one model, whoever made it: accuracies and every audit.

        Args:
            bench: prepares rows for the model.
            seed: of the original it is held against.
            name: of an original or retrained model, whose outputs are kept. It is not held against itself.
        """
        outputs = self.row_outputs(bench, model) if name is None else self.outputs(name)
        others = [f"{RETRAINED}-{number}" for number in self.experiment.reference_numbers()]
        references = [self.outputs(other) for other in others if other != name]
        exam = self._examination(bench, model, outputs, seed)
        exam = replace(exam, references=references, calibration=self.calibration())
        audits = {audit.name: audit.run(exam) for audit in self.audits}
        return {**accuracies(outputs, self.experiment.forgotten), "audits": audits}

    # ---- models that no method made ---------------------------------------------------------------------------------
    def examine_given(self, name: str) -> dict[str, Any]:
        """The original of a seed ("original-0"), or a retrained model ("retrained-0") beside the other ones."""
        bench, (kind, _, number) = self._bench(name), name.rpartition("-")
        if kind == ORIGINAL:
            seed, path = int(number), self.experiment.original(int(number))
            cost = {"leak": 0.0, "seconds": None}
        else:
            seed, path = self.experiment.seeds[0], self.experiment.reference(int(number))
            cost = {"seconds": training_seconds(path)}
        return {**self.examine(bench, bench.original, seed, name), **cost, "model": public_name(path)}

    def examine_other(self, name: str) -> dict[str, Any]:
        """A model that was unlearned by anybody; UNSCError where it has other labels than the original."""
        seed = self.experiment.seeds[0]
        bench, model = self.experiment.bench(seed), self.experiment.load(name, "audited")
        labels, expected = int(model.config.num_labels), int(bench.original.config.num_labels)
        if labels != expected:
            raise UNSCError(f"audited: {name} has {labels} labels, its original {expected}; name the right pair.")
        return {**self.examine(bench, model, seed), "leak": bench.leak(model), "seconds": None, "steps": None}


def in_words(accuracies: Mapping[str, Any]) -> str:
    """Both accuracies, for people."""
    shares = {name: accuracies[name] for name in ("AccDut", "AccDrt")}
    return ", ".join(f"{name} {'–' if share is None else f'{share:.1%}'}" for name, share in shares.items())


def _to_tensors(outputs: RowOutputs) -> dict[str, torch.Tensor]:
    tensors = {f"{part}.{name}": value for part, of in vars(outputs).items() for name, value in vars(of).items()}
    return {name: value.contiguous() for name, value in tensors.items() if value is not None}


def _from_tensors(tensors: Mapping[str, torch.Tensor]) -> RowOutputs:
    def part(name: str) -> Outputs:
        return Outputs(tensors[f"{name}.logits"], tensors.get(f"{name}.features"), tensors[f"{name}.labels"])

    return RowOutputs(part("forget"), part("retain"), part("test"))
