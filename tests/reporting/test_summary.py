"""Sentences hold the figures of the run, and the decision follows from the verdict."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from helpers.results import method_result, run_results
from rich.console import Console

from unsc_hf.evaluation.answers import Answers
from unsc_hf.evaluation.verdict import LABELS, MethodResult
from unsc_hf.reporting.summary import decision, print_summary, sentences
from unsc_hf.reporting.tables import answers_table, certificate_table, classifier_table, percent


def results(methods: dict[str, MethodResult], classes: list[str], **changes: Any) -> dict[str, Any]:
    request = {"forget_classes": classes, "rows": 60, "dataset": "d", "model": "m"}
    return run_results(request=request, table=classifier_table(methods).cells, **changes)


METHODS = {
    "original": method_result(AccDut=0.98, AccDrt=0.99, flips=0.0),
    "unprojected": method_result(AccDut=0.0, flips=0.0141),
    "unsc": method_result(AccDut=0.0004, flips=0.0062),
    "retrained": method_result(AccDut=0.001, flips=0.018),
}


@pytest.mark.parametrize(
    ("classes", "name"), [(["8"], "8"), (["a", "b", "c"], "a, b, c"), (["a", "b", "c", "d"], "4 classes")]
)
def test_three_sentences_on_classes(classes: list[str], name: str) -> None:
    assert sentences(results(METHODS, classes)) == [
        f"{name}: recognised 98 % before, < 0.1 % now.",
        "Decisions changed on the other classes: 0.6 % (retraining 1.8 %, no projection 1.4 %).",
        "Decisions changed on 3 of 900 held-out training rows: at most 0.8 % of such rows change, with 95 % "
        "confidence.",
    ]


def test_inputs_that_the_original_never_saw_are_called_so() -> None:
    content = results(METHODS, ["8"])
    content["certificate"] = {**content["certificate"], "unseen": True}
    assert sentences(content)[-1] == (
        "Decisions changed on 3 of 900 inputs that the original never saw: at most 0.8 % of such inputs change, with "
        "95 % confidence."
    )
    shown = [row[0] for row in certificate_table(content["certificate"])]
    assert "kept rows that the original never saw" in shown
    assert "at most this share of such inputs changes, with 95 % confidence" in shown


@pytest.mark.parametrize(
    ("bound", "shown"), [(0.0015, "0.2 %"), (0.00015, "0.1 %"), (0.008, "0.8 %"), (0.0081, "0.9 %")]
)
def test_a_bound_is_never_rounded_down(bound: float, shown: str) -> None:
    content = results(METHODS, ["8"])
    content["certificate"]["upper_95"] = bound
    assert f"at most {shown} of such rows" in sentences(content)[-1]


def test_rows_and_what_was_not_measured() -> None:
    known = {"original": 0.995, "unsc": 0.81, "retrained": 0.805}
    rows = {name: method_result(AccDut=None, AccDf=share, mia_auc=0.51) for name, share in known.items()}
    first, last = sentences(results(rows, []))
    assert first == "60 rows: classified rightly 99.5 % before, 81 % now (retraining 80.5 %)."
    assert last.startswith("Decisions changed on 3 of 900")
    assert len(sentences(results({"unsc": METHODS["unsc"]}, ["8"]))) == 2  # nothing to compare with


def test_answers() -> None:
    def answers(rouge: float, flips: float) -> Answers:
        forget = {"rouge_l": rouge, "extraction_strength": 0.1, "loss": 1.0}
        return Answers({"forget": forget, "retain": {"rouge_l": 0.9}, "real_authors": {"rouge_l": 0.5}}, flips=flips)

    methods = {"original": answers(0.9, 0.0), "npo": answers(0.3, 0.02), "npo unprojected": answers(0.2, 0.05)}
    table = answers_table(methods, "npo")
    said = sentences(run_results(table=table.cells, written=table.written))
    assert said[0] == "Forgotten answers: ROUGE-L 90 % before, 30 % now."
    assert said[1] == "Tokens changed in kept answers: 2 % (no projection 5 %)."
    assert table.cells[0][5] == "ROUGE-L on real authors"
    assert table.cells[2][1:6] == ["30 %", "90 %", "2 %", "10 %", "50 %"]


def test_columns_of_an_earlier_version_are_not_misread() -> None:
    table = [["model", "AccDut", "AccDrt", "AccDf", "AccDr"], ["original", "64.0", "90.0", "1.0", "1.0"]]
    assert len(sentences(run_results(table=[*table, ["UNSC", "0.0", "92.0", "0.0", "100.0"]]))) == 1


@pytest.mark.parametrize(
    ("word", "references", "classes", "said"),
    [
        ("not forgotten", 0, ["8"], "Because. Do not publish"),
        ("not judged", 0, ["8"], "Because."),
        ("suppressed", 2, ["8"], "Whether the features still show it is open"),
        ("suppressed", 3, ["8"], "output, but because. Publish the weights only if"),
        ("suppressed", 3, [], "The features were not examined"),
        ("removed", 4, ["8"], "no audit tells the model from 4 retrained ones"),
    ],
)
def test_each_verdict_decides(word: str, references: int, classes: list[str], said: str) -> None:
    verdict = {"word": word, "reason": "because"}
    assert said in decision(results(METHODS, classes, verdict=verdict, retrained_references=[{}] * references))


def test_a_summary_fits_a_terminal(tmp_path: Path) -> None:
    text = io.StringIO()
    content = results(METHODS, ["8"], written="UNSC", caveats=["One caveat."])
    print_summary(content, tmp_path, Console(file=text, width=100), ["the last line"])
    lines = text.getvalue().splitlines()
    assert len(lines) < 30
    assert lines[-1] == "the last line"
    for said in (*sentences(content)[:2], "Note: One caveat.", f"{tmp_path}/report.html", "Verdict: suppressed."):
        assert any(line.startswith(said) or said in line for line in lines), said
    assert any(line.split()[:2] == ["UNSC", "<"] for line in lines)


@pytest.mark.parametrize(("word", "shared"), [("suppressed", True), ("not forgotten", False)])
def test_only_a_model_that_forgot_is_shared(word: str, shared: bool, tmp_path: Path) -> None:
    text = io.StringIO()
    content = results(METHODS, ["8"], written="UNSC", caveats=[], verdict={"word": word, "reason": "because"})
    print_summary(content, tmp_path, Console(file=text, width=100))
    assert ("unsc push" in text.getvalue()) == shared


def test_percent() -> None:
    assert [percent(x) for x in (None, 0.0, 1.0, 0.0062, 0.985, 0.0004)] == [
        "–",
        "0 %",
        "100 %",
        "0.6 %",
        "98.5 %",
        "< 0.1 %",
    ]


def test_a_comparison_fits_80_columns_without_cutting_a_word() -> None:
    shares = dict.fromkeys(("AccDut", "AccDrt", "AccDf", "AccDr", "probe_forget", "prototype_attack_10"), 1.0)
    row = method_result(**shares, mia_auc=0.5, flips=0.0123, leak=0.0246, seconds=123.0)
    results = dict.fromkeys(LABELS, row)
    table = classifier_table(results)
    text = io.StringIO()
    Console(file=text, width=80).print(table.rich())
    assert "…" not in text.getvalue()
    assert "1.2 %" in text.getvalue()
    header, first = table.cells[0], table.cells[1]
    assert first[header.index("decisions changed")] == "1.2 %"
    unknown = classifier_table({"unsc": method_result()}).cells[1]
    assert unknown[header.index("decisions changed")] == "–"
