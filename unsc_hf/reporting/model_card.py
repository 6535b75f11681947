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
from .tables import (
    CERTIFICATE_NOTE,
    CLASSIFIER_NOTE,
    LANGUAGE_NOTE,
    certificate_table,
    forgotten_text,
    options_table,
    requests_table,
)

_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md.jinja"

_TAGS = ["unsc", "machine-unlearning", "unlearning"]

_RELABELLING = {
    "top1": "with the most similar remaining class",
    "second": "with the second most similar remaining class",
    "soft": "with the original's distribution over the remaining classes, most of it on the most similar one",
    "random": "at random",
    "nearest_mean": "with the remaining class whose mean is nearest",
    "matched": "so that it is recognised only as well as rows that the original never saw",
    "left_out": "so that it is recognised only as well as equally hard rows that the original never saw",
}

# What loads a model of each task: its class, and the class and variable name of what prepares its inputs.
_LOADERS = {
    "image-classification": ("AutoModelForImageClassification", "AutoImageProcessor", "processor"),
    "text-classification": ("AutoModelForSequenceClassification", "AutoTokenizer", "tokenizer"),
    "text-generation": ("AutoModelForCausalLM", "AutoTokenizer", "tokenizer"),
}

_NAMES_ROWS = ("forget_indices", "forget_values")  # options whose values tell which rows were forgotten

_PACKAGES = ("unsc_hf", "torch", "transformers", "datasets", "accelerate", "peft", "huggingface_hub")

_ADAPTER_NOTE = (
    "This is an adapter. The base model still remembers: whoever loads it without the adapter has everything back. "
    "Where that matters, merge the adapter in float32 and publish the merged model instead."
)

_NO_REFERENCE = "No retrained model was given, so no claim beyond *suppressed* is possible."


@dataclass
class CardContent:
    """What a card is rendered from.

    Attributes:
        model_name: name of the unlearned model, or its Hub id.
        base_model: Hub id or folder name of the original.
        model_class: class that loads the model, for "How to use".
        forgotten: names of the forgotten classes; empty where single rows were forgotten.
        forgotten_rows: number of forgotten rows.
        dataset: Hub id or name of the data set.
        dataset_on_hub: whether `dataset` is a Hub id, which the card links.
        methods: results of each compared classifier by name; empty when none were compared.
        references: number of retrained models behind the row "retrained".
        certificate: `Certificate.to_dict()`, or None.
        verdict, reason: as `evaluation.verdict.judge` gives them.
        hyperparameters: options by name.
        pictures: (file name, caption).
        report: file name of the HTML report beside the card, or "".
        license: SPDX id, or None if unknown.
        command: what was typed, as `scrubbed_command` returns it.
        adapter: whether only a LoRA adapter is published.
        base_dtype: precision of the base model under the adapter.
        forgotten_digest: beginning of a hash over the forgotten rows, where no classes are named.
        table: comparison of language models as text cells, first the header.
        written: first cell of the row that describes the published model.
        requests: log of all requests served on this model, oldest first.
        task: the Hub's name of what the model does.
    """

    model_name: str
    base_model: str
    model_class: str
    forgotten: Sequence[str]
    forgotten_rows: int
    dataset: str
    dataset_on_hub: bool = False
    methods: dict[str, MethodResult] = field(default_factory=dict)
    references: int = 0
    certificate: dict[str, Any] | None = None
    verdict: str = "not judged"
    reason: str = "no comparison was made"
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    pictures: Sequence[tuple[str, str]] = ()
    report: str = ""
    license: str | None = None
    command: str = ""
    adapter: bool = False
    base_dtype: str = "float32"
    forgotten_digest: str = ""
    table: Sequence[Sequence[str]] = ()
    written: str = "UNSC"
    requests: Sequence[dict[str, Any]] = ()
    task: str = "image-classification"


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


def _adapter_note(content: CardContent) -> str:
    if not content.adapter:
        return ""
    if content.base_dtype == "float32":
        return _ADAPTER_NOTE
    return (
        f"{_ADAPTER_NOTE} It was unlearned on the base model in {content.base_dtype}, and the certificate holds for "
        "the base model loaded in that precision."
    )


def _usage(content: CardContent) -> str:
    """Python code that loads the model."""
    repo = json.dumps(content.model_name)  # double quotes, as formatters want them
    auto_class, processor_class, processor = _LOADERS[content.task]
    processor_line = f"{processor} = {processor_class}.from_pretrained({repo})"
    if content.adapter:
        dtype = "" if content.base_dtype == "float32" else f", dtype={json.dumps(content.base_dtype)}"
        return (
            "from peft import PeftModel\n"
            f"from transformers import {auto_class}, {processor_class}\n\n"
            f"base = {auto_class}.from_pretrained({json.dumps(content.base_model)}{dtype})\n"
            f"model = PeftModel.from_pretrained(base, {repo})\n{processor_line}"
        )
    return (
        f"from transformers import {processor_class}, {content.model_class}\n\n"
        f"model = {content.model_class}.from_pretrained({repo})\n{processor_line}"
    )


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


def _table_note(content: CardContent) -> str:
    note = LANGUAGE_NOTE if content.task == "text-generation" else CLASSIFIER_NOTE
    if content.references > 1:
        return f"{note} The row retrained is the mean of {content.references} models."
    if content.references == 1:
        return f"{note} The row retrained is one model trained without the forgotten data."
    return f"{note} {_NO_REFERENCE}"


def build_card(content: CardContent) -> ModelCard:
    """Render the card; names are escaped, so they can break neither YAML nor Markdown nor the template."""
    objective = str(content.hyperparameters.get("objective") or "unsc")
    pseudo_labels = str(content.hyperparameters.get("pseudo_labels"))
    comparison = format_table(content.methods) if content.methods else content.table
    return ModelCard.from_template(
        _metadata(content),
        template_path=str(_TEMPLATE),
        title=escape(content.model_name.split("/")[-1]),
        base_model=escape(content.base_model or "A classifier"),
        dataset=escape(content.dataset),
        verdict=content.verdict,
        reason=escape(content.reason[:1].upper() + content.reason[1:]),
        report=content.report,
        adapter_note=_adapter_note(content),
        forgotten=escape(forgotten_text(content.forgotten_rows, content.forgotten, content.forgotten_digest)),
        reads_retained=objective in OBJECTIVES and OBJECTIVES[objective].retain,
        comparison=markdown_table(comparison, content.written),
        comparison_note=_table_note(content),
        pictures=[{"file": file, "caption": caption} for file, caption in content.pictures],
        certificate=markdown_table(certificate_table(content.certificate)) if content.certificate else "",
        certificate_note=CERTIFICATE_NOTE,
        requests=markdown_table(requests_table(content.requests)),
        usage=_usage(content),
        objective=escape(objective),
        relabels=objective in ("unsc", "unsc_retain"),
        relabelling=_RELABELLING.get(pseudo_labels, _RELABELLING["top1"]),
        options=markdown_table(options_table(content.hyperparameters)),
        command=content.command.replace("```", ""),
        versions=", ".join(f"{name} {version}" for name, version in versions().items()),
    )


def write_card(content: CardContent, folder: str | Path) -> Path:
    """Write `README.md` into `folder`, whole or not at all."""
    path = Path(folder) / "README.md"
    write_text(path, str(build_card(content)))
    return path
