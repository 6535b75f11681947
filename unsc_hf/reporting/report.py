"""The report of one run as a self-contained HTML file, made from what its `results.json` and pictures hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.signatures import run_signatures
from .html import FILE, Picture, Section, write_report

_VERDICTS = {
    "suppressed": "The output is gone. Whether the features still tell the forgotten data apart is another question: only 'removed' says they do not.",
    "removed": "The output is gone, and probe and prototype attack lie within the spread of several retrained models.",
    "not forgotten": "This model must not be published as one that forgot.",
    "not judged": "Nothing is claimed.",
}


_ACCURACIES = (
    ("AccDut", "test accuracy on the forgotten classes"),
    ("AccDrt", "test accuracy on the remaining classes"),
    ("AccDf", "accuracy on the rows to forget"),
    ("probe_forget", "what a linear probe reads of the forgotten classes in the features"),
)  # fmt: skip


_ENDS = {"target": "its target", "leak_budget": "the leak budget", "max_steps": "the step limit"}


def write_run_report(results: Mapping[str, Any], folder: str | Path) -> Path:
    """Write `report.html` into a run's folder.

    Args:
        results: content of the run's `results.json`; see `unlearning.run` and `language_unlearning.run`.
        folder: of the run; holds the pictures that `results["pictures"]` names.

    Returns:
        Path of the report.
    """
    folder = Path(folder)
    request, verdict = results["request"], results["verdict"]
    classes = [str(name) for name in request.get("forget_classes") or ()]
    what = f"{request['rows']:,} training rows"
    if classes:
        what += f" of {', '.join(classes[:20])}" + (
            f" and {len(classes) - 20} more classes" if len(classes) > 20 else ""
        )
    pictures = [
        Picture(folder / file, caption) for file, caption in results.get("pictures") or () if (folder / file).is_file()
    ]
    signs = run_signatures(results)
    sections = [
        Section("What was asked", [f"That {request['model']}, trained on {request['dataset']}, forget {what}."]),
        Section("What happened", points=_happened(results)),
        Section("Verdict", [f"{verdict['word'].capitalize()}: {verdict['reason']}.", _VERDICTS.get(verdict["word"], "")]),
        Section("Compared with retraining and trivial controls", [str(results.get("table_note") or "")], table=results["table"], emphasised=(str(results.get("written") or "UNSC"),)),
        Section("Failure signatures", [] if signs else ["None found."], points=signs),
        Section("Pictures", pictures=pictures),
        Section("Certificate", [_MEASURED], table=_certificate(results["certificate"])),
        *([Section("Requests served on this model", table=_requests(results["requests"]))] if results.get("requests") else []),
        Section("Options", table=[["option", "value"], *([str(k), str(v)] for k, v in results["hyperparameters"].items())]),
        Section("How it was made", code=results["command"] + "\n\n" + ", ".join(f"{k} {v}" for k, v in results["versions"].items())),
    ]  # fmt: skip
    return write_report(
        folder / FILE,
        f"Unlearning report: {folder.resolve().name}",
        sections,
        verdict["word"],
        footer="Made by unsc_hf. This file holds everything it shows and asks no network.",
    )


_MEASURED = "Measured on retained rows: how far the model moved where it was to stay the same."


def _happened(results: Mapping[str, Any]) -> list[str]:
    methods, certificate = results["methods"], results["certificate"]
    ours = methods.get("unsc", {})
    lines = []
    for name, words in _ACCURACIES:
        values = {m: methods[m].get(name) for m in ("original", "unsc", "retrained") if m in methods}
        if values.get("unsc") is None or values.get("original") is None:
            continue
        line = f"{words[0].upper()}{words[1:]}: {values['original']:.1%} before, {values['unsc']:.1%} after"
        lines.append(
            line + (f"; {values['retrained']:.1%} when retrained." if values.get("retrained") is not None else ".")
        )
    for name, before in methods.get("original", {}).get("sets", {}).items():
        if "sets" in ours and "rouge_l" in before:
            after = ours["sets"][name]["rouge_l"]
            retrained = methods.get("retrained", {}).get("sets", {}).get(name, {}).get("rouge_l")
            line = f"ROUGE-L on {name.replace('_', ' ')}: {before['rouge_l']:.1%} before, {after:.1%} after"
            lines.append(line + (f"; {retrained:.1%} when retrained." if retrained is not None else "."))
    seconds = results["seconds"]
    steps = f"{results['steps']} steps, " if "steps" in results else ""
    took = f"{steps}{sum(s for s in seconds.values() if s):.0f} seconds with the statistics"
    end = _ENDS.get(certificate["stop_reason"], str(certificate["stop_reason"]))
    lines.append(f"Unlearning took {took} and was ended by {end}.")
    return lines


def _certificate(certificate: Mapping[str, Any]) -> list[list[str]]:
    layers, drift = certificate["leak_per_layer"], certificate["drift"]
    worst = max(layers, key=lambda name: layers[name], default="")
    budget = certificate["max_leak"]
    rows = [
        ["what", "value"],
        ["rows", f"{certificate['rows']:,} ({'held out from the statistics' if certificate['held_out'] else 'may include rows of the statistics'})"],
        ["leak: relative change of layer outputs, all trained layers", f"{certificate['leak']:.3g}"],
        [f"worst layer, {worst}", f"{layers.get(worst, 0.0):.3g}"],
        ["budget on the leak", "none" if budget is None else f"{budget:.3g}"],
        ["logit drift, relative", f"{drift['relative']:.3g}"],
        ["largest change of one logit", f"{drift['largest']:.3g}"],
        ["decisions unchanged", f"{drift['agreement']:.2%}"],
        ["relative change of the trained weights", f"{certificate['relative_change']:.3g}"],
    ]  # fmt: skip
    for dtype, merged in (certificate.get("merged") or {}).items():
        rows.append([f"merged and stored as {dtype}: logit drift", f"{merged['relative']:.3g}"])
    return rows


def _requests(requests: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [["when", "rows", "salted SHA-256 begins with", "salt", "held-out leak"]]
    for entry in requests:
        rows.append([entry["time"], f"{entry['rows']:,}", entry["digest"], entry["salt"], f"{entry['leak']:.3g}"])
    return rows
