"""The quickstart's training plan, chosen on validation rows only, and the quickstart itself over several seeds.

    python benchmarks/quickstart.py choose --output_dir benchmarks/results
    python benchmarks/quickstart.py measure --seeds 0 1 2 3 4 --output_dir benchmarks/results

`choose` never looks at a test digit: it splits the train rows three times, trains each plan on four fifths of them, and
ranks the plans by the mean accuracy on the remaining fifth. The winner is `PLAN` in
`unsc_hf/comparison/references/images.py`. `measure` trains original and retrained model anew for each seed, with
`PLAN`, and runs the recipe on them. Finished runs are kept in the output folder, so a stopped benchmark goes on where
it was.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from transformers import AutoImageProcessor, AutoModelForImageClassification, default_data_collator

from unsc_hf import UNSCConfig
from unsc_hf.cli.main import run_recipe
from unsc_hf.comparison.arguments import ImageArguments
from unsc_hf.comparison.references.images import PLAN, ImagePlan, digits_dataset
from unsc_hf.comparison.references.training import train_model
from unsc_hf.data.columns import class_names, read_labels
from unsc_hf.data.inputs import prepare_dataset
from unsc_hf.models.outputs import collect_outputs
from unsc_hf.reporting.model_card import versions
from unsc_hf.runs.classification import run
from unsc_hf.utils.files import write_text

REPEATS = 3
PLANS = [
    ImagePlan(size="nano", patch_size=2, epochs=epochs, learning_rate=rate, batch_size=batch, crop_padding=crop)
    for epochs, rate, batch, crop in (
        (50, 1e-3, 32, 1),
        (100, 1e-3, 32, 1),
        (100, 1e-3, 64, 1),
        (100, 2e-3, 64, 1),
        (150, 1e-3, 64, 1),
        (100, 1e-3, 64, 0),
    )
]


def validation_accuracy(plan: ImagePlan, repeat: int, references: Path) -> tuple[float, float]:
    """Accuracy on the held-out fifth of the train rows, and the seconds of training."""
    train = digits_dataset()["train"]
    labels = read_labels(train)
    fit, held = train_test_split(np.arange(len(train)), test_size=0.2, stratify=labels, random_state=repeat)
    names = class_names(train)
    assert names is not None
    folder = train_model(train.select(fit), replace(plan, seed=repeat), references, "candidate", names)
    model = AutoModelForImageClassification.from_pretrained(folder)
    rows = prepare_dataset(train.select(held), AutoImageProcessor.from_pretrained(folder), model)
    out = collect_outputs(model, rows, default_data_collator)
    seconds = json.loads((folder / "training.json").read_text(encoding="utf-8"))["seconds"]
    return float((out.logits.argmax(-1) == out.labels).float().mean()), seconds


def choose(options: argparse.Namespace) -> None:
    """Rank `PLANS` by mean validation accuracy."""
    rows: list[dict[str, Any]] = []
    for plan in PLANS:
        runs = [validation_accuracy(plan, repeat, Path(options.references_dir)) for repeat in range(REPEATS)]
        accuracies, seconds = zip(*runs, strict=True)
        rows.append(
            {
                "plan": asdict(plan),
                "accuracies": accuracies,
                "accuracy": np.mean(accuracies),
                "seconds": np.mean(seconds),
            }
        )
        print(f"{rows[-1]['accuracy']:.4f} in {rows[-1]['seconds']:.0f} s: {plan}", flush=True)
    rows.sort(key=lambda row: -row["accuracy"])
    result = {"repeats": REPEATS, "threads": options.threads, "plans": rows, "versions": versions()}
    write_text(Path(options.output_dir) / "quickstart-plan.json", json.dumps(result, indent=1))


def measure(options: argparse.Namespace) -> None:
    """The quickstart for each seed: models trained anew, the recipe's own table."""
    folder = Path(options.output_dir)
    runs = []
    for seed in options.seeds:
        output = Path(options.references_dir) / f"quickstart-seed{seed}-threads{options.threads}"
        if not (output / "results.json").is_file():
            config = UNSCConfig(output_dir=str(output), seed=seed, disable_tqdm=True)
            run(ImageArguments(references_dir=options.references_dir), config)
        results = json.loads((output / "results.json").read_text(encoding="utf-8"))
        runs.append({"seed": seed, "methods": results["methods"], "certificate": results["certificate"]})
    columns = ("AccDut", "AccDrt", "AccDf", "AccDr", "mia_auc", "probe_forget", "prototype_attack_10", "leak")
    table: dict[str, dict[str, list[float]]] = {}
    for method in runs[0]["methods"]:
        table[method] = {}
        for column in columns:
            values = [run["methods"][method][column] for run in runs]
            if None not in values:
                table[method][column] = [float(np.mean(values)), float(np.std(values, ddof=1))]
        cells = "  ".join(f"{name} {mean:.3f} ± {spread:.3f}" for name, (mean, spread) in table[method].items())
        print(f"{method:18s} {cells}")
    result = {"plan": asdict(PLAN), "threads": options.threads, "summary": table, "runs": runs, "versions": versions()}
    write_text(folder / f"quickstart-threads{options.threads}.json", json.dumps(result, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("choose", "measure"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--references_dir", default="references")
    parser.add_argument("--output_dir", required=True)
    options = parser.parse_args()
    if options.what == "measure" and len(set(options.seeds)) < 2:
        parser.error("--seeds: give at least two, or there is no spread")
    torch.set_num_threads(options.threads)
    {"choose": choose, "measure": measure}[options.what](options)


if __name__ == "__main__":
    run_recipe(main)
