"""A finished run in sentences, from `results.json`. Terminal and report say the same."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ..evaluation.verdict import FEWEST_REFERENCES
from .tables import DECIDING, STOP_REASONS, Table, counted, percent

_MOST_NAMES = 3  # beyond this many classes a sentence counts them


def sentences(results: Mapping[str, Any]) -> list[str]:
    """What was forgotten, what it cost, and how sure that is: a sentence each, where it was measured."""
    request, certificate, header = results["request"], results["certificate"], results["table"][0]
    current = header[1].endswith("on forgotten")  # in results of an earlier version the columns mean something else
    rows = {row[0]: row[1:DECIDING] for row in results["table"][1:] if current}
    written = str(results.get("written") or "UNSC")
    ours = rows.get(written, ["–"] * (DECIDING - 1))
    names = [str(name) for name in request.get("forget_classes") or ()]
    if header[1].startswith("ROUGE-L"):
        known, where = "Forgotten answers: ROUGE-L", "Tokens changed in kept answers"
    elif names:
        listed = ", ".join(names) if len(names) <= _MOST_NAMES else f"{len(names)} classes"
        known, where = f"{listed}: recognised", "Decisions changed on the other classes"
    else:
        known, where = f"{counted(request['rows'], 'row')}: classified rightly", "Decisions changed on test rows"
    others = {"retrained": "retraining", "no projection": "no projection", f"{written}, no projection": "no projection"}
    beside = {words: rows[name] for name, words in others.items() if name in rows}
    said = []
    if "original" in rows and ours[0] != "–":
        retrained = f" (retraining {beside['retraining'][0]})" if "retraining" in beside and not names else ""
        said.append(f"{known} {rows['original'][0]} before, {ours[0]} now{retrained}.")
    if ours[2] != "–":
        costs = ", ".join(f"{words} {row[2]}" for words, row in beside.items() if row[2] != "–")
        said.append(f"{where}: {ours[2]}{f' ({costs})' if costs else ''}.")
    unseen = certificate.get("unseen")
    counted_on = "inputs that the original never saw" if unseen else "held-out training rows"
    changed = f"Decisions changed on {certificate['flips']:,} of {certificate['rows']:,} {counted_on}"
    bound = f"{math.ceil(1000 * certificate['upper_95'] - 1e-9) / 10:g} %"  # never less than was shown
    such = "inputs" if unseen else "rows"
    return [*said, f"{changed}: at most {bound} of such {such} change, with 95 % confidence."]


def decision(results: Mapping[str, Any]) -> str:
    """What may be done with the model, in a sentence or two."""
    word, reason = results["verdict"]["word"], results["verdict"]["reason"]
    references = len(results.get("retrained_references") or ())
    if word == "not forgotten":
        return f"{reason[:1].upper()}{reason[1:]}. Do not publish this model as one that forgot."
    if word == "not judged":
        return f"{reason[:1].upper()}{reason[1:]}."
    gone = "Forgotten at the output"
    if word == "removed":
        return f"{gone}, and no audit tells the model from {references} retrained ones."
    if references < FEWEST_REFERENCES:
        return (
            f"{gone}. Whether the features still show it is open: only a comparison with {FEWEST_REFERENCES} retrained "
            "models would tell. Until then publish its answers, not its weights."
        )
    if not results["request"].get("forget_classes"):
        return f"{gone}. The features were not examined: publish the weights only if that is enough."
    return f"{gone}, but {reason}. Publish the weights only if that is acceptable, or retrain."


def course(results: Mapping[str, Any]) -> list[str]:
    """How unlearning went and what a reader must know: one sentence a point."""
    steps = f"{counted(results['steps'], 'step')}, " if "steps" in results else ""
    seconds = sum(value for value in results["seconds"].values() if value)
    stopped = results["certificate"]["stop_reason"]
    wrong = results["methods"].get("unsc", {}).get("negative_flips")
    return [
        f"Unlearning took {steps}{counted(round(seconds), 'second')} with the statistics. It ended by "
        f"{STOP_REASONS.get(stopped, str(stopped))}.",
        *([] if wrong is None else [f"Kept test rows whose decision went from right to wrong: {percent(wrong)}."]),
        *(results.get("caveats") or ()),
    ]


def print_summary(results: Mapping[str, Any], folder: Path, console: Console, more: Sequence[str] = ()) -> None:
    """The sentences, the columns that decide, the verdict, where the report is and what to do next, with `more`."""

    def show(*lines: str, style: str | None = None, **options: Any) -> None:
        for line in lines:
            console.print(line, markup=False, highlight=False, emoji=False, style=style, **options)

    show("", *sentences(results), style="bold")
    show("")
    console.print(Table(results["table"], str(results["written"])).rich())
    show("", f"Verdict: {results['verdict']['word']}. {decision(results)}")
    show(*(f"Note: {caveat}" for caveat in results["caveats"]), "")
    forgot = results["verdict"]["word"] in ("suppressed", "removed")
    push = f"Share     unsc push {shlex.quote(str(folder))} --hub_model_id user/name --hub_private_repo"
    share = [push] if forgot else []
    show(f"Report    {folder}/report.html", *share, *more, soft_wrap=True)
