"""`unsc audit lm`: what a language model still knows of forgotten answers, whoever made it forget them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.hf_argparser import HfArg
from transformers.utils.peft_utils import find_adapter_config_file

from ..comparison.experiment import check_names
from ..comparison.report import write_json, write_page
from ..comparison.summary import markdown
from ..errors import UNSCError
from ..evaluation.language.audits import ANSWER_AUDITS, AnswerExamination, choose_rate, examine
from ..evaluation.verdict import Evidence, Verdict, judge
from ..models.loading import load_as, load_config, load_tokenizer
from ..reporting.model_card import public_name
from ..reporting.report import Section
from ..reporting.results import finite
from ..trainer.rows import at_most
from ..utils.distributed import gathered, process
from ..utils.files import write_text
from ..utils.fingerprint import data_fingerprint, weight_hash
from .evaluation_arguments import ExaminedArguments
from .language_evaluation import evaluation_of

AUDIT = "audit.json"
_AUC = "membership"  # the others are shares, shown in percent

_NOTES = (
    "Percent, but the membership attack is an AUC (0.5 is chance). Models that never saw the forgotten answers guess "
    "some of their tokens too: compare with the retrained models.",
    "Relearning: tokens recited of other forgotten answers while a few are taught, mean over 40 steps.",
)


@dataclass
class LanguageAuditArguments(ExaminedArguments):
    """Which language model is audited, beside which others."""

    audited: str | None = HfArg(default=None, help="The unlearned model, made by anybody: a Hub id or folder.")
    retrained_model_name_or_path: list[str] | None = HfArg(
        default=None, help="Models trained without the forgotten rows; three or more allow a verdict."
    )
    audits: list[str] | None = HfArg(default=None, help="Audits by name; all by default.")
    shots: int = HfArg(default=10, help="Forgotten answers that a relearning attacker has.")
    max_rows: int = HfArg(default=300, help="Rows of each set that are read, evenly spaced.")
    output_dir: str = HfArg(default="outputs/audit", help="Where the results are written.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("audits", self.audits, ANSWER_AUDITS)
        for name in ("shots", "max_rows"):
            if getattr(self, name) < 1:
                raise UNSCError(f"{name}: got {getattr(self, name)}; choose a whole number of 1 or more.")


def audit_language_model(
    audited: str, original: str, dataset_name: str, *, retrained: Sequence[str] = (), console: Console | None = None,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Audit a language model that was unlearned by anybody, and write `audit.json`, a table and `report.html`.

    A model whose audit is in `output_dir` already is not examined again.

    Args:
        audited, original: the unlearned model or adapter, and the model before: Hub ids or folders.
        dataset_name: a Hub id or folder with configurations as TOFU is published, or splits.
        retrained: models trained without the forgotten rows. A verdict needs three.
        console: where progress and the table are printed; nowhere when None.
        **options: other fields of `LanguageAuditArguments`, such as `forget_config` and `audits`.

    Returns:
        {"models": readings by model and audit, "verdict": {"word", "reason", "outside"}, "relearning_rate", "table"}.

    Raises:
        UNSCError: input that cannot work.
    """
    arguments = LanguageAuditArguments(
        model_name_or_path=original, audited=audited, retrained_model_name_or_path=list(retrained) or None,
        dataset_name=dataset_name, **options,
    )  # fmt: skip
    return run(arguments, console or Console(quiet=True))


def run(arguments: LanguageAuditArguments, console: Console, command: str = "Python") -> dict[str, Any]:
    """See `audit_language_model`."""
    names = _names(arguments)
    state = PartialState(cpu=arguments.use_cpu or None)
    sets = {name: at_most(rows, arguments.max_rows) for name, rows in arguments.sets().items()}
    load = partial(load_as, AutoModelForCausalLM, dtype=getattr(torch, arguments.model_dtype))
    original = load(names["original"], "model_name_or_path").to(state.device)
    folder, audits = Path(arguments.output_dir), arguments.audits or list(ANSWER_AUDITS)
    left_out = ("output_dir", "disable_tqdm", "use_cpu", "model_name_or_path", *_MODELS)
    settings = {f.name: getattr(arguments, f.name) for f in fields(arguments) if f.name not in left_out}
    settings |= {"rows": {name: data_fingerprint(rows) for name, rows in sets.items()}}
    settings |= {"original": weight_hash(original), "audits": audits}
    models: dict[str, dict[str, Any]] = {}
    # The rate of relearning is chosen on the first model, which should not know the answers.
    for title in sorted(names, key=lambda title: (not title.startswith("retrained"), title == "original")):
        model = original if title == "original" else load(names[title], _argument(title)).to(state.device)
        _check_vocabulary(title, model, original)
        evaluation = evaluation_of(arguments, model, load_tokenizer(names[title]), sets)
        key = {**settings, "model": weight_hash(model)}
        file = folder / "_runs" / f"{title.replace(' ', '-')}.json"
        record = gathered(_finished(file, key), state.device)[0]
        if record is None:
            console.print(f"{title}: {public_name(names[title])} ...", markup=False, highlight=False)
            exam = AnswerExamination(evaluation, original, arguments.shots, settings.get("rate"))
            if "rate" not in settings and "relearning" in audits:
                exam = replace(exam, rate=choose_rate(exam))
            record = finite({"settings": key, "rate": exam.rate, "readings": examine(exam, audits)})
            if process()[0] == 0:
                write_text(file, json.dumps(record))
        settings["rate"] = record["rate"]
        models[title] = record["readings"]
    verdict = verdict_on(models)
    content = {
        "models": models, "verdict": vars(verdict), "relearning_rate": settings["rate"], "table": table(models),
    }  # fmt: skip
    if process()[0] == 0:
        _write(content, verdict, folder, arguments, command)
    state.wait_for_everyone()
    console.print(
        f"\n{markdown(content['table'])}\nVerdict: {verdict.word}. {verdict.reason}", markup=False, soft_wrap=True
    )
    return {"output_dir": arguments.output_dir, **content}


_MODELS = ("audited", "retrained_model_name_or_path")


def _names(arguments: LanguageAuditArguments) -> dict[str, str]:
    """Models by title; UNSCError where one is not given or not there."""
    given = {"original": arguments.model_name_or_path, "audited": arguments.audited}
    given |= {f"retrained {i}": name for i, name in enumerate(arguments.retrained_model_name_or_path or (), 1)}
    for title, name in given.items():
        if name is None:
            raise UNSCError(f"{_argument(title)}: not given; name the {title} model, by its Hub id or folder.")
        if find_adapter_config_file(name) is None:  # an adapter names its base model itself
            load_config(name, _argument(title))
    return {title: str(name) for title, name in given.items()}


def _argument(title: str) -> str:
    return {"original": "model_name_or_path", "audited": "audited"}.get(title, "retrained_model_name_or_path")


def _check_vocabulary(title: str, model: PreTrainedModel, original: PreTrainedModel) -> None:
    seen, expected = model.config.vocab_size, original.config.vocab_size
    if seen != expected:
        raise UNSCError(
            f"{_argument(title)}: knows {seen} tokens, the original {expected}; compare models with the same tokenizer."
        )


def _finished(file: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a model, if it is there and was made by the same settings; those of relearning are in it."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return dict(record) if record["settings"] == json.loads(json.dumps(settings)) else None


def headline(readings: Mapping[str, Any], name: str) -> float | None:
    """The number of an audit that tables show; None where it was not measured."""
    value = readings.get(name, {}).get(ANSWER_AUDITS[name].headline or "flips")
    return None if value is None else float(value)


def verdict_on(models: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """The verdict on the audited model, from the headline numbers of all audits that examine forgotten answers."""

    def evidence(readings: Mapping[str, Any]) -> Evidence:
        judged = {name: one.title for name, one in ANSWER_AUDITS.items() if one.headline and name in readings}
        return Evidence({}, {title: headline(readings, name) for name, title in judged.items()})

    references = [evidence(readings) for title, readings in models.items() if title.startswith("retrained")]
    return judge(evidence(models["audited"]), references, [])


def table(models: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Text cells of an audit, the header first; a dash where nothing was measured."""
    first = [title for title in ("original", "audited") if title in models]
    titles = [*first, *sorted(title for title in models if title not in first)]
    names = [name for name in ANSWER_AUDITS if any(models[title].get(name) for title in titles)]

    def cell(title: str, name: str) -> str:
        value = headline(models[title], name)
        if value is None:
            return "–"
        return f"{value:.3f}" if name == _AUC else f"{100 * value:.1f}"

    rows = [[title, *(cell(title, name) for name in names)] for title in titles]
    return [["model", *(ANSWER_AUDITS[name].title for name in names)], *rows]


def _write(
    content: Mapping[str, Any], verdict: Verdict, folder: Path, arguments: LanguageAuditArguments, command: str
) -> None:
    """`audit.json`, `table.md` and `report.html`."""
    write_json(folder / AUDIT, content, command)
    heading = f"What {public_name(str(arguments.audited))} still knows"
    write_text(folder / "table.md", f"# {heading}\n\n{markdown(content['table'])}")
    sections = [
        Section("Results", _NOTES, table=content["table"], emphasised=("audited",)),
        Section("Why this verdict", [f"{verdict.word.capitalize()}: {verdict.reason}."]),
    ]
    write_page(folder, heading, sections, command, verdict.word)
