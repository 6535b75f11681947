"""Which rows would a model get wrong that never saw them, and how many?

    python benchmarks/left_out.py text --dataset_name DATA --originals ORIGINAL_SEED0 ... \
        --retrained RETRAINED_SEED0 ... --rows 500 --output benchmarks/results/clinc150_rows_left_out/left_out.json

Guesses come from the original and from unseen rows. They are compared with models that were retrained without the rows.
The rows are those of `rows:N` in `requests.py`; each original is read beside its own retrained model. In the JSON:

- `order`: area under the ROC curve of finding the rows that the retrained model gets wrong.
- `fifths`: accuracy of the retrained model on each fifth of the rows in that order; the picture shows it.
- `accuracy`, in percent: of the retrained model on the rows; of the original on all unseen rows and on the rows'
  counterparts (by discriminants and neighbours, or by one of them alone).
- `exposure`: of the rows in the retrained model, compared with all unseen rows and with the counterparts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

from unsc_hf import UNSCConfig, UNSCError
from unsc_hf.cli.main import run_recipe
from unsc_hf.comparison.arguments import ImageArguments, TextArguments
from unsc_hf.data.columns import find_label_column
from unsc_hf.data.inputs import default_collator, prepare_dataset
from unsc_hf.data.selection import Request
from unsc_hf.evaluation.membership import exposure
from unsc_hf.experimental.left_out import (
    TWINS,
    counterparts,
    left_out_ease,
    left_out_margins,
    mean_quantiles,
    neighbour_margins,
    read_rows,
    untrained_twin,
)
from unsc_hf.models.loading import load_as
from unsc_hf.models.outputs import Outputs, collect_outputs
from unsc_hf.objectives.pseudo_labels import margin
from unsc_hf.reporting.model_card import versions
from unsc_hf.reporting.plots import GREY, ORANGE
from unsc_hf.utils.files import write_text


def one_pair(kind: str, dataset: str, original: str, retrained: str, count: int, seed: int) -> dict[str, Any]:
    """All guesses about one original, beside its retrained model."""
    arguments = {"image": ImageArguments, "text": TextArguments}[kind](dataset_name=dataset)
    data = arguments.load(UNSCConfig(output_dir="unused"))
    if "validation" not in data:
        raise UNSCError("dataset_name: the data set has no validation split, which the unseen rows are taken from.")
    rows = np.random.default_rng(0).choice(len(data["train"]), count, replace=False)
    forget, retain = Request(indices=tuple(sorted(rows.tolist()))).split(data["train"])
    model, other = (load_as(arguments.plan_class.auto_class, name, "originals") for name in (original, retrained))
    processor = arguments.load_processor(original)
    label, collate = find_label_column(forget, None), default_collator(processor)
    parts = [prepare_dataset(part, processor, model, label) for part in (retain, forget, data["validation"])]

    def guesses(network: torch.nn.Module) -> dict[str, np.ndarray]:
        taught, *asked = (read_rows(network, part, collate) for part in parts)
        found = (
            left_out_ease(taught, asked),
            *(mean_quantiles(by(taught, asked)) for by in (left_out_margins, neighbour_margins)),
        )
        return dict(zip(("ease", "discriminants", "neighbours"), found, strict=True))

    def losses(outputs: Outputs) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits.double(), outputs.labels, reduction="none")

    known = {
        name: [collect_outputs(network, part, collate) for part in parts[1:]]
        for name, network in (("original", model), ("retrained", other))
    }
    true = margin(known["retrained"][0]).numpy()
    features, each = guesses(model)["ease"], [guesses(untrained_twin(model, seed + i)) for i in range(TWINS)]
    by = {name: np.mean([twin[name] for twin in each], axis=0) for name in each[0]}
    twins = by["ease"]
    chosen = {name: counterparts(ease[:count], ease[count:]) for name, ease in by.items()}
    orders = {
        "original's margins": margin(known["original"][0]).numpy(),
        "original's features": features[:count],
        "an untrained twin": each[0]["ease"][:count],
        "twins, by discriminants": by["discriminants"][:count],
        "twins, by neighbours": by["neighbours"][:count],
        f"{TWINS} untrained twins": twins[:count],
        "twins and features": (features + twins)[:count],
    }
    unseen, theirs = margin(known["original"][1]).numpy() > 0, losses(known["retrained"][1])
    mine = losses(known["retrained"][0])
    return {
        "seed": seed,
        "order": {name: float(roc_auc_score(true > 0, values)) for name, values in orders.items()},
        "fifths": {name: fifths(true > 0, values) for name, values in orders.items()},
        "accuracy": {
            "retrained, on the rows": 100 * float((true > 0).mean()),
            "original, on unseen rows": 100 * float(unseen.mean()),
            "original, on counterparts": 100 * float(unseen[chosen["ease"]].mean()),
            "by discriminants": 100 * float(unseen[chosen["discriminants"]].mean()),
            "by neighbours": 100 * float(unseen[chosen["neighbours"]].mean()),
        },
        "exposure": {
            "beside unseen rows": exposure(mine, theirs.sort().values),
            "beside counterparts": exposure(mine, theirs[chosen["ease"]].sort().values),
        },
    }


def fifths(known: np.ndarray, order: np.ndarray) -> list[float]:
    """Percent of rows known in each fifth of an order."""
    return [100 * float(part.mean()) for part in np.array_split(known[np.argsort(order, kind="stable")], 5)]


def draw(pairs: Sequence[dict[str, Any]], file: Path) -> None:
    """Accuracy of the retrained models by fifths of two orders: by the original's margins, and by all guesses."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    names = list(pairs[0]["fifths"])
    for name, colour in ((names[0], GREY), (names[-1], ORANGE)):
        values = np.array([pair["fifths"][name] for pair in pairs])
        axes.plot(range(1, 6), values.mean(0), "o-", color=colour, label=name)
        axes.fill_between(range(1, 6), values.min(0), values.max(0), color=colour, alpha=0.2)
    axes.set_xticks(range(1, 6), ["guessed\nhardest", "2", "3", "4", "guessed\neasiest"])
    axes.set_xlabel("rows in fifths, put in order by")
    axes.set_ylabel("known by models retrained without them, %")
    axes.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["image", "text"])
    parser.add_argument("--dataset_name", required=True, help="with a validation split, the unseen rows")
    parser.add_argument("--originals", nargs="+", required=True)
    parser.add_argument("--retrained", nargs="+", required=True, help="one for each original, without the rows")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pairs = [
        one_pair(options.kind, options.dataset_name, original, retrained, options.rows, seed)
        for seed, (original, retrained) in enumerate(zip(options.originals, options.retrained, strict=True))
    ]
    for measure in ("order", "accuracy", "exposure"):
        for name in pairs[0][measure]:
            values = [pair[measure][name] for pair in pairs]
            print(f"{measure:10}{name:28}{np.mean(values):8.3f} ± {np.std(values, ddof=min(1, len(values) - 1)):.3f}")
    write_text(Path(options.output), json.dumps({"pairs": pairs, "versions": versions()}, indent=1))
    draw(pairs, Path(options.output).with_suffix(".png"))


if __name__ == "__main__":
    run_recipe(main)
