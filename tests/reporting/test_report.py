"""The report of a run: whole in one file, in words for every outcome, with the signatures of what went wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.results import accuracies, finished_run, png_bytes, run_results

from unsc_hf.evaluation.signatures import run_signatures
from unsc_hf.reporting.model_card import build_card, escape
from unsc_hf.reporting.report import write_run_report
from unsc_hf.reporting.tables import certificate_table, requests_table


def test_a_report_holds_everything_and_asks_no_network(tmp_path: Path) -> None:
    (tmp_path / "unlearning.png").write_bytes(png_bytes())
    page = write_run_report(run_results(), tmp_path).read_text()
    for text in ("Shirt", "6,000", "64\u00a0% before, 0\u00a0% now", "75 steps", "its target",
                 "Suppressed: two models only",
                 "None of the known", "0.012", "c.d", "bfloat16", "energy", "recipes/unlearn_vit.py"):  # fmt: skip
        assert text in page, text
    assert page.count("<img ") == 1
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)', page))
    assert "://" not in page
    assert "<script" not in page


def test_names_from_outside_stay_text(tmp_path: Path) -> None:
    request = {"forget_classes": ["<script>alert(1)</script>"], "rows": 1, "dataset": "d", "model": "<b>m</b>"}
    page = write_run_report(run_results(request=request), tmp_path).read_text()
    assert "<script" not in page
    assert "<b>m" not in page


@pytest.mark.parametrize(
    ("changes", "sign"),
    [
        ({"methods": {"original": accuracies(), "unsc": accuracies(AccDrt=0.87)}}, "over-unlearning"),
        ({"methods": {"original": accuracies(), "unsc": accuracies(AccDut=0.02)}}, "stalled"),
        ({"certificate": {"stop_reason": "leak_budget"}}, "leak budget"),
        ({"certificate": {"stop_reason": "max_steps"}}, "step limit"),
        ({"history": [{"forget_accuracy": a, "forget_loss": 1.0} for a in (0.5, 0.1, 0.3)]}, "came back"),
        ({"history": [{"forget_accuracy": 0.5, "forget_loss": None}]}, "not finite"),
        (
            {"methods": {"original": accuracies(), "unsc": accuracies(), "random_projector": accuracies(AccDrt=0.91)}},
            "random subspace",
        ),
    ],
)
def test_each_failure_has_its_signature(changes: dict[str, Any], sign: str) -> None:
    assert run_signatures(run_results()) == []
    borders = {"original": accuracies(), "unsc": accuracies(AccDrt=0.885, AccDut=0.01)}
    assert run_signatures(run_results(methods=borders)) == []
    signs = run_signatures(run_results(**changes))
    assert len(signs) == 1
    assert sign in signs[0]


def test_card_and_report_say_the_same(tmp_path: Path) -> None:
    request = {"time": "2026-01-02", "rows": 60, "digest": "ab12", "salt": "cd34", "leak": 0.0123}
    results = run_results(requests=[request])
    page = write_run_report(json.loads(json.dumps(results)), tmp_path).read_text()
    assert write_run_report(results, tmp_path).read_text() == page
    card = str(build_card(finished_run(certificate=results["certificate"], requests=[request])))
    for row in [*certificate_table(results["certificate"]), *requests_table([request])]:
        assert "".join(f"<td>{cell}</td>" for cell in row) in page or row[0] in ("what", "when")
        assert " | ".join(map(escape, row)) in card
    assert "6,000 training rows of class Shirt." in page
    assert "6,000 training rows of class Shirt." in card


def test_the_first_screen_decides(tmp_path: Path) -> None:
    page = write_run_report(run_results(), tmp_path).read_text().replace("\u00a0", " ")
    first = page.split("<nav")[0]
    for said in (
        "suppressed",
        "Whether the features still show it is open",
        "Shirt: recognised 64 % before, 0 % now.",
        "Decisions changed on the other classes: 1.3 %.",
        "at most 0.8 % of such rows",
        "<td>92 %</td>",
    ):
        assert said in first, said
    wrong = {"original": accuracies(), "unsc": accuracies(negative_flips=0.006)}
    page = write_run_report(run_results(methods=wrong), tmp_path).read_text().replace("\u00a0", " ")
    assert "went from right to wrong: 0.6 %" in page


def test_the_contents_lead_to_every_part(tmp_path: Path) -> None:
    page = write_run_report(run_results(), tmp_path).read_text()
    links = dict(re.findall(r'<a href="#(\w+)">([^<]+)</a>', page))
    parts = dict(re.findall(r'<section id="(\w+)">\s*<h2>([^<]+)</h2>', page))
    assert links == parts
    assert {"Certificate", "Options", "What happened"} <= set(parts.values())
