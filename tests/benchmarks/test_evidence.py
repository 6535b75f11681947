"""The evidence script: figures come from JSON, whatever is missing is named, and a changed digit is noticed."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module, on copies of the files it writes."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("evidence")
    shutil.copytree(module.RESULTS, tmp_path / "results")
    for name, source in (("PAGE", module.PAGE), ("README", module.README)):
        monkeypatch.setattr(module, name, Path(shutil.copy(source, tmp_path)))
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return module


@pytest.fixture
def pages(evidence: Any) -> Any:
    """The module that writes pages."""
    return importlib.import_module("evidence_page")


def command(module: Any, monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evidence.py", *map(str, words)])
    module.main()


def test_committed_pages_are_those_of_the_json(evidence: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    command(evidence, monkeypatch, "check")


def test_a_changed_digit_is_noticed(evidence: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    text = evidence.PAGE.read_text()
    place = text.index("| **UNSC** | ") + len("| **UNSC** | ")
    evidence.PAGE.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
    with pytest.raises(SystemExit, match="evidence.md: differs"):
        command(evidence, monkeypatch, "check")


def test_a_conclusion_says_only_what_the_seeds_show(pages: Any) -> None:
    def run(unsc: float, unprojected: float, retrained: float) -> dict[str, Any]:
        flips = {"unsc": unsc, "unprojected": unprojected, "retrained": retrained}
        return {"methods": {"original": {}, **{model: {"flips": share} for model, share in flips.items()}}}

    said = pages.conclusion([run(0.010, 0.012, 0.04), run(0.012, 0.011, 0.05), run(0.011, 0.012, 0.04)])
    assert said == (
        "Kept: UNSC changes 1.10 % of the decisions, fewer than retraining (4.33 %); "
        "not told apart from no projection (1.17 %)."
    )
    for share, sentence in ((0.1167, "Of the forgotten rows 11.7 % are still recognised, 0.5 % without"), (0.01, None)):
        runs = [run(0.010, 0.012, 0.04), run(0.012, 0.011, 0.05)]
        for one in runs:
            one["methods"]["unsc"]["AccDut"], one["methods"]["unprojected"]["AccDut"] = share, 0.005
        assert ("still recognised" in pages.conclusion(runs)) is (sentence is not None)
        assert (sentence or "Kept") in pages.conclusion(runs)
    assert "more than no projection (0.10 %) and retraining (0.50 %)." in pages.conclusion(
        [run(0.010, 0.001, 0.005), run(0.012, 0.001, 0.005)]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(fingerprint="of another version"), "measured for another version of the case"),
        (lambda content: content.update(runs=content["runs"][:1]), "has 1 seed; a spread needs 2"),
    ],
)
def test_json_that_says_too_little_is_refused(
    change: Any, message: str, evidence: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = evidence.RESULTS / f"{evidence.SHOWN}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=message):
        command(evidence, monkeypatch, "check")


def test_missing_data_are_named_and_the_other_cases_run(
    evidence: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[tuple[str, int]] = []

    def recipe(case: str, seed: int, request: str, root: str, folder: Path, smoke: bool, threads: int) -> None:
        done.append((case, seed))
        results = json.loads((ROOT / "benchmarks/results/evidence" / f"{case}.json").read_text())["runs"][seed]
        place = evidence.run_folder(case, seed, request, folder, smoke)
        place.mkdir(parents=True)
        (place / "results.json").write_text(json.dumps(results))

    monkeypatch.setattr(evidence, "run_one", recipe)
    out = tmp_path / "out"
    with pytest.raises(SystemExit, match=r"fashion_mnist_shirt: not run, .*nowhere.* does not exist; give --root"):
        command(evidence, monkeypatch, "run", "--root", tmp_path / "nowhere", "--output_dir", out, "--case", "digits",
                "fashion_mnist_shirt")  # fmt: skip
    assert done == [("digits", seed) for seed in range(5)]
    made = json.loads((evidence.RESULTS / "digits.json").read_text())
    committed = json.loads((ROOT / "benchmarks/results/evidence/digits.json").read_text())
    assert made["runs"] == committed["runs"]


def test_a_run_that_fails_is_named_and_the_other_cases_are_collected(
    evidence: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    collected: list[str] = []

    def recipe(case: str, *_: object) -> None:
        if case == "digits":
            raise subprocess.CalledProcessError(1, "recipe")

    monkeypatch.setattr(evidence, "run_one", recipe)
    monkeypatch.setattr(evidence, "missing_data", lambda case, root: [])
    monkeypatch.setattr(evidence, "collect", lambda case, folder, smoke: collected.append(case))
    with pytest.raises(SystemExit, match="^digits: a run failed"):
        command(evidence, monkeypatch, "run", "--output_dir", tmp_path, "--case", "digits", "fashion_mnist_shirt")
    assert collected == ["fashion_mnist_shirt"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smoke(evidence: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ten steps of the demo's case; the committed JSON stays, and a second call does nothing."""
    before = {path.name: path.read_bytes() for path in evidence.RESULTS.iterdir()}
    command(evidence, monkeypatch, "run", "--smoke", "--case", "digits", "--output_dir", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in evidence.RESULTS.iterdir()} == before
    content = json.loads((tmp_path / "out" / "digits.json").read_text())
    assert [run["seed"] for run in content["runs"]] == [0]
    written = (tmp_path / "out" / "digits" / "smoke-0" / "results.json").stat().st_mtime_ns
    command(evidence, monkeypatch, "run", "--smoke", "--case", "digits", "--output_dir", tmp_path / "out")
    assert (tmp_path / "out" / "digits" / "smoke-0" / "results.json").stat().st_mtime_ns == written


def test_methods_of_language_models_are_compared_with_and_without_projection(pages: Any) -> None:
    def model(flips: float, utility: float, rouge: float) -> dict[str, Any]:
        return {"flips": flips, "model_utility": utility, "sets": {"forget": {"rouge_l": rouge}}}

    methods = {
        "npo": model(0.002, 0.88, 0.12), "npo unprojected": model(0.5, 0.15, 0.07), "rmu": model(0.006, 0.87, 0.03),
        "rmu unprojected": model(0.005, 0.86, 0.13), "retrained": model(0.005, 0.89, 0.14),
        "original": model(0.0, 0.91, 0.9),
    }  # fmt: skip
    assert pages.conclusion_of_answers([{"methods": methods}] * 2) == (
        "Kept: with projection the 2 methods change 0.2 to 0.6 % of the tokens (utility 0.87 to 0.88), without it 0.5 "
        "to 50.0 % of the tokens (utility 0.15 to 0.86). Forgotten: of those that keep 95 % "
        "of the utility, NPO comes nearest to the retrained model's ROUGE-L (12.0 and 14.0)."
    )


def test_a_page_says_where_a_certificate_was_exceeded(pages: Any) -> None:
    def run(flips: float, unseen: bool) -> dict[str, Any]:
        certificate = {"flips": 1, "rows": 100, "upper_95": 0.05, "unseen": unseen}
        return {"methods": {"unsc": {"flips": flips}}, "certificate": certificate}

    said = pages.certificates([run(0.06, True), run(0.05, True), run(0.0, True)])
    assert said == "Certified on 100 unseen rows: at most 5.00 % change. On test rows more did in 1 of 3 runs."
    assert "training rows" in pages.certificates([run(0.0, False)])
    wider = run(0.0, True)
    wider["certificate"].update(rows=90, upper_95=0.06)
    assert "on 90 to 100 unseen rows: at most 5.00 to 6.00 % change" in pages.certificates([run(0.0, True), wider])


def test_answers_of_language_models_are_read_by_path(pages: Any) -> None:
    measured = {
        "original": {"sets": {"forget": {"rouge_l": 0.5}}, "forget_quality": None},
        "unsc_retain": {"sets": {"forget": {"rouge_l": 0.25}}, "forget_quality": 0.5},
    }
    lines = pages.table([{"methods": measured}] * 2, ("sets.forget.rouge_l", "forget_quality", "leak"))
    assert lines == [
        "| model | forgotten, ROUGE-L | forget quality | leak |", "|---|---|---|---|",
        "| original | 50.0±0.0 | – | – |", "| UNSC retain | 25.0±0.0 | 0.500±0.000 | – |",
    ]  # fmt: skip


def test_a_case_of_several_requests_runs_each_and_shows_it(evidence: Any, pages: Any, tmp_path: Path) -> None:
    pairs = evidence.runs_of("digits_each", smoke=False)
    assert len(pairs) == len(set(pairs)) == 50
    places = {evidence.run_folder("digits_each", *pair, tmp_path, smoke=False) for pair in pairs}
    assert len(places) == 50
    runs = [
        {"request": request, "methods": {"original": {"flips": 0.0}, "unsc": {"flips": flips, "AccDut": flips}}}
        for request, flips in (("3", 0.01), ("T-shirt/top", 0.02), ("3", 0.03))
    ]
    assert pages.by_request(runs) == [
        "", "| forgotten | recognised by UNSC | decisions changed, UNSC |", "|---|---|---|",
        "| 3 | 2.0±1.4 | 2.00±1.41 |", "| T-shirt/top | 2.0 | 2.00 |",
    ]  # fmt: skip
    assert pages.by_request([{"methods": {"unsc": {"flips": 0.1}}}]) == []


def test_the_first_table_has_a_row_for_each_classifier(pages: Any) -> None:
    runs = [
        {"methods": {"unsc": {"flips": flips, "AccDut": 0.01}, "unprojected": {"flips": 0.04}}}
        for flips in (0.01, 0.02)
    ]
    cases = [
        {"case": "a", "plan": {"name": "digits"}, "runs": runs},
        {"case": "b", "plan": {"name": "answers"}, "runs": [{"methods": {"npo": {"flips": 0.1}}}]},
    ]
    head, _, *rows = pages.overview(cases)
    assert head.startswith("| case | recognised | UNSC | no projection | retrained |")
    assert rows == ["| digits | 1.0 | 1.50 | 4.00 | – |"]


def test_a_trained_model_has_one_name_in_all_cases(evidence: Any) -> None:
    """Trained models are kept by name, so a name that stands for two would give a case the wrong one."""
    made: dict[str, Any] = {}
    for plan in evidence.CASES.values():
        for kind in ("fine_tune", "train_network"):
            for name, options in plan.get(kind, {}).items():
                assert made.setdefault(name, (kind, plan["data"], options)) == (kind, plan["data"], options), name


def test_what_a_smoke_test_trains_serves_nothing_else(
    evidence: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(evidence.subprocess, "run", lambda command, **_: calls.append(command))
    for smoke in (True, False):
        evidence.run_one("alexnet_fashion_mnist", 1, "", "data", tmp_path, smoke, 1)
        *trained, recipe = calls
        place = str(tmp_path / "smoke" / "models" if smoke else tmp_path / "models")
        outputs = [call[call.index("--output_dir") + 1] for call in trained]
        assert outputs == [f"{place}/alexnet-1", f"{place}/alexnet-without-shirts-1"]
        assert f"{place}/alexnet-1" in recipe
        assert all(("--rows" in call) == smoke for call in trained)
        calls.clear()
