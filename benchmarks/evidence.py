"""The evidence: each case of `evidence.yaml` run by the recipe as a user would, and the page that shows the figures.

    python benchmarks/evidence.py run --root FOLDER --output_dir OUT [--case NAME ...] [--smoke]
    python benchmarks/evidence.py page
    python benchmarks/evidence.py check

`run` unlearns for every seed of a case and writes `benchmarks/results/evidence/NAME.json`. Finished runs are kept in
the output folder, so a stopped run goes on where it was. `--root` is the folder that `{root}` stands for in the cases:
data sets and models that are not part of the project. `--smoke` runs ten steps of one seed, and keeps its JSON there.
`page` writes `docs/evidence.md`, its picture and README's table from the committed JSON alone, and `check` fails where
a page says something else, or where a JSON belongs to another version.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from unsc_hf.reporting.model_card import versions
from unsc_hf.reporting.plots import BLUE, GREEN, objective_title, plot_trade_off, save
from unsc_hf.reporting.tables import counted
from unsc_hf.utils.files import write_text

ROOT = Path(__file__).parents[1]
CASES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "benchmarks" / "evidence.yaml").read_text(encoding="utf-8"))
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "evidence", ROOT / "docs" / "evidence.md"
README, SHOWN = ROOT / "README.md", "encoder_banking"
_MOST_CERTIFICATES = 3  # that are listed
_FORGOTTEN = 1.0  # percent of the forgotten rows that may still be recognised without a word
_USEFUL = 0.95  # of the original's utility: a method that keeps less is no choice
FEWEST_SEEDS = 2  # for a spread
BEGIN, END = "<!-- made by benchmarks/evidence.py -->\n", "\n<!-- end -->"
MODELS = {
    "original": "original", "masked": "masked logits", "random_projector": "random subspace",
    "unprojected": "no projection", "unsc": "**UNSC**", "retrained": "retrained",
}  # fmt: skip
COLUMNS = {
    "AccDut": ("forgotten, recognised", 100, 1), "AccDrt": ("kept, right", 100, 1),
    "flips": ("decisions changed", 100, 2), "negative_flips": ("right to wrong", 100, 2),
    "mia_auc": ("membership AUC", 1, 3), "probe_forget": ("linear probe", 100, 1),
    "prototype_attack_10": ("10-shot prototype", 100, 1), "seconds": ("seconds", 1, 0),
}  # fmt: skip
ANSWERS = (
    "*Tokens changed*: tokens of kept answers at which another one than the original's is the most likely. *Recited*: "
    "the extraction strength of forgotten answers. *Forget quality*: a p-value beside the retrained model."
)
OF_ANSWERS = {
    "sets.forget.rouge_l": ("forgotten, ROUGE-L", 100, 1), "sets.retain.rouge_l": ("kept, ROUGE-L", 100, 1),
    "flips": ("tokens changed", 100, 2), "sets.forget.extraction_strength": ("recited", 100, 1),
    "forget_quality": ("forget quality", 1, 3), "model_utility": ("model utility", 1, 3), "leak": ("leak", 100, 2),
}  # fmt: skip


def runs_of(case: str, smoke: bool) -> list[tuple[int, str]]:
    """Seed and request of every run of a case; one for a smoke test. Without `requests`, the request is empty."""
    pairs = list(itertools.product(CASES[case]["seeds"], CASES[case].get("requests", [""])))
    return pairs[:1] if smoke else pairs


def fingerprint(case: str) -> str:
    """What a JSON belongs to: the case as it stands in the YAML. Its `versions` say which code measured it."""
    plan = {key: value for key, value in CASES[case].items() if key not in ("title", "note", "picture")}
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]


def missing_data(case: str, root: str) -> list[str]:
    """Files and folders under `root` that the case needs and that are not there."""
    plan = CASES[case]
    stated = [*plan["arguments"], *plan.get("prepare", []), plan.get("data", "")]
    paths = {
        item.format(root=root, seed=seed, folder="", request="")
        for item in stated
        if "{root}" in item
        for seed in plan["seeds"]
    }
    return sorted(path for path in paths if not Path(path).exists())


def run_folder(case: str, seed: int, request: str, folder: Path, smoke: bool) -> Path:
    """Where a run is kept: runs of another version of the case, or of a smoke test, are not taken for it."""
    name = "-".join(filter(None, ["smoke" if smoke else fingerprint(case), request.replace("/", "_"), str(seed)]))
    return folder / case / name


def run_one(case: str, seed: int, request: str, root: str, folder: Path, smoke: bool, threads: int) -> None:
    """One run by the recipe, as a user would start it, unless its results are there."""
    plan, place = CASES[case], run_folder(case, seed, request, folder, smoke)
    if (place / "results.json").is_file():
        return
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    if "prepare" in plan:
        script, *more = (item.format(root=root, folder=folder) for item in plan["prepare"])
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), *more], check=True, env=environment)
    for name, more in plan.get("fine_tune", {}).items():
        model, data = folder / "models" / name.format(seed=seed), plan["data"].format(root=root)
        tune = ["--data", data, "--output_dir", str(model), "--seed", str(seed), *more]
        subprocess.run([sys.executable, str(ROOT / "benchmarks" / "fine_tune.py"), *tune], check=True, env=environment)
    filled = [item.format(root=root, seed=seed, folder=folder, request=request) for item in plan["arguments"]]
    arguments = [word for item in filled for word in words(item)]
    command = [sys.executable, str(ROOT / "recipes" / plan["recipe"]), *arguments, "--seed", str(seed)]
    quiet = ["--disable_tqdm", "true", "--output_dir", str(place)]
    more = ["--max_steps", "10"] if smoke else []
    subprocess.run([*command, *quiet, *more], check=True, env=environment, stdout=subprocess.DEVNULL)


def collect(case: str, folder: Path, smoke: bool) -> None:
    """The JSON of a case from its finished runs; that of a smoke test stays in the output folder."""
    plan, runs = CASES[case], []
    for seed, request in runs_of(case, smoke):
        file = run_folder(case, seed, request, folder, smoke) / "results.json"
        results = json.loads(file.read_text(encoding="utf-8"))
        keys = ("methods", "certificate", "verdict", "seconds", "steps")
        named = {"seed": seed, "request": request} if request else {"seed": seed}
        runs.append({**named, **{key: results[key] for key in keys}})
    content = {"case": case, "title": plan["title"], "recipe": plan["recipe"], "arguments": plan["arguments"]}
    content |= {"fingerprint": fingerprint(case), "versions": versions(), "runs": runs}
    write_text((folder if smoke else RESULTS) / f"{case}.json", json.dumps(content, indent=1))


def run(cases: list[str], root: str, folder: Path, smoke: bool, jobs: int) -> None:
    """All runs of all cases, `jobs` at a time; a case that fails or lacks data is named, and the others run."""
    missing = {case: missing_data(case, root) for case in cases}
    todo = [(case, *pair) for case in cases if not missing[case] for pair in runs_of(case, smoke)]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        started = [(which[0], pool.submit(run_one, *which, root, folder, smoke, threads)) for which in todo]
    failed = {case for case, run in started if isinstance(run.exception(), subprocess.CalledProcessError)}
    for case, run in started:
        if case not in failed:
            run.result()
    for case in cases:
        if not missing[case] and case not in failed:
            collect(case, folder, smoke)
    absent = [f"{case}: not run, {paths[0]} does not exist; give --root." for case, paths in missing.items() if paths]
    absent += [f"{case}: a run failed, as said above; the others are kept." for case in cases if case in failed]
    if absent:
        sys.exit("\n".join(absent))


def stored() -> list[dict[str, Any]]:
    """The committed JSON of every case, in the order of the YAML.

    Raises:
        SystemExit: it belongs to another version of the case, or has too few seeds for a spread.
    """
    contents = []
    for case in CASES:
        path = RESULTS / f"{case}.json"
        if not path.is_file():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["fingerprint"] != fingerprint(case):
            sys.exit(f"{path.name}: measured for another version of the case; run it again with --case {case}.")
        if len(content["runs"]) < FEWEST_SEEDS:
            sys.exit(f"{path.name}: has {counted(len(content['runs']), 'seed')}; a spread needs {FEWEST_SEEDS}.")
        contents.append(content)
    return contents


def words(item: str) -> list[str]:
    """An argument, or the words of the file that `@` names."""
    return (ROOT / item[1:]).read_text(encoding="utf-8").split() if item.startswith("@") else [item]


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
    """Mean ± standard deviation over seeds; a dash for what was not measured."""
    _, factor, digits = (COLUMNS | OF_ANSWERS)[column]
    known = [factor * number for number in numbers(runs, model, column)]
    if not known:
        return "–"
    spread = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
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


def readme() -> str:
    """README with its table made anew."""
    (content,) = (content for content in stored() if content["case"] == SHOWN)
    lines = table(content["runs"], ("AccDut", "AccDrt", "flips"))
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + "\n".join(["", *lines, ""]) + END + rest.split(END)[1]


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
        against = "" if np.isnan(probes["retrained"]) else f" and {probes['retrained']:.0f} % after retraining"
        sentences.append(
            f"Forgotten: a linear probe still reads {probes['unsc']:.0f} % of the forgotten rows in the features, "
            f"{probes['original']:.0f} % before{against}."
        )
        if probes["retrained"] < probes["unsc"]:
            sentences.append("Retrain when that must not be readable.")
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
    """Lines of a table of the decisions changed, a row for each request; none where a case has one request."""
    requests = list(dict.fromkeys(run["request"] for run in runs if "request" in run))
    models = [model for model in MODELS if model in runs[0]["methods"] and model not in ("original", "masked")]
    rows = [["decisions changed, forgetting", *(MODELS[model] for model in models)]] if requests else []
    for request in requests:
        of = [run for run in runs if run["request"] == request]
        rows.append([request, *(cell(of, model, "flips") for model in models)])
    return ["", *markdown(rows)] if rows else []


def certificates(runs: list[dict[str, Any]]) -> str:
    """What the certificates say, and in how many runs more test rows changed than their bound."""
    of = [run["certificate"] for run in runs]
    rows = "rows that the original never saw" if of[0].get("unseen") else "training rows that nothing else read"
    listed = ", ".join(f"{c['flips']} of {c['rows']} (at most {c['upper_95']:.2%})" for c in of[:_MOST_CERTIFICATES])
    said = f"Certificates, decisions changed on {rows}: {listed}{', ...' if len(of) > _MOST_CERTIFICATES else ''}."
    if "unsc" not in runs[0]["methods"]:
        return said
    exceeded = sum(run["methods"]["unsc"]["flips"] > run["certificate"]["upper_95"] for run in runs)
    return f"{said} On test rows more changed than the bound says in {exceeded} of {counted(len(runs), 'run')}."


def section(content: dict[str, Any]) -> str:
    """A case as a heading, a table and its certificates."""
    runs = content["runs"]
    answers = "unsc" not in runs[0]["methods"]
    said = conclusion_of_answers(runs) if answers else conclusion(runs)
    lines = table(runs, OF_ANSWERS if answers else COLUMNS)
    if answers:
        lines += ["", f"![Forget quality against model utility and changed tokens]({content['case']}.png)"]
    parts = {part.replace("_", "-"): [run["seconds"][part] for run in runs] for part in runs[0]["seconds"]}
    spent = ", ".join(f"{part} {np.mean(seconds):.0f}" for part, seconds in parts.items())
    lines += by_request(runs)
    plan = CASES[content["case"]]
    requests = f" of each of {len(plan['requests'])} requests" if "requests" in plan else ""
    seeds = f"{counted(len(plan['seeds']), 'seed')}{requests}."
    seeds = f"{seeds} {plan.get('note', '')}".rstrip()
    arguments = [f"$(cat {item[1:]})" if item.startswith("@") else item for item in content["arguments"]]
    command = (
        " ".join([f"recipes/{content['recipe']}", *arguments])
        .replace("{root}/", "")
        .replace("{folder}/", "")
        .replace("{seed}", "SEED")
        .replace("{request}", "REQUEST")
    )
    first = plan.get("prepare", [])
    made = " ".join(["python", f"benchmarks/{first[0]}", *first[1:]]) + "\n" if first else ""
    made = made.replace("{root}/", "").replace("{folder}/", "")
    return "\n".join(
        [
            f"## {content['title']}", "", said, "", seeds, "", *lines, "",
            certificates(runs), "",
            f"Seconds of UNSC: {spent}.", "",
            f"```bash\n{made}accelerate launch {command} --seed SEED\n```", "",
        ]
    )  # fmt: skip


def page() -> str:
    """The page, from the committed JSON."""
    head = (
        "# Evidence\n\nEvery figure here is on test rows, with the options shown: percent, mean ± standard deviation. "
        "The page is generated by\n"
        "`python benchmarks/evidence.py page` from the JSON in `benchmarks/results/evidence`.\n\n"
        "*Decisions changed*: kept test rows whose most likely remaining class is not the original's. "
        f"*Right to wrong*: those that the original had right. {ANSWERS}\n\n"
    )
    return head + "\n".join(section(content) for content in stored())


def picture(path: Path) -> None:
    """Decisions changed on kept test rows by every model that was trained, in the cases to be pictured."""
    contents = [content for content in stored() if "picture" in CASES[content["case"]]]
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
    axes.set_yticks(range(len(contents)), [CASES[content["case"]]["picture"] for content in contents])
    axes.invert_yaxis()
    axes.set_xlabel("kept test rows that get another answer than before (%)")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(shown), frameon=False)
    save(figure, path)


def picture_of_answers(content: dict[str, Any], path: Path) -> None:
    """Forget quality of each model against utility and changed tokens, means over seeds."""
    runs, columns = content["runs"], ("forget_quality", "model_utility", "flips")
    read = {model: {column: numbers(runs, model, column) for column in columns} for model in runs[0]["methods"]}
    points = {
        model: {column: float(np.mean(found)) for column, found in of.items()}
        for model, of in read.items()
        if all(of.values())
    }
    plot_trade_off({model: SimpleNamespace(**point) for model, point in points.items()}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("action", choices=["run", "page", "check"])
    parser.add_argument("--root", default=".", help="folder of data sets and models")
    parser.add_argument("--output_dir", default="outputs/evidence", help="folder of the runs")
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES), help="cases to run; all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the cores")
    parser.add_argument("--smoke", action="store_true", help="one seed, ten steps")
    options = parser.parse_args()
    if options.action == "run":
        run(options.case, options.root, Path(options.output_dir), options.smoke, options.jobs)
    if options.action == "check":
        for file, content in ((PAGE, page()), (README, readme())):
            if file.read_text(encoding="utf-8") != content:
                sys.exit(f"{file.name}: differs from what the JSON gives; run `python benchmarks/evidence.py page`.")
    if options.action == "page":
        write_text(PAGE, page())
        write_text(README, readme())
        picture(PAGE.with_name("decisions_changed.png"))
        for content in stored():
            if "unsc" not in content["runs"][0]["methods"]:
                picture_of_answers(content, PAGE.with_name(f"{content['case']}.png"))


if __name__ == "__main__":
    main()
