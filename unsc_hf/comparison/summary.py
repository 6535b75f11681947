"""A comparison of methods as numbers that may be printed: means with intervals, and verdicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from ..evaluation.audits import AUDITS
from ..evaluation.verdict import FEWEST_REFERENCES, WORDS, Evidence, audits_outside, judge
from ..reporting.tables import markdown as markdown
from .methods import METHODS

ORIGINAL, RETRAINED = "original", "retrained"

_MAIN, _COST = ("AccDut", "AccDrt", "AccDf", "AccDr"), ("leak", "seconds")
_KEPT = {"flips": "decisions changed", "negative_flips": "right to wrong"}  # on kept test rows


def title(name: str) -> str:
    """How tables call a method, or another model."""
    return METHODS[name].title if name in METHODS else name


def columns(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, str]:
    """Column titles by path: accuracies, decisions changed, the headline of each audit that was run, costs."""
    run = next(iter(runs.values()))[0]["audits"]
    audits = {f"{name}.{AUDITS[name].headline}": AUDITS[name].title for name in run if AUDITS[name].headline}
    more = {"collateral.change": "worst retained class", "similarity.tow": "ToW"}
    more = {path: words for path, words in more.items() if path.split(".")[0] in run}
    return {**dict(zip(_MAIN, _MAIN, strict=True)), **_KEPT, **audits, **more, **dict(zip(_COST, _COST, strict=True))}


def value(record: Mapping[str, Any], path: str) -> float | None:
    """A number of a record by its path, None where it has none."""
    name, _, key = path.partition(".")
    number = record["audits"].get(name, {}).get(key) if key else record.get(name)
    return None if number is None or not math.isfinite(number) else float(number)


def values(records: Sequence[Mapping[str, Any]], path: str) -> list[float]:
    """All numbers that are known."""
    return [number for record in records if (number := value(record, path)) is not None]


def half_interval(numbers: Sequence[float]) -> float | None:
    """Half the 95 % confidence interval of the mean (Student's t), None for fewer than two numbers."""
    if len(numbers) < 2:
        return None
    return float(stats.t.ppf(0.975, len(numbers) - 1) * np.std(numbers, ddof=1) / math.sqrt(len(numbers)))


def false_alarms(references: Sequence[Mapping[str, Any]], path: str) -> float | None:
    """Share of retrained models that fall outside the band of the *other* ones; None below four of them."""
    numbers = [Evidence({}, {path: number}) for number in values(references, path)]
    if len(numbers) <= FEWEST_REFERENCES:
        return None
    outside = [bool(audits_outside(one, [*numbers[:i], *numbers[i + 1 :]])) for i, one in enumerate(numbers)]
    return float(np.mean(outside))


def judge_method(
    records: Sequence[Mapping[str, Any]], references: Sequence[Mapping[str, Any]], forgotten: Sequence[int]
) -> tuple[str, list[str]]:
    """The verdict on a method, and the audits in which one of its models lies outside the retrained models' band.

    It is the weakest verdict on any of its models, one for each seed, so a card never says less than a comparison.
    """
    retrained = [_evidence(reference) for reference in references]
    verdicts = [judge(_evidence(record), retrained, forgotten) for record in records]
    word = min((verdict.word for verdict in verdicts), key=WORDS.index)
    return word, list(dict.fromkeys(title for verdict in verdicts for title in verdict.outside))


def _evidence(record: Mapping[str, Any]) -> Evidence:
    """What a record of a comparison says for a verdict; class ids are text in a file."""
    headlines = {name: audit for name, audit in AUDITS.items() if audit.headline and name in record["audits"]}
    audits = {audit.title: value(record, f"{name}.{audit.headline}") for name, audit in headlines.items()}
    return Evidence({int(c): share for c, share in record["per_class"].items()}, audits)


def against(runs: Mapping[str, Sequence[Mapping[str, Any]]], method: str) -> tuple[float, float] | None:
    """AccDrt of UNSC minus that of a method, paired by seed: mean and half the 95 % interval, None where unknown."""
    if "unsc" not in runs or method == "unsc" or method not in runs:
        return None
    pairs = [(value(a, "AccDrt"), value(b, "AccDrt")) for a, b in zip(runs["unsc"], runs[method], strict=True)]
    gaps = [a - b for a, b in pairs if a is not None and b is not None]
    half = half_interval(gaps)
    return None if half is None else (float(np.mean(gaps)), half)


def summarise(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """Statistics of one forget set: by method the mean and interval of each column, verdict, and UNSC's lead."""
    runs, references = outcome["runs"], outcome["references"]
    paths, rows = columns(runs), dict[str, Any]()
    for name, records in {**runs, **({RETRAINED: references} if references else {})}.items():
        cells = {}
        for path in paths:
            known = values(records, path)
            cells[path] = {"mean": float(np.mean(known)) if known else None, "half": half_interval(known)}
        rows[name] = {"cells": cells, "verdict": "", "outside": [], "lead": against(runs, name)}
        if name not in (ORIGINAL, RETRAINED):
            word, outside = judge_method(records, references, outcome["forgotten"])
            rows[name] |= {"verdict": word, "outside": outside}
    return {"columns": paths, "rows": rows, "false_alarms": {path: false_alarms(references, path) for path in paths}}


# ---- as text --------------------------------------------------------------------------------------------------------
def with_interval(mean: float, half: float | None, digits: int = 1) -> str:
    """Mean ± half interval, where there is one."""
    return f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}")


def table(summary: Mapping[str, Any]) -> list[list[str]]:
    """Text cells of a comparison, the header first: percent, but for areas under a curve, ToW and seconds."""
    digits, rows = {"membership.auc": 3, "similarity.tow": 3, "seconds": 0}, []
    for name, row in summary["rows"].items():
        cells = []
        for path, cell in row["cells"].items():
            scale = 1 if path in digits else 100
            half = None if cell["half"] is None else scale * cell["half"]
            cells.append(
                "–" if cell["mean"] is None else with_interval(scale * cell["mean"], half, digits.get(path, 1))
            )
        lead = "" if row["lead"] is None else "{:+.1f} ± {:.1f}".format(*(100 * part for part in row["lead"]))
        rows.append([title(name), *cells, lead, row["verdict"]])
    alarms = ["" if alarm is None else f"{100 * alarm:.0f} %" for alarm in summary["false_alarms"].values()]
    if any(alarms):
        rows.append(["false alarms on retrained models", *alarms, "", ""])
    return [["method", *summary["columns"].values(), "UNSC's lead in AccDrt", "verdict"], *rows]
