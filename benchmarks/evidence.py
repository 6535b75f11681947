"""The evidence: each case of `evidence.yaml` run by the recipe as a user would, and the page that shows the figures.

    python benchmarks/evidence.py run --root FOLDER --output_dir OUT [--case NAME ...] [--smoke]
    python benchmarks/evidence.py page
    python benchmarks/evidence.py check

`run` unlearns for every seed of a case and writes `benchmarks/results/evidence/NAME.json`. Finished runs are kept in
the output folder, so a stopped run goes on where it was. `--root` is the folder that `{root}` stands for in the cases:
data sets and models that are not part of the project. `page` writes `docs/evidence.md`, its picture and README's
table from the JSON alone, and `check` fails where a page says something else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.figure import Figure

from unsc_hf.reporting.model_card import versions
from unsc_hf.reporting.plots import BLUE, GREEN, save
from unsc_hf.utils.files import write_text

ROOT = Path(__file__).parents[1]
CASES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "benchmarks" / "evidence.yaml").read_text(encoding="utf-8"))
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "evidence", ROOT / "docs" / "evidence.md"
README, SHOWN = ROOT / "README.md", "fashion_mnist_shirt"
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


def run(case: str, root: str, folder: Path, smoke: bool) -> None:
    """Every seed of a case by the recipe, and its JSON."""
    plan = CASES[case]
    runs = []
    for seed in plan["seeds"][:1] if smoke else plan["seeds"]:
        place = folder / case / str(seed)
        if not (place / "results.json").is_file():
            filled = [item.format(root=root, seed=seed, folder=folder) for item in plan["arguments"]]
            arguments = [word for item in filled for word in words(item)]
            for name, more in plan.get("fine_tune", {}).items():
                model, data = folder / "models" / name.format(seed=seed), plan["data"].format(root=root)
                tune = ["--data", data, "--output_dir", str(model), "--seed", str(seed), *more]
                subprocess.run([sys.executable, str(ROOT / "benchmarks" / "fine_tune.py"), *tune], check=True)
            command = [sys.executable, str(ROOT / "recipes" / plan["recipe"]), *arguments, "--seed", str(seed)]
            quiet = ["--disable_tqdm", "true", "--output_dir", str(place)]
            subprocess.run([*command, *quiet, *(["--max_steps", "10"] if smoke else [])], check=True)
        results = json.loads((place / "results.json").read_text(encoding="utf-8"))
        keys = ("methods", "certificate", "verdict", "seconds", "steps")
        runs.append({"seed": seed, **{key: results[key] for key in keys}})
    content = {"case": case, "title": plan["title"], "recipe": plan["recipe"], "arguments": plan["arguments"]}
    write_text(RESULTS / f"{case}.json", json.dumps({**content, "versions": versions(), "runs": runs}, indent=1))


def words(item: str) -> list[str]:
    """An argument, or the words of the file that `@` names."""
    return (ROOT / item[1:]).read_text(encoding="utf-8").split() if item.startswith("@") else [item]


def cell(runs: list[dict[str, Any]], model: str, column: str) -> str:
    """Mean ± standard deviation over seeds; a dash for what was not measured."""
    _, factor, digits = COLUMNS[column]
    numbers = [run["methods"].get(model, {}).get(column) for run in runs]
    known = [factor * number for number in numbers if number is not None]
    if not known:
        return "–"
    spread = f" ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else ""
    return f"{np.mean(known):.{digits}f}{spread}"


def table(runs: list[dict[str, Any]], columns: Iterable[str]) -> list[str]:
    """Lines of a Markdown table, a row for each model."""
    rows = [["model", *(COLUMNS[column][0] for column in columns)]]
    present = [model for model in MODELS if model in runs[0]["methods"]]
    rows += [[MODELS[model], *(cell(runs, model, column) for column in columns)] for model in present]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def readme() -> str:
    """README with its table made anew."""
    content = json.loads((RESULTS / f"{SHOWN}.json").read_text(encoding="utf-8"))
    lines = table(content["runs"], ("AccDut", "AccDrt", "flips"))
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    return before + BEGIN + "\n".join(["", *lines, ""]) + END + rest.split(END)[1]


def section(content: dict[str, Any]) -> str:
    """A case as a heading, a table and its certificates."""
    runs, lines = content["runs"], table(content["runs"], COLUMNS)
    certificates = [run["certificate"] for run in runs]
    shown = ", ".join(f"{c['flips']} of {c['rows']} (at most {c['upper_95']:.2%})" for c in certificates)
    seeds = f"{len(runs)} seeds; percent, mean ± standard deviation." if len(runs) > 1 else "One seed; percent."
    arguments = [f"$(cat {item[1:]})" if item.startswith("@") else item for item in content["arguments"]]
    command = (
        " ".join([f"recipes/{content['recipe']}", *arguments])
        .replace("{root}/", "")
        .replace("{folder}/", "")
        .replace("{seed}", "SEED")
    )
    return "\n".join(
        [
            f"## {content['title']}", "", seeds, "", *lines, "",
            f"Certificates, decisions changed on rows that nothing else read: {shown}.", "",
            f"```bash\naccelerate launch {command} --seed SEED\n```", "",
        ]
    )  # fmt: skip


def page() -> str:
    """The page, from the committed JSON."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    head = (
        "# Evidence\n\nEvery figure here is on test rows, with default options. The page is generated by\n"
        "`python benchmarks/evidence.py page` from the JSON in `benchmarks/results/evidence`.\n\n"
        "*Decisions changed*: kept test rows whose most likely remaining class is not the original's. "
        "*Right to wrong*: those that the original had right.\n\n"
    )
    return head + "\n".join(section(content) for content in contents)


def picture(path: Path) -> None:
    """Decisions changed on kept test rows by every model that was trained, a group of bars for each case."""
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))]
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
    axes.set_yticks(range(len(contents)), [content["title"].split(":")[0] for content in contents])
    axes.invert_yaxis()
    axes.set_xlabel("kept test rows that get another answer than before (%)")
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(shown), frameon=False)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("action", choices=["run", "page", "check"])
    parser.add_argument("--root", default=".", help="folder of data sets and models")
    parser.add_argument("--output_dir", default="outputs/evidence", help="folder of the runs")
    parser.add_argument("--case", nargs="*", choices=list(CASES), default=list(CASES), help="cases to run; all")
    parser.add_argument("--smoke", action="store_true", help="one seed, ten steps")
    options = parser.parse_args()
    if options.action == "run":
        for case in options.case:
            run(case, options.root, Path(options.output_dir), options.smoke)
    if options.action == "check":
        for file, content in ((PAGE, page()), (README, readme())):
            if file.read_text(encoding="utf-8") != content:
                sys.exit(f"{file.name}: differs from what the JSON gives; run `python benchmarks/evidence.py page`.")
    if options.action == "page":
        write_text(PAGE, page())
        write_text(README, readme())
        picture(PAGE.with_name("decisions_changed.png"))


if __name__ == "__main__":
    main()
