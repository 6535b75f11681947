"""A finished run in words and one small table, from `results.json`. Terminal and report say the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

from ..evaluation.verdict import FEWEST_REFERENCES, LABELS
from .plots import objective_title
from .tables import STOP_REASONS

_MOST_NAMES = 3  # beyond this many classes a sentence counts them

# Titles of the small table, by what was unlearned; the values are those of `_numbers`.
_TITLES = {
    "classes": ("accuracy on forgotten", "accuracy on kept", "decisions changed", "still readable by a probe"),
    "rows": ("accuracy on forgotten", "accuracy on kept", "decisions changed", "found by an attack (AUC)"),
    "answers": ("ROUGE-L on forgotten", "ROUGE-L on kept", "tokens changed", "recited when begun"),
}

_ACCURACIES = {
    "AccDut": "Test accuracy on the forgotten classes",
    "AccDrt": "Test accuracy on the remaining classes",
    "AccDf": "Accuracy on the rows to forget",
    "probe_forget": "Accuracy of a linear probe on the forgotten classes",
}


def percent(share: float | None) -> str:
    """A share in percent with one decimal where it needs one; a dash where it was not measured."""
    return "–" if share is None else f"{100 * share:.1f}".removesuffix(".0") + " %"


def _kind(results: Mapping[str, Any]) -> str:
    """What was unlearned: a key of `_TITLES`."""
    if any("sets" in method for method in results["methods"].values()):
        return "answers"
    return "classes" if results["request"].get("forget_classes") else "rows"


def _numbers(results: Mapping[str, Any]) -> dict[str, tuple[float | None, ...]]:
    """By the name of each model: how well it knows what is forgotten and what is kept, what changed, what is left."""
    kind, numbers = _kind(results), {}
    for name, method in results["methods"].items():
        if kind == "answers":
            sets = method["sets"]
            known = [sets.get(part, {}).get("rouge_l") for part in ("forget", "retain")]
            left = sets.get("forget", {}).get("extraction_strength")
        else:
            known = [method.get(key) for key in ("AccDut" if kind == "classes" else "AccDf", "AccDrt")]
            left = method.get("probe_forget" if kind == "classes" else "mia_auc")
        title = objective_title(name) if kind == "answers" else LABELS.get(name, name)
        numbers[title] = (*known, method.get("flips"), left)
    return numbers


def small_table(results: Mapping[str, Any]) -> list[list[str]]:
    """What decides, as text cells under a header: one row for each model."""
    titles = _TITLES[_kind(results)]
    auc = [title.endswith("(AUC)") for title in titles]
    rows = [
        [name, *("–" if x is None else f"{x:.2f}" if a else percent(x) for x, a in zip(numbers, auc, strict=True))]
        for name, numbers in _numbers(results).items()
    ]
    return [["model", *titles], *rows]


def sentences(results: Mapping[str, Any]) -> list[str]:
    """What was forgotten, what it cost, and how sure that is: a sentence each, where it was measured."""
    kind, request, numbers = _kind(results), results["request"], _numbers(results)
    unmeasured = (None,) * 4
    ours = numbers.get(str(results.get("written") or "UNSC"), unmeasured)
    before, retrained, free = (numbers.get(name, unmeasured) for name in ("original", "retrained", "no projection"))
    names = [str(name) for name in request.get("forget_classes") or ()]
    known = {
        "classes": f"{', '.join(names) if len(names) <= _MOST_NAMES else f'{len(names)} classes'}: recognised",
        "rows": f"The {request['rows']:,} forgotten rows: classified rightly",
        "answers": "Forgotten answers: ROUGE-L",
    }[kind]
    said = []
    if before[0] is not None and ours[0] is not None:
        beside = "" if retrained[0] is None or kind == "classes" else f" ({percent(retrained[0])} when retrained)"
        said.append(f"{known} {percent(before[0])} before, {percent(ours[0])} now{beside}.")
    if ours[2] is not None:
        where = {"classes": "Decisions changed on the other classes", "rows": "Decisions changed on test rows"}
        others = {"retraining": retrained[2], "no projection": free[2]}
        listed = ", ".join(f"{name} {percent(share)}" for name, share in others.items() if share is not None)
        said.append(f"{where.get(kind, 'Tokens changed in kept answers')}: {percent(ours[2])}"
                    f"{f' ({listed})' if listed else ''}.")  # fmt: skip
    certificate = results["certificate"]
    said.append(
        f"Decisions changed on {certificate['flips']:,} of {certificate['rows']:,} held-out inputs: at most "
        f"{percent(certificate['upper_95'])} of such inputs change, with 95 % confidence."
    )
    return said


def decision(results: Mapping[str, Any]) -> str:
    """What may be done with the model, in a sentence or two."""
    word, reason = results["verdict"]["word"], results["verdict"]["reason"]
    references = len(results.get("retrained_references") or ())
    if word == "not forgotten":
        return f"Not forgotten: {reason}. Do not publish this model as one that forgot."
    if word == "not judged":
        return f"Not judged: {reason}."
    if word == "removed":
        return f"Forgotten at the output, and no audit tells the model from {references} retrained ones."
    if references < FEWEST_REFERENCES:
        return (
            "Forgotten at the output. Whether the features still show it is open: only a comparison with "
            f"{FEWEST_REFERENCES} retrained models would tell. Until then publish its answers, not its weights."
        )
    if _kind(results) == "rows":
        return "Forgotten at the output. The features were not examined: publish the weights only if that is enough."
    return (
        "Forgotten at the output. Features still show it: publish the weights only if that is acceptable, or retrain."
    )


def print_summary(results: Mapping[str, Any], folder: Path, console: Console, more: Sequence[str] = ()) -> None:
    """The verdict, the sentences, the small table, where the report is, and what to do next; `more` ends the list."""

    def show(text: str = "", style: str | None = None) -> None:
        console.print(text, markup=False, highlight=False, style=style)

    header, *rows = small_table(results)
    table = RichTable(box=SIMPLE_HEAD, show_edge=False)
    table.add_column(header[0], vertical="bottom")
    for title in header[1:]:
        table.add_column(title, justify="right", vertical="bottom", max_width=16)
    for row in rows:
        table.add_row(*row, style="bold" if row[0] == (results.get("written") or "UNSC") else None)
    show()
    for line in sentences(results):
        show(line, "bold")
    show()
    console.print(table)
    show()
    show(f"Verdict: {results['verdict']['word']}. {decision(results)}")
    for caveat in results.get("caveats") or ():
        show(f"Note: {caveat}")
    show()
    for line in (f"Report    {folder}/report.html", f"Publish   unsc push {folder} --hub_model_id user/name", *more):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def course(results: Mapping[str, Any]) -> list[str]:
    """What changed, and how unlearning ended, in full: one sentence a point."""
    methods = results["methods"]
    points = [
        _change(text, {name: method.get(key) for name, method in methods.items()}) for key, text in _ACCURACIES.items()
    ]
    points.append(_changed_decisions(methods))
    for questions in methods.get("original", {}).get("sets", {}):
        rouge = {name: method.get("sets", {}).get(questions, {}).get("rouge_l") for name, method in methods.items()}
        points.append(_change(f"ROUGE-L on {questions.replace('_', ' ')}", rouge))
    steps = f"{results['steps']} steps, " if "steps" in results else ""
    seconds = sum(value for value in results["seconds"].values() if value)
    stopped = results["certificate"]["stop_reason"]
    end = STOP_REASONS.get(stopped, str(stopped))
    points.append(f"Unlearning took {steps}{seconds:.0f} seconds with the statistics. It ended by {end}.")
    return [point for point in (*points, *(results.get("caveats") or ())) if point]


def _changed_decisions(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """How many decisions on kept rows became wrong; empty where it was not measured."""
    ours = methods.get("unsc", {})
    if ours.get("negative_flips") is None:
        return ""
    changed, wrong = percent(ours["flips"]), percent(ours["negative_flips"])
    return f"Decisions changed on kept test rows: {changed}, from right to wrong {wrong}."


def _change(text: str, values: Mapping[str, float | None]) -> str:
    """A value before and after unlearning, and in the retrained model; empty where it was not measured."""
    before, after, retrained = (values.get(name) for name in ("original", "unsc", "retrained"))
    if before is None or after is None:
        return ""
    beside = "" if retrained is None else f"; {percent(retrained)} when retrained"
    return f"{text}: {percent(before)} before, {percent(after)} after{beside}."
