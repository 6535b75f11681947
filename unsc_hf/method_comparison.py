"""Many methods on the same models, forget sets and seeds, each audited beside retrained models; a stopped comparison goes on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel

from .comparison import sample_rows
from .config import UNSCConfig
from .data import Request, read_labels, resolve_classes
from .desk import Desk, Splits, read_splits
from .errors import UNSCError, closest
from .evaluation.accuracy import macro_accuracy
from .evaluation.audits import AUDITS, Examination
from .files import write_text
from .fingerprint import data_fingerprint
from .loading import load_as
from .methods import METHODS, Method, Workbench
from .model_card import public_name
from .outputs import RowOutputs
from .plugins import load_plugins
from .unlearning import ClassificationArguments, read_names

logger = logging.getLogger(__name__)

_FORGOTTEN = 0.01  # AccDut at or below which a class counts as forgotten
_KNOWN = 0.05  # a reference that recognises this much of the forgotten classes was trained on them
ORIGINAL, RETRAINED = "original", "retrained"


@dataclass
class ComparisonArguments:
    """What is compared: methods, audits, forget sets, seeds."""

    methods: list[str] | None = field(default=None, metadata={"help": "Methods by name; all by default."})
    audits: list[str] | None = field(default=None, metadata={"help": "Audits by name; all by default."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One run of each method for each."})
    originals: list[str] | None = field(
        default=None,
        metadata={"help": "A model for each seed (or one for all); trained with train_original otherwise."},
    )
    forget_sets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Several forget sets instead of forget_classes: names or ids joined by '+', or a .txt file of names."
        },
    )
    plugins: list[str] | None = field(
        default=None, metadata={"help": "Python files of your own that register methods or audits."}
    )
    no_intervals: bool = field(default=False, metadata={"help": "Allow a single seed, without intervals."})

    def check(self) -> None:
        """Refuse unknown names and too few seeds.

        Raises:
            UNSCError: naming what exists.
        """
        load_plugins(self.plugins)
        for option, known in (("methods", METHODS), ("audits", AUDITS)):
            for name in getattr(self, option) or ():
                if name not in known:
                    raise UNSCError(
                        f"{option}: {name!r} does not exist; closest: {closest(name, known)}; all: {', '.join(known)}."
                    )
        if len(set(self.seeds)) < 2 and not self.no_intervals:
            raise UNSCError(
                f"seeds: {len(set(self.seeds))} given, an interval needs at least two (better three); give more, or no_intervals."
            )
        if self.originals is not None and len(self.originals) not in (1, len(self.seeds)):
            raise UNSCError(
                f"originals: {len(self.originals)} given for {len(self.seeds)} seeds; give one for each, or one for all."
            )


def compare_methods(
    comparison: ComparisonArguments,
    arguments: ClassificationArguments,
    config: UNSCConfig,
    console: Console | None = None,
) -> dict[str, Any]:
    """Run what is missing in `config.output_dir`, and return everything that was found.

    Returns:
        {"forget_sets": {name: {"forgotten", "classes", "settings", "runs", "references"}}}: "runs" holds a list of results by
        method (and "original"), one for each seed; "references" one for each retrained model.

    Raises:
        UNSCError: unknown names, too few seeds, references trained on the forgotten rows, or a folder of another comparison.
    """
    comparison.check()
    console = console or Console()
    splits = read_splits(arguments, config)
    present = read_labels(splits.train, config.label_column).tolist()
    requests = _requests(comparison, arguments, splits.names, present)
    folder = Path(str(config.output_dir))
    _check_folder(folder, comparison, arguments, config, splits)
    found: dict[str, Any] = {}
    for name, request in requests.items():
        desk = _MethodDesk(comparison, arguments, config, splits, request, folder / "_runs" / name)
        found[name] = desk.run(console)
    return {
        "forget_sets": found,
        "test_rows": len(splits.test),
        "validation_rows": len(splits.validation),
        "seeds": comparison.seeds,
    }


def audit_model(
    audited: str,
    comparison: ComparisonArguments,
    arguments: ClassificationArguments,
    config: UNSCConfig,
    console: Console | None = None,
) -> dict[str, Any]:
    """Examine a model that was unlearned by anybody, by any means, beside its original and retrained models.

    Args:
        audited: Hub id or folder of the model; it may differ from the original in its weights alone.
        comparison: `originals` names the model before, else the one that `config.seed` trains; `methods` and `seeds` are not
            looked at.

    Returns:
        As `compare_methods`, with the model under its own name.

    Raises:
        UNSCError: as `compare_methods`, or a model that does not fit the data.
    """
    seed = int(config.seed)
    comparison = replace(comparison, methods=[], seeds=[seed], no_intervals=True)
    comparison.check()
    splits = read_splits(arguments, config)
    present = read_labels(splits.train, config.label_column).tolist()
    folder = Path(str(config.output_dir))
    _check_folder(folder, comparison, arguments, config, splits)
    found = {}
    for name, request in _requests(comparison, arguments, splits.names, present).items():
        desk = _MethodDesk(comparison, arguments, config, splits, request, folder / "_runs" / name)
        found[name] = desk.audit(audited, console or Console())
    return {"forget_sets": found, "test_rows": len(splits.test), "validation_rows": 0, "seeds": [seed]}


_STRANGERS = 0.8  # leak above which two models hardly share an ancestor; unprojected unlearning stays far below


class _MethodDesk(Desk):
    """One forget set, and what every method makes of it."""

    def __init__(self, comparison: ComparisonArguments, *parts: Any) -> None:
        super().__init__(comparison.seeds, comparison.originals, *parts)
        self.comparison, column = comparison, self.config.label_column
        self.audited = [sample_rows(rows, read_labels(rows, column)) for rows in (self.forget, self.retain)]
        self._outputs: dict[str, RowOutputs] = {}

    def row_outputs(self, bench: Workbench, model: PreTrainedModel) -> RowOutputs:
        """Outputs on audited training rows and on all test rows."""
        forget, retain = self.audited
        return RowOutputs(*(self.collect(bench, model, rows) for rows in (forget, retain, self.test)))

    def examine(
        self,
        bench: Workbench,
        model: PreTrainedModel,
        outputs: RowOutputs,
        original: RowOutputs,
        others: Sequence[RowOutputs],
    ) -> dict[str, Any]:
        """Accuracies and every audit."""

        def batches(rows: Dataset, size: int, seed: int) -> Iterator[dict[str, Any]]:
            while True:
                yield from bench.batches(rows, size, seed=seed)
                seed += 1

        exam = Examination(
            model=model,
            outputs=outputs,
            original=original,
            references=others,
            forgotten=self.forgotten,
            forget=self.audited[0],
            retain=self.audited[1],
            test=self.test,
            collect=lambda model, rows: self.collect(bench, model, rows, features=False),
            batches=batches,
        )
        audits = {name: AUDITS[name].run(exam) for name in self.comparison.audits or AUDITS}
        return {**self.accuracies(outputs), "audits": audits}

    # ---- runs -------------------------------------------------------------------------------------------------------

    def run(self, console: Console) -> dict[str, Any]:
        """Run what has no record yet."""
        methods = [METHODS[name] for name in self.comparison.methods or METHODS]
        references = self._references(console)
        settings = {method.name: self._settings(method, console) for method in methods}
        runs: dict[str, list[Any]] = {}
        for seed in self.seeds:
            for name in (ORIGINAL, *(method.name for method in methods)):
                record = self.record(f"{name}-{seed}", partial(self._one, name, seed, settings, references))
                runs.setdefault(name, []).append(record)
                console.print(f"{name} (seed {seed}): AccDut {record['AccDut']:.1%}, AccDrt {record['AccDrt']:.1%}")
        return {
            "forgotten": self.forgotten,
            "classes": self.names,
            "settings": settings,
            "runs": {name: runs[name] for name in (ORIGINAL, *(method.name for method in methods))},
            "references": [self.record(f"{RETRAINED}-{i}", _missing) for i in range(len(references))],
        }

    def audit(self, audited: str, console: Console) -> dict[str, Any]:
        """Examine one model that is already there, and its original."""
        references, seed = self._references(console), self.seeds[0]
        bench, others = self.bench(seed), [reference() for reference in references]

        def examined() -> dict[str, Any]:
            model = load_as(self.arguments.auto_class, audited, "audited").to(self.config.device)
            labels = int(model.config.num_labels)
            if labels != int(bench.original.config.num_labels):
                raise UNSCError(
                    f"audited: {audited} has {labels} labels, its original {bench.original.config.num_labels}; name the right pair."
                )
            outputs = self.row_outputs(bench, model)
            cost = {"leak": bench.leak(model), "seconds": None, "steps": None}
            return {**self.examine(bench, model, outputs, self._original(seed), others), **cost}

        key = hashlib.sha256(audited.encode()).hexdigest()[:10]
        runs = {
            ORIGINAL: [self.record(f"{ORIGINAL}-{seed}", partial(self._one, ORIGINAL, seed, {}, references))],
            public_name(audited): [self.record(f"audited-{key}", examined)],
        }
        leak = runs[public_name(audited)][0]["leak"]
        if leak is not None and leak > _STRANGERS:
            console.print(
                f"warning: {public_name(audited)} has little in common with this original (leak {leak:.2g}): was it made from another one?"
            )
        retrained = [self.record(f"{RETRAINED}-{i}", _missing) for i in range(len(references))]
        return {
            "forgotten": self.forgotten,
            "classes": self.names,
            "settings": {},
            "runs": runs,
            "references": retrained,
        }

    def _references(self, console: Console) -> list[Callable[[], RowOutputs]]:
        """Outputs of the retrained models, collected when first asked for; each is audited with the others as its references."""
        folders = self.references()
        if not folders:
            console.print("No retrained references: nothing can be said about 'removed', and no band is drawn.")

        def outputs(name: str) -> RowOutputs:
            if name not in self._outputs:
                bench = self.bench(self.seeds[0])
                model = load_as(self.arguments.auto_class, name, "retrained_model_name_or_path").to(self.config.device)
                self._outputs[name] = self.row_outputs(bench, model)
            return self._outputs[name]

        def examine(name: str) -> dict[str, Any]:
            bench = self.bench(self.seeds[0])
            model = load_as(self.arguments.auto_class, name, "retrained_model_name_or_path").to(self.config.device)
            knows = self.accuracies(outputs(name))["AccDut"]
            if knows is not None and knows > _KNOWN:
                raise UNSCError(
                    f"retrained_model_name_or_path: {name} recognises {knows:.0%} of the forgotten classes, so it was trained on them; leave it out."
                )
            others = [outputs(other) for other in folders if other != name]
            record = self.examine(bench, model, outputs(name), self._original(self.seeds[0]), others)
            return {**record, "seconds": _training_seconds(name)}

        for i, name in enumerate(folders):
            self.record(f"{RETRAINED}-{i}", partial(examine, name))
        return [partial(outputs, name) for name in folders]

    def _original(self, seed: int) -> RowOutputs:
        key = f"{ORIGINAL}-{seed}"
        if key not in self._outputs:
            bench = self.bench(seed)
            self._outputs[key] = self.row_outputs(bench, bench.original)
        return self._outputs[key]

    def _one(
        self, name: str, seed: int, settings: Mapping[str, Any], references: Sequence[Callable[[], RowOutputs]]
    ) -> dict[str, Any]:
        bench, others = self.bench(seed), [reference() for reference in references]
        original = self._original(seed)
        if name == ORIGINAL:
            return {**self.examine(bench, bench.original, original, original, others), "leak": 0.0, "seconds": None}
        model = bench.run(METHODS[name].run, settings[name]["chosen"])
        cost = {"seconds": bench.seconds, "steps": bench.steps, "leak": bench.leak(model)}
        return {**self.examine(bench, model, self.row_outputs(bench, model), original, others), **cost}

    def _settings(self, method: Method, console: Console) -> dict[str, Any]:
        """The settings a method runs with: of its tries on the first seed's original, the one that keeps most on validation rows
        among those that forget (AccDut <= 1 %); where none forgets, the one with the largest AccDrt - AccDut."""

        def choose() -> dict[str, Any]:
            if len(method.settings) == 1:
                return {"chosen": dict(method.settings[0]), "tries": []}
            bench = self.bench(self.seeds[0])
            tries: list[dict[str, Any]] = []
            for tried in method.settings:
                model = bench.run(method.run, dict(tried))
                seen = self.collect(bench, model, self.validation, features=False)
                kept = [c for c in range(seen.logits.shape[1]) if c not in self.forgotten]
                forget, keep = (macro_accuracy(seen.logits, seen.labels, c) or 0.0 for c in (self.forgotten, kept))
                tries.append({"settings": dict(tried), "AccDut": forget, "AccDrt": keep})
            best = max(tries, key=lambda t: (t["AccDut"] <= _FORGOTTEN, t["AccDrt"] - t["AccDut"]))
            console.print(f"{method.name}: chose {best['settings']} on {len(self.validation)} validation rows")
            return {"chosen": best["settings"], "tries": tries}

        return self.record(f"settings-{method.name}", choose)


def _missing() -> dict[str, Any]:
    raise RuntimeError("a record that was just written is gone")


def _training_seconds(folder: str) -> float | None:
    file = Path(folder) / "training.json"
    return json.loads(file.read_text(encoding="utf-8")).get("seconds") if file.is_file() else None


def _requests(
    comparison: ComparisonArguments, arguments: ClassificationArguments, names: list[str], present: Sequence[int]
) -> dict[str, Request]:
    """Forget sets by the name of their folder."""
    if comparison.forget_sets is None:
        request = arguments.request()
        if request is None or request.forget_classes is None:
            raise UNSCError("forget_classes: not given; name the classes to forget (or forget_sets, several at once).")
        sets = {"+".join(str(c) for c in request.forget_classes): list(request.forget_classes)}
    else:
        sets = {
            Path(text).stem if text.endswith(".txt") else text: read_names(
                [text] if text.endswith(".txt") else text.split("+")
            )
            for text in comparison.forget_sets
        }
    found = {name: Request(forget_classes=tuple(resolve_classes(c, names, present))) for name, c in sets.items()}
    return {"".join(c if c.isalnum() or c in "+-_ " else "_" for c in name)[:80]: r for name, r in found.items()}


def _check_folder(
    folder: Path,
    comparison: ComparisonArguments,
    arguments: ClassificationArguments,
    config: UNSCConfig,
    splits: Splits,
) -> None:
    """Refuse a folder whose records come from other models, data or options; methods, audits and seeds may be added.

    Raises:
        UNSCError: naming what differs.
    """
    given = {**vars(arguments), "originals": comparison.originals if len(comparison.seeds) > 1 else None}
    ignored = {
        "references_dir",
        "retrained_model_name_or_path",
        "cache_dir",
        "license",
        "controls",
        "statistics_dir",
        "originals",
    }
    options = {
        name: getattr(config, name)
        for name in ("energy", "subspace_rule", "learning_rate", "max_steps", "max_leak", "optim")
    }
    now = {
        "data": data_fingerprint(splits.train)[:16] + data_fingerprint(splits.test)[:16],
        "audits": sorted(comparison.audits or AUDITS),
        "options": hashlib.sha256(
            json.dumps(
                {**{k: v for k, v in given.items() if k not in ignored}, **options}, sort_keys=True, default=str
            ).encode()
        ).hexdigest()[:16],
    }
    file = folder / "_runs" / "identity.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        for name, value in now.items():
            if before.get(name) != value:
                raise UNSCError(
                    f"output_dir: {folder} holds a comparison with other {name} ({before.get(name)} there, {value} now); choose another folder."
                )
    else:
        write_text(file, json.dumps(now))
