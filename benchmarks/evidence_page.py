"""What the evidence says: tables, sentences and pictures of the cases that `evidence.py` has measured.

A *content* is the committed JSON of a case, with the case of `evidence.yaml` as its `plan`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from unsc_hf.reporting.plots import BLUE, GREEN, objective_title, plot_trade_off, save
from unsc_hf.reporting.tables import counted

Content = dict[str, Any]
_FORGOTTEN = 1.0  # percent of the forgotten rows that may still be recognised without a word
_USEFUL = 0.95  # of the original's utility: a method that keeps less is no choice
BEGIN, END = "<!-- made by benchmarks/evidence.py -->\n", "\n<!-- end -->"
MODELS = {
    "original": "original", "masked": "masked logits", "random_projector": "random subspace",
    "unprojected": "no projection", "unsc": "**UNSC**", "retrained": "retrained",
}  # fmt: skip
_TRAINED = ("unsc", "unprojected", "random_projector", "retrained")  # what decisions changed are compared of
COLUMNS = {
    "AccDut": ("forgotten, recognised", 100, 1), "AccDrt": ("kept, right", 100, 1),
    "flips": ("decisions changed", 100, 2), "negative_flips": ("right to wrong", 100, 2),
    "mia_auc": ("membership AUC", 1, 3), "probe_forget": ("linear probe", 100, 1),
    "prototype_attack_10": ("10-shot prototype", 100, 1), "seconds": ("seconds", 1, 0),
}  # fmt: skip
OF_ANSWERS = {
    "sets.forget.rouge_l": ("forgotten, ROUGE-L", 100, 1), "sets.retain.rouge_l": ("kept, ROUGE-L", 100, 1),
    "flips": ("tokens changed", 100, 2), "sets.forget.extraction_strength": ("recited", 100, 1),
    "forget_quality": ("forget quality", 1, 3), "model_utility": ("model utility", 1, 3), "leak": ("leak", 100, 2),
}  # fmt: skip


def numbers(runs: list[dict[str, Any]], model: str, column: str) -> list[float]:
    """What was measured of a model; a column of a language model's answers is a path, with dots."""
    found = []
    for run in runs:
        value: Any = run["methods"].get(model)
        for key in column.split("."):
            value = (value or {}).get(key)
        found += [] if value is None else [value]
    return found


def cell(runs: list[dict[str, Any]], model: str, column: str) -> str:
    """Mean±standard deviation over seeds, of seconds the mean; a dash for what was not measured."""
    _, factor, digits = (COLUMNS | OF_ANSWERS)[column]
    known = [factor * number for number in numbers(runs, model, column)]
    if not known:
        return "–"
    spread = f"±{np.std(known, ddof=1):.{digits}f}" if len(known) > 1 and column != "seconds" else ""
    return f"{np.mean(known):.{digits}f}{spread}"


def table(runs: list[dict[str, Any]], columns: Iterable[str]) -> list[str]:
    """Lines of a Markdown table, a row for each model."""
    methods = runs[0]["methods"]
    titles_of = COLUMNS if "unsc" in methods else OF_ANSWERS
    rows = [["model", *(titles_of[column][0] for column in columns)]]
    present = [model for model in MODELS if model in methods] if "unsc" in methods else list(methods)
    titles = {model: MODELS.get(model) or objective_title(model) for model in present}
    rows += [[title, *(cell(runs, model, column) for column in columns)] for model, title in titles.items()]
    return markdown(rows)


def markdown(rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def mean(runs: list[dict[str, Any]], model: str, column: str) -> float:
    """Mean over seeds; NaN where one of them was not measured."""
    values = [run["methods"].get(model, {}).get(column) for run in runs]
    return float(np.mean([np.nan if value is None else value for value in values]))


def fewer(runs: list[dict[str, Any]], model: str) -> str:
    """Whether UNSC changed fewer decisions than another model of the same seeds: by two standard errors, or unclear."""
    gaps = [run["methods"][model]["flips"] - run["methods"]["unsc"]["flips"] for run in runs]
    error = float(np.std(gaps, ddof=1)) / len(gaps) ** 0.5
    return "fewer" if np.mean(gaps) > 2 * error else "more" if np.mean(gaps) < -2 * error else "unclear"


def conclusion(runs: list[dict[str, Any]]) -> str:
    """Who keeps more, who forgets deeper, and when to retrain, in three sentences."""
    others = {"unprojected": "no projection", "random_projector": "a random subspace", "retrained": "retraining"}
    flips = {model: f"{100 * mean(runs, model, 'flips'):.2f} %" for model in [*others, "unsc"]}
    said = []
    for verdict, wording in (("fewer", "fewer than"), ("more", "more than"), ("unclear", "not told apart from")):
        names = [
            f"{name} ({flips[model]})"
            for model, name in others.items()
            if model in runs[0]["methods"] and fewer(runs, model) == verdict
        ]
        said += [f"{wording} {' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))}"] if names else []
    sentences = [f"Kept: UNSC changes {flips['unsc']} of the decisions, {'; '.join(said)}."]
    known = {model: 100 * mean(runs, model, "AccDut") for model in ("unsc", "unprojected")}
    if known["unsc"] > _FORGOTTEN:
        beside = "" if np.isnan(known["unprojected"]) else f", {known['unprojected']:.1f} % without projection"
        sentences.append(f"Of the forgotten rows {known['unsc']:.1f} % are still recognised{beside}.")
    probes = {model: 100 * mean(runs, model, "probe_forget") for model in ("original", "unsc", "retrained")}
    if not np.isnan(probes["unsc"]):
        against = "" if np.isnan(probes["retrained"]) else f", {probes['retrained']:.0f} % after retraining"
        sentences.append(
            f"Forgotten: a linear probe recognises {probes['unsc']:.0f} % of the rows from the features "
            f"({probes['original']:.0f} % before{against})."
        )
        if probes["retrained"] < probes["unsc"]:
            sentences.append("Retrain if the features must not show them.")
    ratio = mean(runs, "retrained", "seconds") / mean(runs, "unsc", "seconds")
    if not np.isnan(ratio):
        sentences.append(f"Retraining takes {ratio:.1f} times as long.")
    return " ".join(sentences)


def conclusion_of_answers(runs: list[dict[str, Any]]) -> str:
    """What methods change with and without projection, and which forgets most like the retrained model; no sentence
    where there are no such pairs."""
    pairs = [model for model in runs[0]["methods"] if f"{model} unprojected" in runs[0]["methods"]]
    if not pairs:
        return ""

    def means(models: Iterable[str], column: str) -> list[float]:
        return sorted(float(np.mean(numbers(runs, model, column))) for model in models)

    def span(models: Iterable[str]) -> str:
        (least, *_, most), (worst, *_, best) = (means(models, column) for column in ("flips", "model_utility"))
        return f"{100 * least:.1f} to {100 * most:.1f} % of the tokens (utility {worst:.2f} to {best:.2f})"

    without, known = [f"{model} unprojected" for model in pairs], "sets.forget.rouge_l"
    (target,) = means(["retrained"], known)
    (whole,) = means(["original"], "model_utility")
    useful = [model for model in [*pairs, *without] if means([model], "model_utility")[0] >= _USEFUL * whole]
    nearest = min(useful, key=lambda model: abs(means([model], known)[0] - target))
    return (
        f"Kept: with projection the {len(pairs)} methods change {span(pairs)}, without it {span(without)}. Forgotten: "
        f"of those that keep {100 * _USEFUL:.0f} % of the utility, {objective_title(nearest)} comes nearest to the "
        f"retrained model's ROUGE-L ({100 * means([nearest], known)[0]:.1f} and {100 * target:.1f})."
    )


def by_request(runs: list[dict[str, Any]]) -> list[str]:
    """Lines of a table with a row for each request; none where a case has one request."""
    requests = list(dict.fromkeys(run["request"] for run in runs if "request" in run))
    models = [model for model in _TRAINED if model in runs[0]["methods"]]
    head = ["forgotten", "recognised by UNSC", *(f"decisions changed, {MODELS[model].strip('*')}" for model in models)]
    rows = [head] if requests else []
    for request in requests:
        of = [run for run in runs if run["request"] == request]
        rows.append([request, cell(of, "unsc", "AccDut"), *(cell(of, model, "flips") for model in models)])
    return ["", *markdown(rows)] if rows else []


def certificates(runs: list[dict[str, Any]]) -> str:
    """What the certificates say, and in how many runs more test rows changed than their bound."""
    of = [run["certificate"] for run in runs]
    rows = "unseen rows" if of[0].get("unseen") else "training rows that nothing else read"

    def span(values: list[str]) -> str:
        return " to ".join(dict.fromkeys((values[0], values[-1])))

    counts = span([str(number) for number in sorted(c["rows"] for c in of)])
    bounds = span([f"{100 * bound:.2f}" for bound in sorted(c["upper_95"] for c in of)])
    said = f"Certified on {counts} {rows}: at most {bounds} % change."
    if "unsc" not in runs[0]["methods"]:
        return said
    exceeded = sum(run["methods"]["unsc"]["flips"] > run["certificate"]["upper_95"] for run in runs)
    return f"{said} On test rows more did in {exceeded} of {counted(len(runs), 'run')}."


def is_of_answers(content: Content) -> bool:
    """Whether a case is one of language models, whose answers are compared, not their decisions."""
    return "unsc" not in content["runs"][0]["methods"]


def overview(contents: list[Content]) -> list[str]:
    """Lines of a table with a row for each case of a classifier."""
    compared = ("unsc", "unprojected", "retrained")
    rows = [["case", "recognised", "UNSC", "no projection", "retrained"]]
    for content in contents:
        if is_of_answers(content):
            continue
        runs, name = content["runs"], content["plan"]["name"]
        changed = [f"{100 * mean(runs, model, 'flips'):.2f}" for model in compared]
        known = f"{100 * mean(runs, 'unsc', 'AccDut'):.1f}"
        rows.append([name, *("–" if value == "nan" else value for value in (known, *changed))])
    return markdown(rows)


def section(content: Content) -> str:
    """A case: a heading, what it shows, and folded away its tables, its certificates and how to run it."""
    runs, plan, answers = content["runs"], content["plan"], is_of_answers(content)
    said = conclusion_of_answers(runs) if answers else conclusion(runs)
    requests = f" of each of {len(plan['requests'])} requests" if "requests" in plan else ""
    seeds = f"{counted(len(plan['seeds']), 'seed')}{requests}. {plan.get('note', '')}".rstrip()
    lines = table(runs, OF_ANSWERS if answers else COLUMNS) + by_request(runs)
    picture_of = f"![Forget quality against model utility and changed tokens]({content['case']}.png)"
    command = f"python benchmarks/evidence.py run --root FOLDER --case {content['case']}"
    return "\n".join(
        [
            f"## {content['title']}", "", said, "", *([picture_of, ""] if answers else []),
            "<details><summary>Figures</summary>", "", seeds, "", *lines, "",
            certificates(runs), "", "```bash", command, "```", "", "</details>", "",
        ]
    )  # fmt: skip


def page(contents: list[Content]) -> str:
    """The page of all cases."""
    head = (
        "# Evidence\n\n"
        "All figures are percent of test rows. `python benchmarks/evidence.py page` makes this page from the JSON in\n"
        "`benchmarks/results/evidence`.\n\n"
    )
    words = (
        "*Recognised*: forgotten rows that UNSC's model still gives their class. The other columns are the decisions\n"
        "changed: kept rows whose most likely remaining class is another than the original's.\n\n"
        "In the tables below, ± is the standard deviation over runs. *Right to wrong*: changed decisions that were "
        "right.\n"
        "*Tokens changed*: tokens of kept answers at which another is now the most likely. *Recited*: extraction "
        "strength\nof forgotten answers. *Forget quality*: a p-value beside the retrained model.\n\n"
    )
    return head + "\n".join(overview(contents)) + "\n\n" + words + "\n".join(section(content) for content in contents)


def with_table(readme: str, content: Content) -> str:
    """README's text with the table of a case made anew."""
    lines = [line.replace("±", " ± ") for line in table(content["runs"], ("AccDut", "AccDrt", "flips"))]
    before, rest = readme.split(BEGIN)
    return before + BEGIN + "\n".join(["", *lines, ""]) + END + rest.split(END)[1]


def picture(contents: list[Content], path: Path) -> None:
    """Decisions changed on kept test rows by every model that was trained, in the cases to be pictured."""
    contents = [content for content in contents if content["plan"].get("picture")]
    shown = {"retrained": GREEN, "unprojected": "#c9c9c9", "random_projector": "#9a9a9a", "unsc": BLUE}
    figure = Figure(figsize=(8.0, 1.1 + 1.25 * len(contents)), layout="constrained")
    axes = figure.subplots()
    for i, content in enumerate(contents):
        for j, (model, colour) in enumerate(shown.items()):
            values = [100 * run["methods"].get(model, {}).get("flips", np.nan) for run in content["runs"]]
            if np.isnan(values).all():
                continue
            place, spread = i + 0.2 * j - 0.3, np.std(values, ddof=1) if len(values) > 1 else 0.0
            title = MODELS[model].strip("*") if i == 0 else None
            axes.barh(place, np.mean(values), 0.18, color=colour, xerr=spread, label=title, ecolor="#555555")
            axes.text(np.mean(values) + spread, place, f"  {np.mean(values):.1f} %", va="center", fontsize=9)
    axes.set_yticks(range(len(contents)), [content["plan"]["name"] for content in contents])
    axes.invert_yaxis()
    axes.set_xlabel("kept test rows that get another answer than before (%)")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(shown), frameon=False)
    save(figure, path)


def picture_of_answers(content: Content, path: Path) -> None:
    """Forget quality of each model against utility and changed tokens, means over seeds."""
    runs, columns = content["runs"], ("forget_quality", "model_utility", "flips")
    read = {model: {column: numbers(runs, model, column) for column in columns} for model in runs[0]["methods"]}
    points = {
        model: {column: float(np.mean(found)) for column, found in of.items()}
        for model, of in read.items()
        if all(of.values())
    }
    plot_trade_off({model: SimpleNamespace(**point) for model, point in points.items()}, path)
