"""What comparisons and studies work from: models of each seed, rows of one request, records that survive a kill."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel
from transformers.hf_argparser import HfArg

from ..config import UNSCConfig
from ..data.columns import class_names, read_labels
from ..data.copies import without_overlap
from ..data.selection import Request, hold_out, resolve_classes
from ..errors import UNSCError, closest
from ..evaluation.accuracy import kept_classes, macro_accuracy
from ..models.loading import load_as
from ..models.outputs import Outputs, collect_outputs
from ..reporting.model_card import public_name
from ..reporting.results import finite
from ..utils.files import alone, write_text
from ..utils.fingerprint import data_fingerprint, file_hash
from .arguments import ClassificationArguments
from .plugins import load_plugins
from .references.training import train_model
from .workbench import Workbench

_VALIDATION_SHARE = 0.2  # of the test rows, where the data set has no validation split

# Arguments that may differ between two runs which share a folder.
_UNBOUND = (
    "references_dir", "cache_dir", "license", "controls", "statistics_dir", "retrained_model_name_or_path",
    "forget_classes",
)  # fmt: skip
# Options of `UNSCConfig` that change results, besides its seed.
_OPTIONS = (
    "energy", "subspace_rule", "subspace_size", "target_modules", "rows_per_direction", "pseudo_labels",
    "pseudo_label_temperature", "objective", "objective_args", "learning_rate", "lr_doubling_steps", "max_steps",
    "optim", "displacement_decay", "target_forget_accuracy", "max_leak", "max_flips", "check_steps",
    "validation_fraction", "per_device_train_batch_size",
)  # fmt: skip


@dataclass
class RunArguments:
    """Seeds of a comparison or a study, and the model of each."""

    seeds: list[int] = HfArg(default_factory=lambda: [0, 1, 2], help="Each run is made for each seed.")
    originals: list[str] | None = HfArg(
        default=None, help="A model for each seed (or one for all); trained with train_original otherwise."
    )
    plugins: list[str] | None = HfArg(
        default=None, help="Python files of your own that register methods, audits or studies."
    )

    kind = "study"  # or "comparison"

    def check(self) -> None:
        """Load the plugins; UNSCError for seeds or originals that do not fit, and for a launcher's many processes."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world > 1:  # they would wait for each other's files
            raise UNSCError(
                f"a {self.kind} was launched as {world} processes; start it once (--jobs spreads a comparison)."
            )
        load_plugins(self.plugins)
        originals, seeds = self.originals, self.seeds
        if not seeds:
            raise UNSCError("seeds: none given; name at least one, better three.")
        if len(set(seeds)) < len(seeds):
            raise UNSCError(f"seeds: {seeds} names one twice; give each once.")
        if originals is not None and len(originals) not in (1, len(seeds)):
            raise UNSCError(
                f"originals: {len(originals)} given for {len(seeds)} seeds; give one for each, or one for all."
            )


def read_data(arguments: ClassificationArguments, config: UNSCConfig, data: DatasetDict | None = None) -> DatasetDict:
    """Splits "train", "validation" and "test" of `data`, or of the data set that `arguments` name.

    Without a validation split, a fifth of the test rows becomes one.
    """
    data = arguments.load(config) if data is None else data
    for name in ("train", "test"):
        if name not in data:
            raise UNSCError(f"dataset: has no split {name!r}, only {', '.join(data)}; a comparison needs both.")
    if "validation" in data:
        return data
    labels = read_labels(data["test"], config.label_column)
    test, validation = hold_out(data["test"], _VALIDATION_SHARE, labels, len(labels), seed=0)
    return DatasetDict(train=data["train"], validation=validation, test=test)


@dataclass
class Experiment:
    """One request: its models, its rows, and the records of its runs, which `folder` holds.

    Attributes:
        originals: a model for each seed, or one for all; None takes `model_name_or_path` or trains them.
        data: splits "train", "validation" and "test".
        request: classes to forget, by id; None takes those that `arguments` name.
        names: of the classes, by id.
        forget, retain: training rows.
        forgotten: ids of the classes to forget.
    """

    seeds: Sequence[int]
    originals: Sequence[str] | None
    arguments: ClassificationArguments
    config: UNSCConfig
    data: DatasetDict
    folder: Path
    request: Request | None = None

    def __post_init__(self) -> None:
        column = self.config.label_column
        self.train, self.validation, self.test = (self.data[name] for name in ("train", "validation", "test"))
        present = read_labels(self.train, column).tolist()
        self.names = class_names(self.train, column) or [str(i) for i in range(max(present) + 1)]
        if self.request is None:
            asked = self.arguments.request()
            if asked is None or asked.forget_classes is None:
                raise UNSCError("forget_classes: not given; name the classes to forget.")
            classes = resolve_classes(asked.forget_classes, self.names, present)
            self.request = Request(forget_classes=tuple(classes))
        self.forget, retain = self.request.split(self.train, column)
        self.retain = without_overlap(self.forget, retain, self.config.drop_overlap, self.config.text_columns)
        self.forgotten = sorted(set(read_labels(self.forget, column).tolist()))
        self._bench: tuple[int, Workbench] | None = None

    # ---- models -----------------------------------------------------------------------------------------------------
    def original(self, seed: int) -> str:
        """Folder or id of the original of a seed; it is trained where that was asked for."""
        if self.trains_originals:
            return self._trained(self.train, "original", seed)
        given: Sequence[str | None] = self.originals or [self.arguments.model_name_or_path]
        name = given[list(self.seeds).index(seed) if len(given) > 1 else 0]
        if name is None:
            raise UNSCError("originals: not given; name the models to unlearn, or use train_original.")
        return str(name)

    @property
    def trains_originals(self) -> bool:
        """Whether originals are trained where they are not there yet."""
        given = self.originals or self.arguments.model_name_or_path
        return self.arguments.train_original or (self.arguments.quickstart and not given)

    @property
    def trains_references(self) -> bool:
        """Whether retrained models are."""
        wanted = self.arguments.train_retrained or self.arguments.quickstart
        return wanted and not self.arguments.retrained_model_name_or_path

    @property
    def reference_numbers(self) -> list[int]:
        """Of the retrained models: places in the list that was given, or the seeds they are trained with."""
        given = self.arguments.retrained_model_name_or_path or ()
        return list(self.seeds) if self.trains_references else list(range(len(given)))

    def reference(self, number: int) -> str:
        """Folder or id of a retrained model."""
        if self.trains_references:
            return self._trained(self.retain, "retrained", number)
        return str((self.arguments.retrained_model_name_or_path or ())[number])

    def _trained(self, rows: Dataset, kind: str, seed: int) -> str:
        plan, arguments = self.arguments.plan(self.seeded(seed)), self.arguments
        return str(
            train_model(
                rows, plan, arguments.references_dir, kind, self.names, self.config.label_column, vocabulary=self.train
            )
        )

    def load(self, name: str, argument: str = "retrained_model_name_or_path") -> PreTrainedModel:
        """A model by folder or id, on the device. `argument` is what an error names."""
        return load_as(self.arguments.plan_class.auto_class, name, argument).to(self.config.device)

    def seeded(self, seed: int, **options: Any) -> UNSCConfig:
        """The options with another seed, and with other values where given."""
        config = deepcopy(self.config)
        for name, value in {"output_dir": str(self.folder / "_scratch"), "seed": seed, **options}.items():
            setattr(config, name, value)
        return config

    def bench(self, seed: int) -> Workbench:
        """The workbench of a seed. The last one is kept."""
        if self._bench is None or self._bench[0] != seed:
            self._bench = None  # not two in memory
            self._bench = seed, self.new_bench(seed, self.forget, self.retain)
        return self._bench[1]

    def new_bench(self, seed: int, forget: Dataset, retain: Dataset, **options: Any) -> Workbench:
        """A workbench of a seed's original with rows of one's own; it is not kept."""
        name, config = self.original(seed), self.seeded(seed, **options)
        return Workbench(self.load(name, "originals"), forget, retain, config, self.arguments.load_processor(name))

    # ---- measuring --------------------------------------------------------------------------------------------------
    def labels(self, rows: Dataset) -> np.ndarray:
        """Class ids of rows."""
        return read_labels(rows, self.config.label_column)

    def collect(self, bench: Workbench, model: PreTrainedModel, rows: Dataset, features: bool = True) -> Outputs:
        """Outputs of a model on raw rows."""
        size = self.config.per_device_eval_batch_size
        ready, collate = bench.reader.prepare(rows), bench.reader.collate
        return collect_outputs(model, ready, collate, features=features, batch_size=size)

    def accuracies(self, outputs: Outputs) -> dict[str, float | None]:
        """AccDut and AccDrt: accuracy on rows of the forgotten and of the other classes, mean over classes."""
        kept = kept_classes(outputs.logits.shape[1], self.forgotten)
        return {
            name: macro_accuracy(outputs.logits, outputs.labels, classes)
            for name, classes in (("AccDut", self.forgotten), ("AccDrt", kept))
        }

    # ---- records ----------------------------------------------------------------------------------------------------
    def file(self, name: str) -> Path:
        """Of a record."""
        return self.folder / f"{name}.json"

    def read(self, name: str) -> dict[str, Any]:
        """A record that was made."""
        content: dict[str, Any] = json.loads(self.file(name).read_text(encoding="utf-8"))
        return content

    def record(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What `make` gives, kept in a file: made once, by one process."""
        once(self.file(name), lambda file: write_text(file, json.dumps(finite(make()))))
        return self.read(name)

    def claim(self, folder: Path, what: str, **more: Any) -> None:
        """Refuse a folder whose records depend on other models, data or options; UNSCError names what differs.

        Seeds may be added.
        """
        given = {name: value for name, value in vars(self.arguments).items() if name not in _UNBOUND}
        options = {**given, **{name: getattr(self.config, name) for name in _OPTIONS}}
        text = json.dumps(options, sort_keys=True, default=str)
        data = "".join(data_fingerprint(rows)[:16] for rows in (self.train, self.test))
        now = {
            "data": data,
            "the origin of its models": "trained" if self.trains_originals else "given",
            "classes": self.forgotten,
            "options": hashlib.sha256(text.encode()).hexdigest()[:16],
            **more,
        }
        if not self.trains_originals:
            now |= {f"the original of seed {seed}": identity(self.original(seed)) for seed in self.seeds}
        if not self.trains_references:
            names = map(identity, map(self.reference, self.reference_numbers))
            now["the retrained models"] = ", ".join(names) or "none"
        file = folder / "_runs" / "identity.json"
        with alone(file):
            before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            for name, value in now.items():
                if before.get(name, value) != value:
                    raise UNSCError(
                        f"output_dir: {folder} holds a {what} that differs in {name} ({before[name]} there, {value} "
                        "now); choose another folder."
                    )
            write_text(file, json.dumps({**before, **now}))


def once(file: Path, make: Callable[[Path], None]) -> Path:
    """The file; where it is missing, `make` writes it. Other processes wait meanwhile."""
    if not file.is_file():
        with alone(file):
            if not file.is_file():
                make(file)
    return file


def check_names(option: str, names: Iterable[str] | None, known: Mapping[str, Any]) -> None:
    """Refuse names that nothing was registered under; UNSCError names what exists."""
    for name in names or ():
        if name not in known:
            raise UNSCError(
                f"{option}: {name!r} does not exist; closest: {closest(name, known)}; all: {', '.join(known)}."
            )


def identity(model: str) -> str:
    """The public name of a model, and of a folder a hash of its weights: another model may have the same name."""
    files = sorted(Path(model).glob("*.safetensors"))
    digest = hashlib.sha256("".join(map(file_hash, files)).encode()).hexdigest()[:10]
    return f"{public_name(model)} {digest}" if files else public_name(model)
