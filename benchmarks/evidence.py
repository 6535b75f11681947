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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from evidence_page import is_of_answers, page, picture, picture_of_answers, with_table
from filelock import FileLock

from unsc_hf.reporting.model_card import versions
from unsc_hf.reporting.tables import counted
from unsc_hf.utils.files import write_text

ROOT = Path(__file__).parents[1]
CASES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "benchmarks" / "evidence.yaml").read_text(encoding="utf-8"))
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "evidence", ROOT / "docs" / "evidence.md"
README, SHOWN = ROOT / "README.md", "encoder_banking"
FEWEST_SEEDS = 2  # for a spread


def runs_of(case: str, smoke: bool) -> list[tuple[int, str]]:
    """Seed and request of every run of a case; one for a smoke test. Without `requests`, the request is empty."""
    pairs = list(itertools.product(CASES[case]["seeds"], CASES[case].get("requests", [""])))
    return pairs[:1] if smoke else pairs


def fingerprint(case: str) -> str:
    """What a JSON belongs to: the case as it stands in the YAML. Its `versions` say which code measured it."""
    plan = {key: value for key, value in CASES[case].items() if key not in ("title", "name", "note", "picture")}
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
    home = folder / "smoke" if smoke else folder  # what is trained in a smoke test serves nothing else

    def script(name: str, *options: str) -> None:
        command = [sys.executable, str(ROOT / "benchmarks" / name), *options]
        subprocess.run(command, check=True, env=environment)

    if "prepare" in plan:
        script(*(item.format(root=root, folder=home) for item in plan["prepare"]))
    for kind in ("fine_tune", "train_network"):
        for name, more in plan.get(kind, {}).items():
            model, data = home / "models" / name.format(seed=seed), plan["data"].format(root=root)
            model.parent.mkdir(parents=True, exist_ok=True)
            options = ["--data", data, "--output_dir", str(model), "--seed", str(seed), *more]
            options += ["--epochs", "1", "--rows", "1000"] if smoke and kind == "train_network" else []
            with FileLock(f"{model}.lock"):  # another run may need the same model
                script(f"{kind}.py", *options)
    filled = [item.format(root=root, seed=seed, folder=home, request=request) for item in plan["arguments"]]
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
        contents.append({**content, "plan": CASES[case]})
    return contents


def pages() -> dict[Path, str]:
    """What each page that shows figures must say."""
    contents = stored()
    (shown,) = (content for content in contents if content["case"] == SHOWN)
    return {PAGE: page(contents), README: with_table(README.read_text(encoding="utf-8"), shown)}


def words(item: str) -> list[str]:
    """An argument, or the words of the file that `@` names."""
    return (ROOT / item[1:]).read_text(encoding="utf-8").split() if item.startswith("@") else [item]


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
    for path, text in pages().items() if options.action != "run" else ():
        if options.action == "page":
            write_text(path, text)
        elif path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.name}: differs from what the JSON gives; run `python benchmarks/evidence.py page`.")
    if options.action == "page":
        picture(stored(), PAGE.with_name("decisions_changed.png"))
        for content in filter(is_of_answers, stored()):
            picture_of_answers(content, PAGE.with_name(f"{content['case']}.png"))


if __name__ == "__main__":
    main()
