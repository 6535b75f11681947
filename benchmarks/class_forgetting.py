"""Forgetting classes over several seeds and requests: every run beside its controls, means and spreads in one table.

    python benchmarks/class_forgetting.py --dataset DATA --originals MODEL_SEED0 MODEL_SEED1 ... \
        --retrained REFERENCE ... --requests Shirt --output_dir OUT

A request is one class, or several joined by "+". Hyper-parameters are the package's defaults and the same for all runs;
nothing is chosen on the test set. Every finished run is kept in OUT, so a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from unsc_hf import UNSCConfig
from unsc_hf.arguments import run_recipe
from unsc_hf.comparison import compare
from unsc_hf.evaluation.report import LABELS
from unsc_hf.files import write_text
from unsc_hf.image_classification import load_image_dataset
from unsc_hf.model_card import versions

COLUMNS = ("AccDut", "AccDrt", "AccDf", "AccDr", "mia_auc", "probe_forget", "prototype_attack_10", "leak", "seconds")


def one_run(original: str, seed: int, request: str, options: argparse.Namespace, data: Any) -> dict[str, Any]:
    """Results of one request on one original model."""
    model = AutoModelForImageClassification.from_pretrained(original, dtype=torch.float32)
    config = UNSCConfig(output_dir=str(Path(options.output_dir, "_scratch")), seed=seed, disable_tqdm=True)
    result = compare(
        model,
        data["train"],
        data["test"],
        request.split("+"),
        config,
        AutoImageProcessor.from_pretrained(original),
        options.retrained or (),
        controls=not options.no_controls,
    )
    plan = result.trainer.plan
    assert plan is not None
    return {
        "methods": {name: asdict(method) for name, method in result.methods.items()},
        "retrained_references": [asdict(reference) for reference in result.references],
        "certificate": result.certificate,
        "verdict": result.verdict,
        "steps": result.trainer.state.global_step,
        "seconds": {**plan.seconds, "unlearning": result.trainer.unlearning_seconds},
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """(mean, standard deviation) over runs by method and column; retrained models spread over references."""
    table: dict[str, dict[str, list[float]]] = {}
    for name in LABELS:
        rows = [run["methods"][name] for run in runs if name in run["methods"]]
        if name == "retrained" and rows:
            rows = runs[0]["retrained_references"]
        if rows:
            table[name] = {}
            for column in COLUMNS:
                values = [row[column] for row in rows if row[column] is not None]
                if values:
                    table[name][column] = [
                        float(np.mean(values)),
                        float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
                    ]
    return table


def markdown(request: str, runs: list[dict[str, Any]]) -> str:
    """The summary of one request, in percent but for the attack's AUC and seconds."""
    lines = [
        f"### {request.replace('+', ', ')} ({len(runs)} runs)",
        "",
        f"| model | {' | '.join(COLUMNS)} |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    for name, row in summary(runs).items():
        cells = []
        for column in COLUMNS:
            if column not in row:
                cells.append("-")
                continue
            scale, digits = (
                (1, 3)
                if column == "mia_auc"
                else (1, 0)
                if column == "seconds"
                else (100, 2 if column == "leak" else 1)
            )
            mean, spread = (scale * value for value in row[column])
            cells.append(f"{mean:.{digits}f} ± {spread:.{digits}f}" if spread else f"{mean:.{digits}f}")
        lines.append(f"| {LABELS[name]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--originals", nargs="+", required=True, help="one model for each seed")
    parser.add_argument("--retrained", nargs="*", help="references for the one request given")
    parser.add_argument("--requests", nargs="+", required=True, help='class names; several classes as "A+B"')
    parser.add_argument("--no_controls", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output_dir", required=True)
    options = parser.parse_args()
    if options.retrained and len(options.requests) > 1:
        parser.error("--retrained: references belong to one request; give a single --requests")
    torch.set_num_threads(options.threads)
    data = load_image_dataset(options.dataset)
    folder = Path(options.output_dir)
    results: dict[str, list[dict[str, Any]]] = {}
    for request in options.requests:
        for seed, original in enumerate(options.originals):
            kept = folder / "_runs" / f"{request.replace('/', '-')}-{Path(original).name}.json"
            if not kept.is_file():
                write_text(kept, json.dumps(one_run(original, seed, request, options, data)))
            results.setdefault(request, []).append(json.loads(kept.read_text(encoding="utf-8")))
        print(markdown(request, results[request]), flush=True)
    write_text(folder / "seeds.json", json.dumps({"requests": results, "versions": versions()}, indent=1))
    write_text(folder / "seeds.md", "\n".join(markdown(request, runs) for request, runs in results.items()))


if __name__ == "__main__":
    run_recipe(main)
