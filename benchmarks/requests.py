"""Requests over several seeds: every run beside its controls and retrained models, means and spreads in one table.

    python benchmarks/requests.py text --dataset_name DATA --requests balance classes/banking.txt rows:500 --seeds 0 1 2 \
        --model_size tiny --train_epochs 15 --train_learning_rate 1e-3 --train_batch_size 64 --max_length 32 \
        --output_dir benchmarks/results/clinc150
    python benchmarks/requests.py image --dataset_name DATA --originals MODEL_SEED0 MODEL_SEED1 \
        --retrained REFERENCE ... --requests Shirt --no_adapters --output_dir OUT

A request is classes joined by "+", a text file with one class a line, or `rows:N` for N training rows drawn with seed
0. For each request and seed an original (shared by all requests) and a retrained model are trained, or taken from
`--references_dir`. With `--originals` nothing is trained but, on `--train_retrained`, the references. The original is
unlearned with full weights and, unless `--no_adapters`, in LoRA adapters (in these alone with `--no_full`). Unlearning
uses the package's defaults, except for the options listed under "benchmark" in `--help`; the other options are the
recipe's. Nothing is chosen on the test set. Every finished run is kept in `OUT/_runs`, so a stopped benchmark goes on
where it was.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict
from transformers import HfArgumentParser

from unsc_hf import UNSCConfig
from unsc_hf.cli.main import run_recipe
from unsc_hf.comparison.arguments import ClassificationArguments, ImageArguments, TextArguments, lora_config
from unsc_hf.comparison.controls import compare
from unsc_hf.comparison.references.texts import TextPlan
from unsc_hf.comparison.references.training import train_model
from unsc_hf.data.columns import class_names
from unsc_hf.data.selection import Request, resolve_classes
from unsc_hf.evaluation.verdict import LABELS
from unsc_hf.models.loading import load_as
from unsc_hf.reporting.model_card import versions
from unsc_hf.utils.files import write_text

# Options of unlearning that can be chosen; every run records them.
CHOSEN = (
    "objective", "objective_args", "pseudo_labels", "pseudo_label_temperature", "energy", "target_modules",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "check_steps",
)  # fmt: skip
COLUMNS = ("AccDut", "AccDrt", "AccDf", "AccDr", "mia_auc", "probe_forget", "prototype_attack_10", "leak", "seconds")


def read_request(text: str, data: DatasetDict) -> Request:
    """A request from its short form."""
    if text.startswith("rows:"):
        rows = np.random.default_rng(0).choice(len(data["train"]), int(text.removeprefix("rows:")), replace=False)
        return Request(indices=tuple(sorted(rows.tolist())))
    names = Path(text).read_text(encoding="utf-8").split() if text.endswith(".txt") else text.split("+")
    known = class_names(data["train"])
    assert known is not None
    return Request(forget_classes=tuple(resolve_classes(names, known, range(len(known)))))


def models(
    arguments: ClassificationArguments,
    config: UNSCConfig,
    request: Request,
    data: DatasetDict,
    seeds: Sequence[int],
    given: Sequence[str],
) -> tuple[list[Path], list[Path]]:
    """Originals, unless they are given, and retrained models, one of each for every seed."""
    labels = class_names(data["train"])
    assert labels is not None
    retain = request.split(data["train"]).retain
    originals, retrained = [Path(folder) for folder in given], []
    for seed in seeds:
        plan = arguments.plan(replace(config, seed=seed))
        vocabulary = data["train"] if isinstance(plan, TextPlan) else None
        folder = arguments.references_dir
        if not given:
            originals.append(train_model(data["train"], plan, folder, "original", labels))
        retrained.append(train_model(retain, plan, folder, "retrained", labels, vocabulary=vocabulary))
    return originals, retrained


def one_run(
    arguments: ClassificationArguments,
    config: UNSCConfig,
    request: Request,
    data: DatasetDict,
    original: Path,
    retrained: Sequence[Path],
    controls: bool,
) -> dict[str, Any]:
    """Results of one request on one original model, with full weights or adapters."""
    model = load_as(arguments.plan_class.auto_class, str(original), "model_name_or_path")
    result = compare(
        model,
        data["train"],
        data["test"],
        request,
        config,
        arguments.load_processor(str(original)),
        retrained,
        controls=controls,
        peft_config=lora_config(arguments),
        unseen=data.get("validation"),
    )
    network = result.trainer.model
    trained = sum(p.numel() for n, p in network.named_parameters() if "lora_" in n)
    total = sum(p.numel() for n, p in network.named_parameters() if "lora_" not in n)
    return {
        "methods": {name: asdict(method) for name, method in result.methods.items()},
        "retrained_references": [asdict(reference) for reference in result.references],
        "certificate": result.certificate,
        "verdict": [result.verdict, result.reason],
        "steps": result.trainer.state.global_step,
        "adapter_share": trained / total if arguments.use_peft else None,
        **{name: getattr(config, name) for name in CHOSEN},
        "objective_args": config.objective_options,
        "pseudo_labels": result.trainer.goal.pseudo_labels,
        "adapter": {"r": arguments.lora_r, "target_modules": arguments.lora_target_modules}
        if arguments.use_peft
        else None,
        "seconds": {**result.trainer.plan.seconds, "unlearning": result.trainer.unlearning_seconds},
    }


def table(runs: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Mean ± standard deviation over seeds by method, as Markdown lines; percent but for the AUC and seconds."""
    lines = [f"| model | {' | '.join(COLUMNS)} |", "|---|" + "---|" * len(COLUMNS)]
    rows: dict[str, list[dict[str, Any]]] = {}
    first = next(iter(runs))
    for mode, of_mode in runs.items():
        for name in LABELS:
            found = [run["methods"][name] for run in of_mode if name in run["methods"]]
            if name == "retrained" and found:
                found = runs[first][0]["retrained_references"]
            if found and (name == "unsc" or mode == first):
                rows[LABELS[name] + (", LoRA" if mode == "lora" else "")] = found
    for label, found in rows.items():
        lines.append(f"| {label} | {' | '.join(_spread(found, column) for column in COLUMNS)} |")
    return lines


def overview(results: dict[str, dict[str, list[dict[str, Any]]]]) -> list[str]:
    """UNSC on every request in one table: test accuracy in percent beside the original's and the retrained models'."""
    lines = ["| request | weights | AccDut | AccDrt | original's AccDrt | retrained AccDrt | leak | seconds |"]
    lines.append("|---|" + "---|" * 7)
    for name, by_mode in results.items():
        for mode, runs in by_mode.items():
            unsc = [run["methods"]["unsc"] for run in runs]
            original = [run["methods"]["original"] for run in runs]
            cells = [_spread(unsc, "AccDut"), _spread(unsc, "AccDrt"), _spread(original, "AccDrt")]
            cells.append(_spread(next(iter(by_mode.values()))[0]["retrained_references"], "AccDrt"))
            cells += [_spread(unsc, "leak"), _spread(unsc, "seconds")]
            lines.append(f"| {name.replace('+', ', ')} | {mode} | {' | '.join(cells)} |")
    return lines


def _spread(rows: Sequence[dict[str, Any]], column: str) -> str:
    """Mean ± standard deviation of a column; percent but for the AUC and seconds."""
    values = [row[column] for row in rows if row[column] is not None]
    if not values:
        return "–"
    plain, digits = column in ("mia_auc", "seconds"), {"mia_auc": 3, "seconds": 0, "leak": 2}.get(column, 1)
    scaled = np.asarray(values) * (1 if plain else 100)
    return f"{scaled.mean():.{digits}f}" + (f" ± {scaled.std(ddof=1):.{digits}f}" if len(values) > 1 else "")


def main() -> None:
    kinds = {"image": ImageArguments, "text": TextArguments}
    if len(sys.argv) < 2 or sys.argv[1] not in kinds:
        raise SystemExit(__doc__)
    parser = HfArgumentParser(kinds[sys.argv[1]], description=__doc__, allow_abbrev=False)
    own = parser.add_argument_group("benchmark")
    own.add_argument("--requests", nargs="+", required=True)
    own.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    own.add_argument("--originals", nargs="+", help="one model for each seed, instead of training it")
    own.add_argument("--retrained", nargs="+", help="with --originals: references for the one request given")
    own.add_argument("--no_adapters", action="store_true")
    own.add_argument("--no_full", action="store_true", help="adapters alone")
    own.add_argument("--only_train", action="store_true", help="train originals and references, then stop")
    own.add_argument("--objective", default="unsc")
    own.add_argument("--objective_args", help="options of the objective, such as 'retain_weight=4,retain_dropout=true'")
    own.add_argument("--pseudo_labels", help="how rows are re-labelled, by default as the package does")
    own.add_argument("--pseudo_label_temperature", type=float, default=UNSCConfig.pseudo_label_temperature)
    own.add_argument("--energy", type=float, default=UNSCConfig.energy)
    own.add_argument("--target_modules", nargs="+", help="layers that full weights may change, all by default")
    own.add_argument("--learning_rate", type=float, default=UNSCConfig.learning_rate)
    own.add_argument("--lr_scheduler_type", default=UNSCConfig.lr_scheduler_type)
    own.add_argument("--warmup_steps", type=int, default=0)
    own.add_argument("--max_steps", type=int, default=UNSCConfig.max_steps)
    own.add_argument("--check_steps", type=int, default=UNSCConfig.check_steps)
    own.add_argument(
        "--on_validation", action="store_true", help="report on validation rows: what options are chosen by"
    )
    own.add_argument("--threads", type=int, default=2)
    own.add_argument("--output_dir", required=True)
    options = vars(parser.parse_args(sys.argv[2:]))
    requests, seeds = options.pop("requests"), options.pop("seeds")
    without = {"full": options.pop("no_full"), "lora": options.pop("no_adapters")}
    modes = [mode for mode, left_out in without.items() if not left_out]
    if not modes:
        parser.error("--no_full: given beside --no_adapters; nothing is left to run")
    given, references = options.pop("originals"), options.pop("retrained")
    if given and len(given) != len(seeds):
        parser.error("--originals: give one model for each of --seeds")
    if references and (not given or len(requests) > 1):
        parser.error("--retrained: needs --originals and belongs to one request")
    chosen = {name: options.pop(name) for name in CHOSEN}
    on_validation = options.pop("on_validation")
    only_train, threads, folder = options.pop("only_train"), options.pop("threads"), Path(options.pop("output_dir"))
    torch.set_num_threads(threads)
    arguments = kinds[sys.argv[1]](**options)
    config = UNSCConfig(output_dir=str(folder / "_scratch"), disable_tqdm=True, **chosen)
    data = arguments.load(config)
    if on_validation:
        if "validation" not in data:
            parser.error("--on_validation: the data set has no validation split")
        data["test"] = data["validation"]
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    lines: list[str] = []
    for text in requests:
        request = read_request(text, data)
        name = Path(text).stem if text.endswith(".txt") else text
        originals, retrained = [Path(folder) for folder in given or ()], [Path(folder) for folder in references or ()]
        if not given or (arguments.train_retrained and not references):
            originals, retrained = models(arguments, config, request, data, seeds, given or ())
        if only_train:
            print(name, *retrained, sep="\n", flush=True)
            continue
        for mode in modes:
            for seed, original in zip(seeds, originals, strict=True):
                kept = folder / "_runs" / f"{re.sub('[:/]', '-', name)}-{mode}-{seed}.json"
                if not kept.is_file():
                    run = one_run(
                        replace(arguments, use_peft=mode == "lora"),
                        replace(config, seed=seed),
                        request,
                        data,
                        original,
                        retrained if mode == modes[0] and seed == seeds[0] else (),  # once: they do not change
                        controls=arguments.controls and mode == modes[0],
                    )
                    write_text(kept, json.dumps(run))
                results.setdefault(name, {}).setdefault(mode, []).append(json.loads(kept.read_text(encoding="utf-8")))
        print(name, *table(results[name]), "", sep="\n", flush=True)
        if arguments.controls:
            lines += [f"### {name.replace('+', ', ')} ({len(seeds)} seeds)", "", *table(results[name]), ""]
    if results:
        write_text(folder / "requests.json", json.dumps({"requests": results, "versions": versions()}, indent=1))
        write_text(folder / "requests.md", "\n".join([*overview(results), "", *lines]))


if __name__ == "__main__":
    run_recipe(main)
