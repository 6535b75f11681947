"""The settings a method runs with: tried on the first seed's original, and chosen on validation rows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from ..evaluation.verdict import FORGOTTEN
from ..utils.files import write_beside
from .examination import in_words
from .experiment import Experiment
from .methods import Method
from .workbench import Workbench


class Tuning:
    """Tries of every method, and runs with the settings that were chosen.

    The model of the best try so far is kept in a file, so that it need not be made again.
    """

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self._seed = experiment.seeds[0]

    def try_name(self, method: Method, i: int) -> str:
        """Name of the record of a try."""
        return f"try-{method.name}-{i}-seed-{self._seed}"

    def attempt(self, method: Method, i: int) -> dict[str, Any]:
        """Accuracies on validation rows with the method's i-th settings, and what the run cost."""
        return self.experiment.record(self.try_name(method, i), partial(self._attempt, method, i))

    def _attempt(self, method: Method, i: int) -> dict[str, Any]:
        bench, settings = self.experiment.bench(self._seed), dict(method.settings[i])
        model = bench.run(method.run, settings)
        answers = self.experiment.collect(bench, model, self.experiment.validation, features=False)
        accuracies = {name: share or 0.0 for name, share in self.experiment.accuracies(answers).items()}
        cost = _cost(bench, model)
        _save_changes(bench, model, self._model_file(method, i))
        return {"settings": settings, **accuracies, "cost": cost}

    def attempt_line(self, method: Method, i: int) -> str:
        """Make a try, drop the models of all that can no longer be chosen, and say what it gave."""
        attempt = self.attempt(method, i)
        done = [k for k in range(len(method.settings)) if self.experiment.file(self.try_name(method, k)).is_file()]
        best = max(done, key=lambda k: (rank(self.attempt(method, k)), -k))
        for k in done:
            if k != best:
                self._model_file(method, k).unlink(missing_ok=True)
        rows = f"{len(self.experiment.validation)} validation rows"
        return f"{method.name}, try {i + 1} of {len(method.settings)} on {rows}: {in_words(attempt)}"

    def choose(self, method: Method) -> dict[str, Any]:
        """The settings a method runs with, under "chosen", and what was tried.

        Of the tries that forget (AccDut at most 1 %) it is the one that keeps most. Where none forgets it is the one
        with the largest AccDrt - AccDut.
        """

        def choose() -> dict[str, Any]:
            if len(method.settings) == 1:
                return {"chosen": dict(method.settings[0]), "tries": []}
            tries = [self.attempt(method, i) for i in range(len(method.settings))]
            best = max(range(len(tries)), key=lambda i: rank(tries[i]))
            shown = [{name: attempt[name] for name in ("settings", "AccDut", "AccDrt")} for attempt in tries]
            chosen, cost = tries[best]["settings"], tries[best]["cost"]
            return {"chosen": chosen, "seed": self._seed, "try": best, "cost": cost, "tries": shown}

        return self.experiment.record(f"settings-{method.name}", choose)

    def run(self, method: Method, seed: int) -> tuple[PreTrainedModel, dict[str, Any]]:
        """A method's model of a seed with the chosen settings, and what it cost. The try that won is not run again."""
        settings, bench = self.choose(method), self.experiment.bench(seed)
        if settings.get("seed") == seed:
            model = self.saved_model(bench, self._model_file(method, settings["try"]))
            if model is not None:
                return model, settings["cost"]
        model = bench.run(method.run, settings["chosen"])
        return model, _cost(bench, model)

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

    def drop_models(self, method: Method) -> None:
        """Delete the models of a method's tries."""
        for i in range(len(method.settings)):
            self._model_file(method, i).unlink(missing_ok=True)

    def _model_file(self, method: Method, i: int) -> Path:
        return self.experiment.folder / "_kept" / f"{self.try_name(method, i)}.safetensors"


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
