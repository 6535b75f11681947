"""Requests one after another on one model: seconds of each, and how far retained outputs have moved since the first.

    python benchmarks/sequence.py image --dataset_name DATA --model_name_or_path MODEL --rows 100 --requests 10 \
        --output_dir OUT
    python benchmarks/sequence.py text --dataset_name DATA --model_name_or_path MODEL --requests balance transfer ... \
        --output_dir OUT

Without a data set the embedded digits are used; the soak is

    python benchmarks/sequence.py image --rows 2 --requests 200 --threads 1 --output_dir OUT

`--rows N` takes N training rows for each request, drawn with seed 0 and without repetition, and `--requests` is then
their number. Otherwise every request is one class. Statistics are collected once, by the first request. Options are
the package's defaults, but statistics for requests of rows have no budgets and read all rows. Unseen rows are the
validation split, or a fifth of the test rows, which is then left out of what is reported. Retained logits are compared
with the *original's*, on test rows of classes that no request names.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from matplotlib.figure import Figure
from transformers import HfArgumentParser

from unsc_hf import UNSCConfig, serve_request
from unsc_hf.cli.main import run_recipe
from unsc_hf.comparison.arguments import ImageArguments, TextArguments
from unsc_hf.comparison.references.training import train_model
from unsc_hf.data.columns import class_names, read_labels
from unsc_hf.data.inputs import default_collator, prepare_dataset
from unsc_hf.data.selection import hold_out, resolve_classes
from unsc_hf.evaluation.certificate import logit_drift
from unsc_hf.models.loading import load_as
from unsc_hf.models.outputs import Outputs, collect_outputs
from unsc_hf.reporting.model_card import versions
from unsc_hf.trainer.sequence import open_statistics
from unsc_hf.utils.files import write_beside, write_text


def parts(rows: int | None, requests: list[str], labels: np.ndarray, names: list[str]) -> list[np.ndarray]:
    """Row numbers of each request."""
    if rows is not None:
        drawn = np.random.default_rng(0).permutation(len(labels))
        return [np.sort(drawn[i * rows : (i + 1) * rows]) for i in range(int(requests[0]))]
    return [np.flatnonzero(labels == c) for c in resolve_classes(requests, names, range(len(names)))]


def plot(entries: list[dict[str, Any]], path: Path) -> None:
    """Seconds and drift by request."""
    figure = Figure(figsize=(11.0, 3.0), layout="constrained")
    left, right, far = figure.subplots(1, 3)
    x = range(1, len(entries) + 1)
    ticks = list(x) if len(x) <= 15 else None
    bottom = np.zeros(len(entries))
    for name, colour in (("statistics", "#9aa0a6"), ("unlearning", "#1f6fb4"), ("everything else", "#d8c9a3")):
        heights = np.array([entry["seconds"][name] for entry in entries])
        left.bar(x, heights, bottom=bottom, label=name, color=colour, width=0.8 if ticks else 1.0)
        bottom += heights
    left.set(xlabel="request", ylabel="seconds")
    left.legend(frameon=False, fontsize=8)
    style = "o-" if ticks else "-"
    right.plot(x, [100 * entry["test_accuracy"] for entry in entries], style, color="#3a8f5c", label="test accuracy")
    right.plot(x, [100 * entry["drift"] for entry in entries], style, color="#d1642a", label="drift of the logits")
    right.plot(x, np.cumsum([100 * e["leak"] for e in entries]), style + "-", color="#9aa0a6", label="leaks, summed")
    right.set(xlabel="request", ylabel="%", ylim=(0, 100))
    right.legend(frameon=False, fontsize=8, loc="center right")
    far.plot(x, [entry["memory"] for entry in entries], style, color="#1f6fb4", label="memory (MiB)")
    far.plot(x, [entry["handles"] for entry in entries], style, color="#d1642a", label="open file handles")
    far.set(xlabel="request", ylim=(0, None))
    far.legend(frameon=False, fontsize=8)
    for axes in (left, right, far):
        if ticks:
            axes.set_xticks(ticks)
        axes.spines[["top", "right"]].set_visible(False)
    write_beside(path, lambda scratch: figure.savefig(scratch, dpi=150))


def main() -> None:
    kinds = {"image": ImageArguments, "text": TextArguments}
    if len(sys.argv) < 2 or sys.argv[1] not in kinds:
        raise SystemExit(__doc__)
    parser = HfArgumentParser(kinds[sys.argv[1]], description=__doc__, allow_abbrev=False)
    own = parser.add_argument_group("benchmark")
    own.add_argument("--requests", nargs="+", required=True, help="classes, or with --rows their number")
    own.add_argument("--rows", type=int, help="training rows of each request")
    own.add_argument("--max_leak", type=float, default=UNSCConfig.max_leak, help="budget of all requests together")
    own.add_argument("--threads", type=int, default=2)
    own.add_argument("--output_dir", required=True)
    options = vars(parser.parse_args(sys.argv[2:]))
    requests, rows, threads = options.pop("requests"), options.pop("rows"), options.pop("threads")
    folder, max_leak = Path(options.pop("output_dir")), options.pop("max_leak")
    torch.set_num_threads(threads)
    arguments = kinds[sys.argv[1]](**options)
    with tempfile.TemporaryDirectory() as scratch:
        budgets: dict[str, Any] = {} if rows is None else {"max_rows_per_class": None, "max_samples_per_class": None}
        config = UNSCConfig(
            output_dir=f"{scratch}/out", disable_tqdm=True, max_leak=max_leak, report_to="none", **budgets
        )
        data = arguments.load(config)
        train, test, unseen = data["train"], data["test"], data.get("validation")
        if rows is not None and unseen is None:  # what says when to stop is left out of what is reported
            test, unseen = hold_out(test, 0.2, read_labels(test), len(test), 0)
        labels, names = read_labels(train), class_names(train)
        assert names is not None
        asked = parts(rows, requests, labels, names)
        name = str(arguments.model_name_or_path)
        if arguments.quickstart:
            name = str(train_model(train, arguments.plan(config), arguments.references_dir, "original", names))
        model = load_as(arguments.plan_class.auto_class, name, "model_name_or_path")
        processor = arguments.load_processor(name)
        gone = np.concatenate(asked)
        kept_classes = np.setdiff1d(labels, [] if rows else labels[gone])
        kept_rows = test.select(np.flatnonzero(np.isin(read_labels(test), kept_classes)))
        prepared = prepare_dataset(kept_rows, processor, model)

        def outputs() -> Outputs:
            return collect_outputs(model, prepared, default_collator(processor))

        original, mask, entries = outputs(), np.ones(len(train), dtype=bool), []
        for i, part in enumerate(asked):
            mask[part] = False
            forget, retain = train.select(part), train.select(np.flatnonzero(mask))
            started = time.perf_counter()
            if i == 0:
                open_statistics(f"{scratch}/statistics", model, config, forget, retain, processor)
            collecting = time.perf_counter() - started
            trainer = serve_request(
                model, f"{scratch}/statistics", config, forget, retain,
                processing_class=processor, unseen_dataset=unseen if rows else None,
            )  # fmt: skip
            total = time.perf_counter() - started
            now = outputs()
            entry = {
                "rows": len(part),
                "seconds": {
                    "statistics": collecting,
                    "unlearning": trainer.unlearning_seconds,
                    "everything else": total - collecting - trainer.unlearning_seconds,
                },
                "total": total,
                "leak": trainer.certify().leak,
                "drift": logit_drift(original.logits, now.logits).relative,
                "test_accuracy": float((now.logits.argmax(1) == now.labels).float().mean()),
                "memory": psutil.Process().memory_info().rss / 2**20,
                "handles": psutil.Process().num_fds(),
                "steps": trainer.state.global_step,
                "stopped_by": trainer.stop_reason,
            }
            entries.append(entry)
            print(json.dumps(entry), flush=True)
    share = float(np.median([entry["total"] for entry in entries[1:]])) / entries[0]["total"]
    print(f"a request after the first takes {share:.2f} of the first")
    found = {
        "original_test_accuracy": float((original.logits.argmax(1) == original.labels).float().mean()),
        "share": share,
        "requests": entries,
        "max_leak": max_leak,
        "threads": threads,
        "versions": versions(),
    }
    write_text(folder / "sequence.json", json.dumps(found, indent=1))
    plot(entries, folder / "sequence.png")


if __name__ == "__main__":
    run_recipe(main)
