"""Tables of people: they fit a terminal, and say a missing value as such."""

from __future__ import annotations

import io

from helpers.results import method_result
from rich.console import Console

from unsc_hf.evaluation.verdict import LABELS
from unsc_hf.reporting.tables import classifier_table


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
