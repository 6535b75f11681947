"""The model card: what was forgotten, how, what it cost and what is claimed, rendered from a run's results."""

from __future__ import annotations

import html
import json
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation.verdict import MethodResult, format_table
from ..objectives import OBJECTIVES
from ..utils.files import write_text
from . import tables

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


@dataclass
class CardContent:
    """What a card is rendered from."""

    model_name: str  # name of the unlearned model, or its Hub id
    base_model: str  # Hub id or folder name of the original
    model_class: str  # class that loads the model
    forgotten: Sequence[str]  # names of the forgotten classes; empty where single rows were forgotten
    forgotten_rows: int
    dataset: str  # Hub id or name of the data set
    dataset_on_hub: bool = False  # whether `dataset` is a Hub id, which the card links
    methods: dict[str, MethodResult] = field(default_factory=dict)  # compared classifiers by name, if any
    references: int = 0  # number of retrained models behind the row "retrained"
    certificate: dict[str, Any] | None = None  # `Certificate.to_dict()`
    verdict: str = "not judged"  # this and the reason as `evaluation.verdict.judge` gives them
    reason: str = "no comparison was made"
    hyperparameters: dict[str, Any] = field(default_factory=dict)  # options by name
    pictures: Sequence[tuple[str, str]] = ()  # file names and captions
    report: str = ""  # file name of the HTML report beside the card
    license: str | None = None  # SPDX id
    command: str = ""  # what was typed, as `scrubbed_command` returns it
    adapter: bool = False  # whether only a LoRA adapter is published
    base_dtype: str = "float32"  # precision of the base model under the adapter
    forgotten_digest: str = ""  # beginning of a hash over the forgotten rows
    table: Sequence[Sequence[str]] = ()  # comparison of language models as text cells, first the header
    written: str = "UNSC"  # first cell of the row that describes the published model
    requests: Sequence[dict[str, Any]] = ()  # log of all requests served on this model, oldest first
    task: str = "image-classification"  # the Hub's name of what the model does


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter, and Python's."""
    installed = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in _PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
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


def typed_command() -> str:
    """The command that runs this recipe, or `unsc`, as `scrubbed_command` returns it."""
    program = Path(sys.argv[0]).name
    start = ["unsc"] if program in ("unsc", "unsc.exe") else ["python", f"recipes/{program}"]
    return scrubbed_command([*start, *sys.argv[1:]])


def _last_part(text: str) -> str:
    path = Path(text).expanduser()
    return path.name if path.is_absolute() or text.startswith(("..", "~")) else text


def escape(text: Any) -> str:
    """Text from outside, such as class names, as inert Markdown: no markup, no HTML, no table breaks."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]#+!|~$<>])", r"\\\1", plain)


def markdown_table(rows: Sequence[Sequence[str]], emphasised: str = "") -> str:
    """Text cells, first the header, as a Markdown table; rows whose first cell is `emphasised` are bold."""
    if not rows:
        return ""
    header, *body = [[escape(cell) for cell in row] for row in rows]
    bold = escape(emphasised)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(f"**{c}**" if bold and row[0] == bold else c for c in row) + " |" for row in body]
    return "\n".join(lines)


def _eval_results(content: CardContent) -> list[EvalResult]:
    """Accuracies of the published model, for the Hub's index of results."""
    unlearned = content.methods.get("unsc")
    metrics = (
        ("AccDut", "test", "accuracy on the forgotten classes"),
        ("AccDrt", "test", "accuracy on the remaining classes"),
        ("AccDf", "train", "accuracy on forgotten training rows"),
        ("AccDr", "train", "accuracy on retained training rows"),
    )
    return [
        EvalResult(
            task_type=content.task,
            task_name=f"{content.task.replace('-', ' ').capitalize()} after unlearning",
            dataset_type=content.dataset,
            dataset_name=content.dataset,
            dataset_split=split,
            metric_type="accuracy",
            metric_name=f"{name}: {text}",
            metric_value=round(value, 4),
        )
        for name, split, text in metrics
        if (value := getattr(unlearned, name, None)) is not None
    ]


def _metadata(content: CardContent) -> ModelCardData:
    return ModelCardData(
        base_model=content.base_model or None,
        base_model_relation=("adapter" if content.adapter else "finetune") if content.base_model else None,
        license=content.license or "unknown",
        library_name="peft" if content.adapter else "transformers",
        pipeline_tag=content.task,
        tags=_TAGS,
        datasets=[content.dataset] if content.dataset_on_hub else None,
        model_name=content.model_name.split("/")[-1],
        eval_results=_eval_results(content) or None,
    )


def build_card(content: CardContent) -> ModelCard:
    """Render the card; names are escaped, so they can break neither YAML nor Markdown nor the template."""
    objective = str(content.hyperparameters.get("objective") or "unsc")
    forgotten = tables.forgotten_text(content.forgotten_rows, content.forgotten, content.forgotten_digest)
    comparison = format_table(content.methods) if content.methods else content.table
    certificate = tables.certificate_table(content.certificate) if content.certificate else []
    return ModelCard.from_template(
        _metadata(content),
        template_path=str(_TEMPLATE),
        content=content,
        title=escape(content.model_name.split("/")[-1]),
        base_model=escape(content.base_model or "A classifier"),
        dataset=escape(content.dataset),
        reason=escape(content.reason[:1].upper() + content.reason[1:]),
        forgotten=escape(forgotten),
        reads_retained=objective in OBJECTIVES and OBJECTIVES[objective].rehearses,
        comparison=markdown_table(comparison, content.written),
        comparison_note=tables.LANGUAGE_NOTE if content.task == "text-generation" else tables.CLASSIFIER_NOTE,
        certificate=markdown_table(certificate),
        certificate_note=tables.CERTIFICATE_NOTE,
        requests=markdown_table(tables.requests_table(content.requests)),
        loader=_LOADERS[content.task],
        repo=json.dumps(content.model_name),  # double quotes, as formatters want them
        base_repo=json.dumps(content.base_model),
        objective=escape(objective),
        relabels=objective in ("unsc", "unsc_retain"),
        pseudo_labels=str(content.hyperparameters.get("pseudo_labels")),
        options=markdown_table(tables.options_table(content.hyperparameters)),
        command=content.command.replace("```", ""),
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
    )


def write_card(content: CardContent, folder: str | Path) -> Path:
    """Write `README.md` into `folder`, whole or not at all."""
    path = Path(folder) / "README.md"
    write_text(path, str(build_card(content)))
    return path
