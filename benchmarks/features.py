"""Forgetting in the features: a probe on every layer, prototypes, relearning and membership, beside retrained models.

    python benchmarks/features.py --dataset_name DATA --originals MODEL_SEED0 MODEL_SEED1 --retrained REFERENCE ... \
        --forget Shirt --output_dir OUT
    python benchmarks/features.py --merge OUT --baseline docs/results/fashion_mnist_shirt/comparison.json \
        --forget Shirt --output_dir OUT

Every original is unlearned by UNSC alone, with features erased at the default strength ("default"), and with strengths
that bring a probe on *validation* rows into the retrained models' band ("band"), with full weights and in LoRA
adapters. Test rows choose nothing. Finished runs are kept in `OUT/runs.json`, so a stopped benchmark goes on. Several
processes with other `--seeds` write into folders of their own, and `--merge` puts them together: `OUT/features.json`,
`OUT/table.md`, `OUT/front.png`. What a comparison of methods on the same models has already measured, on the same test
rows by the same audits, is taken from its file (`--baseline`).
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from unsc_hf import UNSCConfig, UNSCTrainer, split_dataset
from unsc_hf.comparison.arguments import read_names
from unsc_hf.data.columns import read_labels
from unsc_hf.data.selection import at_most_per_class, hold_out
from unsc_hf.erasure.bands import ProbeBands
from unsc_hf.evaluation.accuracy import macro_accuracy
from unsc_hf.evaluation.audits import AUDITS, Examination
from unsc_hf.evaluation.engine import sample_rows
from unsc_hf.evaluation.verdict import Band
from unsc_hf.models.loading import load_as, own_processor
from unsc_hf.models.outputs import Outputs, RowOutputs, collect_outputs
from unsc_hf.reporting.model_card import versions
from unsc_hf.reporting.plots import BLUE, GREEN, GREY, ORANGE
from unsc_hf.reporting.results import finite
from unsc_hf.utils.files import write_text

COLUMNS = {
    "AccDut": "AccDut", "AccDrt": "AccDrt", "probe.head": "probe, head's input",
    **{f"probe.layer_{i:02d}": f"layer {i}" for i in range(1, 13)}, "prototype.shots_10": "10-shot prototype",
    "relearning.area": "relearning area", "membership.auc": "membership AUC", "readers.network": "a network reads",
    "readers.neighbours": "15 neighbours read",
    "readers.quadratic": "a quadratic reads", "leak": "leak", "seconds": "seconds",
}  # fmt: skip
ARMS = ("unsc", "default", "band")
KINDS = ("full", "adapters")
PHASES = ("bands", "unlearn", "examine")
AUDITS_HERE = ("probe", "prototype", "relearning", "membership", "readers")


class Experiment:
    """Rows and references of one request."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        parts = {file.stem: str(file) for file in Path(options.dataset_name).glob("*.parquet")}
        data = load_dataset("parquet", data_files=parts)
        self.test: Dataset = data["test"]
        if "validation" not in data:  # as comparisons of methods do
            labels = read_labels(data["test"])
            self.test = hold_out(data["test"], 0.2, labels, len(labels), seed=0)[0]
        self.forget, self.retain = split_dataset(data["train"], forget_classes=read_names(options.forget))
        self.forgotten = sorted(set(read_labels(self.forget).tolist()))
        self.audited = [sample_rows(rows, read_labels(rows)) for rows in (self.forget, self.retain)]
        self.folder = Path(options.output_dir)
        texts = "text" in data["train"].column_names
        self.model_class = AutoModelForSequenceClassification if texts else AutoModelForImageClassification
        self.processor = (AutoTokenizer if texts else AutoImageProcessor).from_pretrained(options.originals[0])

    def trainer(
        self, original: str, seed: int, kind: str, statistics: Any, processor: Any = None, **options: Any
    ) -> UNSCTrainer:
        """A trainer on a fresh copy of an original, all else at its default; `processor` is another model's own."""
        config = UNSCConfig(
            output_dir=str(Path(self.options.output_dir, "_work")),
            seed=seed,
            use_cpu=True,
            disable_tqdm=True,
            **({} if self.options.max_leak is None else {"max_leak": self.options.max_leak}),
            **options,
        )
        return UNSCTrainer(
            model=load_as(self.model_class, original, "originals"), args=config, forget_dataset=self.forget,
            retain_dataset=self.retain, processing_class=processor or self.processor, statistics=statistics,
            peft_config=LoraConfig(r=8) if kind == "adapters" else None,
        )  # fmt: skip

    def chooser(self, trainer: UNSCTrainer, seed: int) -> ProbeBands:
        """Bands of the retrained models on the rows that this seed holds out, for full weights and adapters."""
        file = self.folder / f"bands-{seed}.json"
        if file.is_file():
            known = {name: Band(**band) for name, band in json.loads(file.read_text(encoding="utf-8")).items()}
            return ProbeBands(trainer.model, trainer.feature_rows(), [], known)
        loads = [partial(load_as, self.model_class, name, "retrained") for name in self.options.retrained]
        chooser = ProbeBands(trainer.model, trainer.feature_rows(), loads)
        write_text(file, json.dumps({name: asdict(band) for name, band in chooser.bands.items()}, indent=1))
        return chooser

    def examine(self, trainer: UNSCTrainer, model: PreTrainedModel) -> dict[str, Any]:
        """Accuracies and audits of a model, on test rows."""

        def collect(network: PreTrainedModel, rows: Dataset, features: bool = False) -> Outputs:
            return collect_outputs(network, trainer.task.prepare(rows), trainer.data_collator, features=features)

        def batches(rows: Dataset, size: int, seed: int) -> Iterator[dict[str, Any]]:
            while True:
                generator = torch.Generator().manual_seed(seed)
                yield from DataLoader(
                    trainer.task.prepare(rows),
                    size,
                    shuffle=True,
                    collate_fn=trainer.data_collator,
                    generator=generator,
                )
                seed += 1

        forget, retain = self.audited
        outputs = RowOutputs(*(collect(model, rows, True) for rows in (forget, retain, self.test)))
        exam = Examination(
            model, outputs, outputs, [], self.forgotten, forget, retain, self.test, partial(collect, features=False),
            batches, {"relearning": {"learning_rate": self.options.relearning_rate}},
        )  # fmt: skip
        kept = exam.kept
        results: dict[str, Any] = {
            "AccDut": macro_accuracy(outputs.test.logits, outputs.test.labels, self.forgotten),
            "AccDrt": macro_accuracy(outputs.test.logits, outputs.test.labels, kept),
        }
        for name in self.options.audits:
            reading = other_readers(outputs, self.forgotten) if name == "readers" else AUDITS[name].run(exam)
            results |= {f"{name}.{key}": value for key, value in reading.items()}
        return results


def other_readers(outputs: RowOutputs, forgotten: Sequence[int]) -> dict[str, float]:
    """Test accuracy on the forgotten classes of readers of the head's input that are not linear.

    Erasing class means does not promise to hide this. They are taught on 200 rows of each class, standardised.
    """
    features = torch.cat([outputs.forget.need_features(), outputs.retain.need_features()]).numpy()
    labels = torch.cat([outputs.forget.labels, outputs.retain.labels]).numpy()
    rng = np.random.default_rng(0)
    rows = at_most_per_class(labels, 200, rng)
    unseen = np.isin(outputs.test.labels.numpy(), forgotten)
    readers = {
        "neighbours": KNeighborsClassifier(15),
        "network": MLPClassifier((64,), alpha=1.0, max_iter=60, random_state=0),
        "quadratic": QuadraticDiscriminantAnalysis(reg_param=0.1),
    }
    accuracies = {}
    for name, reader in readers.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = make_pipeline(StandardScaler(), reader).fit(features[rows], labels[rows])
        predicted = fitted.predict(outputs.test.need_features().numpy()[unseen])
        accuracies[name] = macro_accuracy(predicted, outputs.test.labels.numpy()[unseen], forgotten) or 0.0
    return accuracies


def unlearned(experiment: Experiment, original: str, seed: int, kind: str, arm: str) -> dict[str, Any]:
    """One run; its model is kept. Seconds leave out the audits, and the statistics, which all arms share."""
    folder, shared = experiment.folder / "_statistics" / str(seed), experiment.folder / f"statistics-{seed}.json"
    if not folder.is_dir():
        first = experiment.trainer(original, seed, "full", None)
        first.prepare_unlearning()
        assert first.plan is not None
        first.spaces.retained.save_pretrained(folder)
        write_text(shared, json.dumps(first.plan.seconds))
    trainer = experiment.trainer(
        original, seed, kind, str(folder), **({} if arm == "unsc" else {"feature_erasure": experiment.options.place})
    )
    started = time.perf_counter()
    trainer.prepare_unlearning()
    prepared = time.perf_counter() - started
    bands: dict[str, Any] = {}
    if arm == "band":
        trainer.choose_erasure = chosen = experiment.chooser(trainer, seed)
        bands = {name: asdict(band) for name, band in chosen.bands.items()}
    trainer.train()
    network: Any = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model = network.merge_and_unload() if isinstance(network, PeftModel) else network
    record = {
        "leak": trainer.held_out_leak().total,
        "seconds": prepared + trainer.unlearning_seconds,
        "statistics_seconds": json.loads(shared.read_text(encoding="utf-8"))["statistics"]
        if shared.is_file()
        else None,
        "stopped_by": trainer.stop_reason,
        "steps": trainer.state.global_step,
        "erased": [asdict(one) for one in trainer.erased],
        "bands": bands,
    }
    model.save_pretrained(experiment.folder / "_models" / f"{kind}-{arm}-{seed}")
    return record


def run(experiment: Experiment) -> None:
    """The phases that were asked for, of all runs that are not there yet."""
    options, file = experiment.options, experiment.folder / "runs.json"
    runs: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def keep(key: str, record: dict[str, Any]) -> None:
        runs[key] = {**runs.get(key, {}), **record}
        write_text(file, json.dumps(finite(runs), indent=1))
        print(key, {c: round(record[c], 3) for c in COLUMNS if record.get(c) is not None}, flush=True)

    def examined(key: str, name: str, seed: int) -> None:
        if "AccDrt" in runs.get(key, {}) or "examine" not in options.phases:
            return
        own = own_processor(
            name, experiment.processor
        )  # of an unlearned model, which was saved without, the original's
        gauge = experiment.trainer(options.originals[seed], seed, "full", None, own)
        keep(key, experiment.examine(gauge, load_as(experiment.model_class, name, "retrained")))

    if options.references:
        for i, name in enumerate(options.retrained):
            examined(f"retrained|{i}", name, 0)
    for seed in options.seeds:
        original = options.originals[seed]
        if options.references:
            examined(f"original|{seed}", original, seed)
        if "bands" in options.phases:
            experiment.chooser(experiment.trainer(original, seed, "full", None, feature_erasure=options.place), seed)
        for kind in options.kinds:
            for arm in options.arms:
                key = f"{kind}|{arm}|{seed}"
                if key not in runs and "unlearn" in options.phases:
                    keep(key, unlearned(experiment, original, seed, kind, arm))
                if key in runs:
                    examined(key, str(experiment.folder / "_models" / f"{kind}-{arm}-{seed}"), seed)


def from_comparison(file: str) -> dict[str, Any]:
    """Runs of original, UNSC and retrained models, as a comparison of methods has recorded them."""
    (comparison,) = json.loads(Path(file).read_text(encoding="utf-8"))["forget_sets"].values()
    groups = {
        "original": comparison["runs"]["original"],
        "full|unsc": comparison["runs"]["unsc"],
        "retrained": comparison["references"],
    }
    runs = {}
    for name, records in groups.items():
        for i, record in enumerate(records):
            audits = {
                f"{audit}.{key}": record["audits"][audit][key]
                for audit in ("probe", "prototype", "relearning", "membership")
                for key in record["audits"][audit]
            }
            kept = {key: record[key] for key in ("AccDut", "AccDrt", "leak") if record.get(key) is not None}
            runs[f"{name}|{i}"] = kept | audits
    return runs


def merge(folders: Sequence[str], output: Path, request: Sequence[str], baseline: str | None) -> None:
    """Runs of several folders as one table and one picture."""
    runs: dict[str, Any] = from_comparison(baseline) if baseline else {}
    for folder in folders:
        for key, record in json.loads(Path(folder, "runs.json").read_text(encoding="utf-8")).items():
            if "AccDrt" in record or key in runs:  # others are not examined yet
                runs[key] = {**record, **runs.get(key, {})}
    groups: dict[str, list[dict[str, Any]]] = {}
    for key in sorted(runs):
        groups.setdefault(key.rsplit("|", 1)[0], []).append(runs[key])
    order = ["original", *(f"{kind}|{arm}" for kind in KINDS for arm in ARMS), "retrained"]
    groups = {name: groups[name] for name in order if name in groups}
    titles = {
        "original": "original", "retrained": "retrained", "full|unsc": "UNSC", "full|default": "UNSC, erased (default)",
        "full|band": "UNSC, erased into the band", "adapters|unsc": "UNSC in adapters",
        "adapters|default": "in adapters, erased (default)", "adapters|band": "in adapters, erased into the band",
    }  # fmt: skip
    columns = {c: t for c, t in COLUMNS.items() if any(_numbers(records, c) for records in groups.values())}
    band = {c: _numbers(groups["retrained"], c) for c in COLUMNS} if "retrained" in groups else {}
    lines = ["| model | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, records in groups.items():
        cells = [_cell(_numbers(records, column), column, band.get(column, []), name) for column in columns]
        lines.append(f"| {titles[name]} | " + " | ".join(cells) + " |")
    note = (
        "Mean ± standard deviation; percent, but for the AUC and seconds (without statistics and audits). Bold: the "
        "mean lies within two standard deviations of the retrained models' mean. Without ±: one seed."
    )
    title = f"# {', '.join(Path(word).stem for word in request)}: forgetting in the features"
    write_text(output / "table.md", "\n".join([title, "", *lines, "", note, ""]))
    record = {"request": list(request), "runs": runs, "versions": versions()}
    write_text(output / "features.json", json.dumps(finite(record), indent=1))
    _plot(groups, titles, output / "front.png")
    print("\n".join(lines))


def _numbers(records: Sequence[dict[str, Any]], column: str) -> list[float]:
    return [float(one[column]) for one in records if one.get(column) is not None]


def _cell(numbers: Sequence[float], column: str, band: Sequence[float], name: str) -> str:
    if not numbers:
        return "–"
    mean, spread = float(np.mean(numbers)), float(np.std(numbers, ddof=1)) if len(numbers) > 1 else 0.0
    if column == "seconds":
        return f"{mean:.0f}"
    scale, digits = (1, 3) if column == "membership.auc" else (100, 1)
    text = f"{scale * mean:.{digits}f}" + (f" ± {scale * spread:.{digits}f}" if len(numbers) > 1 else "")
    judged = len(band) > 1 and column not in ("AccDut", "AccDrt", "leak") and name != "retrained"
    inside = judged and Band.of(band).holds(mean)
    return f"**{text}**" if inside else text


def _plot(groups: dict[str, list[dict[str, Any]]], titles: dict[str, str], path: Path) -> None:
    """What was kept against what a probe reads, at the head's input and in the layer where most is read."""
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    style = {
        "original": (GREY, "s"), "full|unsc": (BLUE, "o"), "full|default": (BLUE, "^"), "full|band": (BLUE, "*"),
        "adapters|unsc": (ORANGE, "o"), "adapters|default": (ORANGE, "^"), "adapters|band": (ORANGE, "*"),
        "retrained": (GREEN, "D"),
    }  # fmt: skip
    layers = [column for column in COLUMNS if column.startswith("probe.layer")]
    readers: tuple[tuple[str, Callable[[dict[str, Any]], float]], ...] = (
        ("what a probe reads at the head's input (%)", lambda one: one["probe.head"]),
        (
            "what a probe reads in the layer where it reads most (%)",
            lambda one: max(one[c] for c in layers if c in one),
        ),
    )
    for axis, (label, read) in zip(axes, readers, strict=True):
        for name, records in groups.items():
            colour, marker = style[name]
            x, y = 100 * np.asarray([read(one) for one in records]), 100 * np.asarray(_numbers(records, "AccDrt"))
            axis.plot(x, y, marker, color=colour, ms=11 if marker == "*" else 7, label=titles[name], alpha=0.85, mew=0)
        if len(groups.get("retrained", [])) > 1:
            values = np.asarray([read(one) for one in groups["retrained"]])
            reach = 2 * values.std(ddof=1)
            low, high = max(values.mean() - reach, 0.0), min(values.mean() + reach, 1.0)
            axis.axvspan(100 * low, 100 * high, color=GREEN, alpha=0.13, lw=0)
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("AccDrt: accuracy on the remaining classes (%)")
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name")
    parser.add_argument("--originals", nargs="+", default=[])
    parser.add_argument("--retrained", nargs="+", default=[])
    parser.add_argument("--forget", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--place", default="layers")
    parser.add_argument(
        "--phases", nargs="+", choices=PHASES, default=list(PHASES), help="for machines that are shared"
    )
    parser.add_argument("--references", action="store_true", help="examine the retrained models too")
    parser.add_argument("--merge", nargs="+", help="folders of finished runs to put together")
    parser.add_argument("--audits", nargs="+", choices=AUDITS_HERE, default=list(AUDITS_HERE))
    parser.add_argument("--relearning_rate", type=float, default=3e-4, help="as a comparison of methods has found it")
    parser.add_argument("--max_leak", type=float, help="another leak budget than the default")
    parser.add_argument("--baseline", help="comparison.json of the same models")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output_dir", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.merge:
        merge(options.merge, Path(options.output_dir), options.forget, options.baseline)
        return
    run(Experiment(options))


if __name__ == "__main__":
    main()
