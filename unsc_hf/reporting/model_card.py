"""The model card: what was forgotten, how, what it cost and what is claimed, rendered from a run's results."""

from __future__ import annotations

import html
import json
import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..objectives import OBJECTIVES
from ..utils.files import write_text
from .finished_run import FinishedRun
from .tables import (
    CERTIFICATE_NOTE,
    DECIDING,
    certificate_table,
    forgotten_text,
    markdown,
    options_table,
    requests_table,
)

PROJECT = "https://pypi.org/project/unsc-hf/"

_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"

_TAGS = ["unsc", "machine-unlearning", "unlearning"]

# What loads a model of each task: its class, and the class and variable name of what prepares its inputs.
_LOADERS = {
    "image-classification": ("AutoModelForImageClassification", "AutoImageProcessor", "processor"),
    "text-classification": ("AutoModelForSequenceClassification", "AutoTokenizer", "tokenizer"),
    "text-generation": ("AutoModelForCausalLM", "AutoTokenizer", "tokenizer"),
}

_NAMES_ROWS = ("forget_indices", "forget_values")  # options whose values tell which rows were forgotten

_PACKAGES = ("unsc_hf", "torch", "transformers", "datasets", "accelerate", "peft", "huggingface_hub")


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter, and Python's."""
    installed = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


def public_name(name: str) -> str:
    """A Hub id as it is, or the last part of a local path: cards must not show local paths."""
    path = Path(name).expanduser()
    local = path.exists() or path.is_absolute() or name.startswith((".", "~"))
    return path.resolve().name if name and local else name


def scrubbed_command(arguments: Sequence[str]) -> str:
    """A command line without tokens and without the rows to forget; of local paths only the last part stays."""
    shown: list[str] = []
    hide = ""  # the option whose values are not shown
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            option = name[2:].lower().replace("-", "_")
            hide = option if "token" in option or option in _NAMES_ROWS else ""
            if hide and equals:
                shown.append(f"{name}=***")
            else:
                shown.append(f"{name}={_last_part(value)}" if equals else name)
        elif hide:
            if shown[-1] != "***":
                shown.append("***")
            hide = hide if hide in _NAMES_ROWS else ""  # a token is one value, rows may be many
        else:
            shown.append(_last_part(argument))
    return shlex.join(shown)


def _last_part(text: str) -> str:
    path = Path(text).expanduser()
    return path.name if path.is_absolute() or text.startswith(("..", "~")) else text


def escape(text: Any) -> str:
    """Text from outside, such as class names, as inert Markdown: no markup, no HTML, no table breaks."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]#+!|~$<>])", r"\\\1", plain)


def markdown_table(rows: Sequence[Sequence[str]], emphasised: str = "") -> str:
    """Text cells, first the header, as a Markdown table; rows whose first cell is `emphasised` are bold."""
    mark = {emphasised: "**"} if emphasised else {}
    cells = [[mark.get(row[0], "") + escape(cell) + mark.get(row[0], "") for cell in row] for row in rows]
    return markdown(cells).rstrip() if rows else ""


def _eval_results(run: FinishedRun) -> list[EvalResult]:
    """Accuracies of the published model, for the Hub's index of results."""
    unlearned, dataset = run.methods.get("unsc"), run.origin.dataset
    metrics = (
        ("AccDut", "test", "accuracy on the forgotten classes"),
        ("AccDrt", "test", "accuracy on the remaining classes"),
        ("AccDf", "train", "accuracy on forgotten training rows"),
        ("AccDr", "train", "accuracy on retained training rows"),
    )
    return [
        EvalResult(
            task_type=run.task,
            task_name=f"{run.task.replace('-', ' ').capitalize()} after unlearning",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type="accuracy",
            metric_name=f"{name}: {text}",
            metric_value=round(value, 4),
        )
        for name, split, text in metrics
        if (value := getattr(unlearned, name, None)) is not None
    ]


def _metadata(run: FinishedRun) -> ModelCardData:
    origin = run.origin
    return ModelCardData(
        base_model=origin.hub_model,
        base_model_relation=("adapter" if run.adapter is not None else "finetune") if origin.hub_model else None,
        license=origin.license or "unknown",
        library_name="peft" if run.adapter is not None else "transformers",
        pipeline_tag=run.task,
        tags=_TAGS,
        datasets=[origin.dataset] if origin.dataset_on_hub else None,
        model_name=run.model_name.split("/")[-1],
        eval_results=_eval_results(run) or None,
    )


def build_card(run: FinishedRun) -> ModelCard:
    """Render the card; names are escaped, so they can break neither YAML nor Markdown nor the template."""
    origin, objective = run.origin, str(run.options.get("objective") or "unsc")
    return ModelCard.from_template(
        _metadata(run),
        template_path=str(_TEMPLATE),
        run=run,
        title=escape(run.model_name.split("/")[-1]),
        base_model=escape(origin.model or "A classifier"),
        dataset=escape(origin.dataset),
        reason=escape(run.reason[:1].upper() + run.reason[1:]),
        summary=[escape(sentence) for sentence in run.summary],
        project=PROJECT,
        forgotten=escape(forgotten_text(run.rows, run.forgotten_names, run.digest)),
        reads_retained=objective in OBJECTIVES and OBJECTIVES[objective].rehearses,
        comparison=markdown_table([row[:DECIDING] for row in run.table.cells], run.table.written),
        comparison_note=run.table.note,
        certificate=markdown_table(certificate_table(run.certificate) if run.certificate else []),
        certificate_note=CERTIFICATE_NOTE,
        requests=markdown_table(requests_table(run.requests)),
        loader=_LOADERS[run.task],
        repo=json.dumps(run.model_name),  # double quotes, as formatters want them
        base_repo=json.dumps(origin.model),
        objective=escape(objective),
        relabels=objective in ("unsc", "unsc_retain"),
        pseudo_labels=str(run.options.get("pseudo_labels")),
        options=markdown_table(options_table(run.options)),
        command=origin.command.replace("```", ""),
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
    )


def write_card(run: FinishedRun, folder: str | Path) -> Path:
    """Write `README.md` into `folder`, whole or not at all."""
    path = Path(folder) / "README.md"
    write_text(path, str(build_card(run)))
    return path
